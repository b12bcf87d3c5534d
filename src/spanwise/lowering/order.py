"""The order of compute on every device: stage schedules, merged by dependency where a device has several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from spanwise.core.errors import PlanError
from spanwise.core.order import Op, OpKind, joined
from spanwise.core.plan import Plan
from spanwise.schedules import stage_order

# Backward is about two matrix products to one, each of its halves one.
_COST = {"forward": 1.0, "backward": 2.0, "backward_input": 1.0, "backward_weight": 1.0}
# Backwards first: they free memory and feed the stages before. Nobody waits for weight halves.
_RANK = {"backward": 0, "backward_input": 0, "forward": 1, "backward_weight": 2}


class StageOp(NamedTuple):
    """A forward, a backward or half of one, of one micro-batch through one stage.

    ``at_once``: micro-batches, from this one on, whose weight halves are done at once.
    """

    kind: OpKind
    stage: int
    micro_batch: int
    at_once: int = 1


def compute_order(plan: Plan) -> dict[str, tuple[StageOp, ...]]:
    """For each device its forwards and backwards, whole or in halves, in order.

    Weight halves of a stage that follow each other on a device are one.
    """
    orders: dict[str, list[tuple[int, tuple[Op, ...]]]] = {}
    for index, stage in enumerate(plan.stages):
        order = stage_order(plan.schedule, plan.micro_batches, stage.warmup, stage.ops)
        for device in stage.devices:
            orders.setdefault(device, []).append((index, order))
    if all(len(held) == 1 for held in orders.values()):
        return {device: tuple(_joined(stage, order)) for device, ((stage, order),) in orders.items()}
    return {
        device: tuple(
            op
            for stage, following in groupby(merged, lambda op: op.stage)
            for op in _joined(stage, (Op(op.kind, op.micro_batch) for op in following))
        )
        for device, merged in _Merge(plan, orders).run().items()
    }


def _joined(stage: int, order: Iterable[Op]) -> Iterator[StageOp]:
    return (StageOp(op.kind, stage, op.micro_batch, count) for op, count in joined(order))


class _Merge:
    """List scheduling in virtual time; whatever it makes can end, because it ended here."""

    def __init__(self, plan: Plan, orders: dict[str, list[tuple[int, tuple[Op, ...]]]]) -> None:
        self.plan = plan
        self.queues = {d: {stage: list(ops) for stage, ops in held} for d, held in orders.items()}
        self.ranges = [stage.row_ranges() for stage in plan.stages]
        self.done: dict[tuple[str, StageOp], float] = {}
        self.free = dict.fromkeys(orders, 0.0)
        self.out: dict[str, list[StageOp]] = {device: [] for device in orders}

    def run(self) -> dict[str, tuple[StageOp, ...]]:
        total = sum(len(ops) for held in self.queues.values() for ops in held.values())
        for _ in range(total):
            ready = [c for device in self.queues for c in self._candidates(device)]
            if not ready:
                raise PlanError(
                    f"plan '{self.plan.strategy}': no order of its {total} forwards and backwards "
                    "can end; lower the warm-up depth of later stages"
                )
            start, _, _, _, device, op = min(ready)
            self.queues[device][op.stage].pop(0)
            self.out[device].append(op)
            self.free[device] = start + _COST[op.kind]
            self.done[device, op] = self.free[device]
        return {device: tuple(ops) for device, ops in self.out.items()}

    def _candidates(self, device: str) -> list[tuple[float, int, int, int, str, StageOp]]:
        found: list[tuple[float, int, int, int, str, StageOp]] = []
        for stage, ops in self.queues[device].items():
            if not ops:
                continue
            op = StageOp(ops[0].kind, stage, ops[0].micro_batch)
            ready = self._ready(device, op)
            if ready is not None:
                start = max(ready, self.free[device])
                found.append((start, _RANK[op.kind], op.micro_batch, -stage, device, op))
        return found

    def _ready(self, device: str, op: StageOp) -> float | None:
        """When everything it needs is there; None while something is not even scheduled."""
        needs: list[tuple[str, StageOp]] = []
        other = op.stage + (-1 if op.kind == "forward" else 1)
        if op.kind == "backward_weight":
            needs.append((device, StageOp("backward_input", op.stage, op.micro_batch)))
        elif 0 <= other < len(self.ranges):
            a, b = next((a, b) for d, a, b in self.ranges[op.stage] if d == device)
            needs += [
                (d, StageOp(op.kind, other, op.micro_batch))
                for d, c, e in self.ranges[other]
                if max(a, c) < min(b, e)
            ]
        if op.kind in ("backward", "backward_input"):
            needs.append((device, StageOp("forward", op.stage, op.micro_batch)))
        ready = 0.0
        for need in needs:
            if need not in self.done:
                return None
            ready = max(ready, self.done[need])
        return ready
