"""What the pictures of the benchmarks share: one look, no screen, the spines that carry nothing left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS, PLAIN, GREY = "#d1495b", "#5c6b73", "#e8e8e8"

Draw = Callable[[dict[str, Any], Path], None]


@contextmanager
def canvas(path: Path, size: tuple[float, float], panels: tuple[int, int] = (1, 1)) -> Iterator[list[Any]]:
    """Axes, row by row, of a picture that is written to ``path`` in the end; the suffix tells the format."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "spanwise"  # the same numbers give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*panels, figsize=size, squeeze=False, layout="constrained")
    found = list(axes.flat)
    for axis in found:
        axis.spines[["top", "right"]].set_visible(False)
    yield found
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    print(f"drawn: {path.name}")


def bars(
    axis: Any, labels: Sequence[str], values: Sequence[float], texts: Sequence[str], **look: Any
) -> None:
    """Horizontal bars from the top down, each with its text behind it."""
    places = range(len(values))
    axis.barh(places, values, **{"height": 0.6, "color": PLAIN, **look})
    for place, value, text in zip(places, values, texts, strict=True):
        axis.text(value, place, f" {text}", va="center", fontsize=8)
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.2)


def redraw(folder: Path, name: str, draw: Draw) -> None:
    """The picture of a benchmark again, from its raw file."""
    draw(json.loads((folder / "raw" / f"{name}.json").read_text(encoding="utf-8")), folder / f"{name}.svg")
