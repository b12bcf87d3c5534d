"""What raw cells of the lab's benchmarks say, read without torch: the median step, a plan in words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from spanwise.reporting.text import layer_range


def middle(values: Sequence[float]) -> float:
    """Median."""
    return statistics.median(values)


def step_s(rounds: Sequence[Mapping[str, Any]]) -> float | None:
    """Median step over all rounds, as the raw file has them."""
    values = [s for one in rounds for s in one["step_s"]]
    return middle(values) if values else None


def plan_words(plan: Mapping[str, Any]) -> str:
    """Stages as `layers devices`, micro-batches and schedule: short enough for a table."""
    stages: list[str] = []
    for stage in plan["stages"]:
        held = " ".join(f"{r['device']}:{r['rows']}" for r in stage["replicas"])
        stages.append(f"{layer_range(stage['start'], stage['stop'])} {held}")
    return f"{' / '.join(stages)}; {plan['micro_batches']} micro-batches, {plan['schedule']}"
