"""What every benchmark shares: options, medians, and raw results with the environment beside them."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pictures import Draw, redraw

from spanwise.api.run import environment
from spanwise.api.times import default_cache
from spanwise.lab import reason_against


def parser(description: str) -> argparse.ArgumentParser:
    """``--short`` for a run of a minute or two, ``--out`` for where raw results go."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--short", action="store_true", help="fewer repeats; results are not kept")
    found.add_argument("--out", type=Path, default=None, help="raw JSON file")
    found.add_argument("--redraw", action="store_true", help="only the picture again, from the raw file")
    return found


def options(description: str) -> argparse.Namespace:
    """The options that every benchmark has."""
    return parser(description).parse_args()


def need_lab(args: argparse.Namespace) -> None:
    """Ends this program where there can be no lab: a short run may go without, a whole one may not."""
    reason = reason_against()
    if reason:
        print(f"not run: {reason}")
        sys.exit(0 if args.short else 1)


def cache_of(args: argparse.Namespace) -> Path | None:
    """Where profiles are kept between runs: short runs use the user's own cache, whole ones measure anew."""
    given: Path | None = getattr(args, "cache", None)
    return given or (default_cache() if args.short else None)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(values)
    low, middle, high = (
        statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    )
    return {"median": middle, "q1": low, "q3": high, "n": len(ordered)}


def redrawn(args: argparse.Namespace, folder: Path, name: str, draw: Draw) -> bool:
    """Whether only the picture was asked for; then it is drawn."""
    if args.redraw:
        redraw(folder, name, draw)
    return bool(args.redraw)


class Cells:
    """Results of a long run, written beside ``--out`` as they come: an interrupted run goes on from there."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._path = None if args.out is None else args.out.with_suffix(".partial.json")
        self.found: list[dict[str, Any]] = []
        if self._path is not None and self._path.exists():
            self.found = json.loads(self._path.read_text(encoding="utf-8"))

    def add(self, cell: dict[str, Any]) -> None:
        """Keeps one more."""
        self.found.append(cell)
        if self._path is not None:
            self._path.write_text(json.dumps(self.found), encoding="utf-8")


def keep(
    args: argparse.Namespace,
    folder: Path,
    name: str,
    result: dict[str, Any],
    *,
    quiet: bool = False,
    draw: Draw | None = None,
) -> None:
    """Prints the result; writes it with the environment, and its picture, unless the run is short."""
    data = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "environment": environment(), **result}
    if not quiet:
        print(json.dumps(result, indent=1))
    path = args.out or (None if args.short else folder / "raw" / f"{name}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path.name}")
        if draw is not None and args.out is None:
            draw(data, folder / f"{name}.svg")
