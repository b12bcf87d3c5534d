"""The order of forwards and backwards inside one stage: pure functions of counts and seconds."""

from __future__ import annotations

from spanwise.core.order import Op
from spanwise.core.plan import ScheduleName
from spanwise.schedules.gpipe import gpipe
from spanwise.schedules.one_f_one_b import one_f_one_b
from spanwise.schedules.zero_bubble import Hop, StageSeconds, zb_h1, zero_bubble

__all__ = ["Hop", "Op", "StageSeconds", "gpipe", "one_f_one_b", "stage_order", "zb_h1", "zero_bubble"]


def stage_order(
    schedule: ScheduleName, micro_batches: int, warmup: int, ops: tuple[Op, ...] = ()
) -> tuple[Op, ...]:
    """What a stage computes over ``micro_batches``, in order.

    ``warmup`` counts for 1f1b only, ``ops`` is what a plan stores for a stage under zero_bubble.
    """
    match schedule:
        case "gpipe":
            return gpipe(micro_batches)
        case "1f1b":
            return one_f_one_b(micro_batches, warmup)
        case "zero_bubble":
            return ops
