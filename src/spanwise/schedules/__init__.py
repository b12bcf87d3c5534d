"""The order of forwards and backwards inside one stage: pure functions of counts."""

from __future__ import annotations

from spanwise.core.plan import ScheduleName
from spanwise.schedules.gpipe import gpipe
from spanwise.schedules.one_f_one_b import one_f_one_b
from spanwise.schedules.order import Op

__all__ = ["Op", "gpipe", "one_f_one_b", "stage_order"]


def stage_order(schedule: ScheduleName, micro_batches: int, warmup: int) -> tuple[Op, ...]:
    """Forwards and backwards of one stage over ``micro_batches``; ``warmup`` counts for 1f1b only."""
    if schedule == "gpipe":
        return gpipe(micro_batches)
    return one_f_one_b(micro_batches, warmup)
