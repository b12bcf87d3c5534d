"""The picture: throughput over time of the three runs, and what a plan for each condition would give."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from pictures import OURS, canvas

COLORS = {"undisturbed": "#9db4c0", "fixed": "#a0855b", "adapting": OURS}


def draw(result: dict[str, Any], path: Path) -> None:
    """Samples per second over time since the first step; short lines are the ideal of each condition."""
    batch = result["batch"]
    with canvas(path, (10, 3.6)) as (axis,):
        for name, color in COLORS.items():
            ends = result["step_ends_s"][name]
            rates = [batch / max(b - a, 1e-9) for a, b in pairwise(ends)]
            axis.step(ends[1:], rates, where="pre", color=color, label=name, linewidth=1.4)
        ends = result["step_ends_s"]["adapting"]
        starts = [event["step"] for event in result["events"]]
        for event, stop in zip(result["events"], [*starts[1:], len(ends)], strict=True):
            begin, end = ends[event["step"] - 1], ends[stop - 1]
            level = batch / result["ideal_step_s"][event["name"]]
            axis.hlines(level, begin, end, color="#333333", linestyle=":", linewidth=1.2)
            axis.axvline(begin, color="#cccccc", linewidth=0.8)
            axis.text(begin, axis.get_ylim()[1], event["name"], fontsize=8, va="bottom")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("seconds (events where the adapting run met them)")
        axis.set_ylabel("samples/s")
        axis.legend(frameon=False, fontsize=8, ncol=3, loc="lower right")
