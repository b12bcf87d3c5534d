"""Zero bubble: backward in two halves, the weight half fills the waits.

Qi, Wan, Huang and Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024 (arXiv 2401.10241). ``zb_h1`` is their
hand-made schedule; ``zero_bubble`` is our own list scheduler for unequal stages and links.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from spanwise.core.order import Op, OpKind

_KINDS: tuple[OpKind, ...] = ("forward", "backward_input", "backward_weight")


class StageSeconds(NamedTuple):
    """Forward, input half and weight half of one micro-batch in one stage."""

    forward_s: float
    input_s: float
    weight_s: float


class Hop(NamedTuple):
    """One direction of a link: how long a message keeps it busy, and how much later it arrives."""

    busy_s: float
    latency_s: float


def zb_h1(micro_batches: int, stage: int, stages: int) -> tuple[Op, ...]:
    """1F1B at depth P-p whose weight halves lag p micro-batches behind the input halves of stage p.

    Every stage keeps at most P micro-batches, as many as the first keeps under 1F1B. With equal seconds F, I
    and W in all stages and no links the bubble is (P-1)(F+I-W).
    """
    depth = min(stages - stage, micro_batches)
    order = [Op("forward", m) for m in range(depth)]
    for done in range(micro_batches):
        order.append(Op("backward_input", done))
        if done >= stage:
            order.append(Op("backward_weight", done - stage))
        if done + depth < micro_batches:
            order.append(Op("forward", done + depth))
    order += [Op("backward_weight", m) for m in range(max(0, micro_batches - stage), micro_batches)]
    return tuple(order)


def zero_bubble(
    micro_batches: int,
    stages: Sequence[StageSeconds],
    forth: Sequence[Hop],
    back: Sequence[Hop],
    *,
    ahead: Sequence[int],
    kept: Sequence[int],
) -> tuple[tuple[Op, ...], ...]:
    """The order of every stage, by list scheduling in virtual time.

    When stage p is free it takes the input half of the next micro-batch whose gradient has arrived; else the
    next forward whose input has arrived, while fewer than ``ahead[p]`` forwards have no input half and fewer
    than ``kept[p]`` no weight half; else the oldest weight half; else it waits.

    Args:
        micro_batches: M.
        stages: seconds a micro-batch; of replicas those of the slowest.
        forth: links behind each stage but the last, towards the end.
        back: the same links, towards the front.
        ahead: K1, at least 1.
        kept: K2, at least 1; what memory allows.
    """
    return _Scheduling(micro_batches, stages, (forth, back), (ahead, kept)).run()


class _Scheduling:
    """The state of one run in virtual time; arrivals are known as soon as what causes them is decided."""

    def __init__(
        self,
        micro_batches: int,
        stages: Sequence[StageSeconds],
        links: tuple[Sequence[Hop], Sequence[Hop]],
        limits: tuple[Sequence[int], Sequence[int]],
    ) -> None:
        self.count, self.stages = micro_batches, stages
        self.forth, self.back = links
        self.ahead, self.kept = limits
        total = len(stages)
        self.orders: list[list[Op]] = [[] for _ in range(total)]
        self.free = [0.0] * total  # when each stage can take the next op
        self.links_free = ([0.0] * total, [0.0] * total)
        # Arrivals in order: inputs of each stage, and gradients for it.
        self.inputs: list[list[float]] = [[] for _ in range(total)]
        self.gradients: list[list[float]] = [[] for _ in range(total)]
        self.inputs[0] = [0.0] * micro_batches
        self.done = [dict.fromkeys(_KINDS, 0) for _ in stages]

    def run(self) -> tuple[tuple[Op, ...], ...]:
        """One decision after the other, always the earliest, so that none misses an arrival before it."""
        last = len(self.stages) - 1
        due = [self._next(stage) for stage in range(last + 1)]
        heap = [(at, stage) for stage, at in enumerate(due) if at is not None]
        heapq.heapify(heap)
        while heap:
            now, stage = heapq.heappop(heap)
            if due[stage] != now:
                continue  # decided meanwhile, or due earlier since
            self._take(stage, self._choice(stage, now), now)
            for near in range(max(stage - 1, 0), min(stage + 1, last) + 1):
                at = due[near] = self._next(near)
                if at is not None:
                    heapq.heappush(heap, (at, near))
        return tuple(map(tuple, self.orders))

    def _next(self, stage: int) -> float | None:
        """When the stage next has something to do, as far as is known; None if nothing is."""
        done, free = self.done[stage], self.free[stage]
        if done["backward_weight"] < done["backward_input"]:
            return free
        arrivals: list[float] = []
        if done["backward_input"] < len(self.gradients[stage]):
            arrivals.append(self.gradients[stage][done["backward_input"]])
        if self._may_forward(stage) and done["forward"] < len(self.inputs[stage]):
            arrivals.append(self.inputs[stage][done["forward"]])
        return max(free, min(arrivals)) if arrivals else None

    def _may_forward(self, stage: int) -> bool:
        done = self.done[stage]
        f = done["forward"]
        return (
            f < self.count
            and f - done["backward_input"] < self.ahead[stage]
            and f - done["backward_weight"] < self.kept[stage]
        )

    def _choice(self, stage: int, now: float) -> OpKind:
        done = self.done[stage]
        gradients, inputs = self.gradients[stage], self.inputs[stage]
        if done["backward_input"] < len(gradients) and gradients[done["backward_input"]] <= now:
            return "backward_input"
        here = done["forward"] < len(inputs) and inputs[done["forward"]] <= now
        return "forward" if here and self._may_forward(stage) else "backward_weight"

    def _take(self, stage: int, kind: OpKind, now: float) -> None:
        micro_batch = self.done[stage][kind]
        seconds = self.stages[stage]
        end = now + {"forward": seconds.forward_s, "backward_input": seconds.input_s}.get(
            kind, seconds.weight_s
        )
        self.orders[stage].append(Op(kind, micro_batch))
        self.done[stage][kind] += 1
        self.free[stage] = end
        if kind == "forward":
            if stage + 1 < len(self.stages):
                self.inputs[stage + 1].append(self._sent(0, stage, self.forth[stage], end))
            else:
                self.gradients[stage].append(end)
        elif kind == "backward_input" and stage > 0:
            self.gradients[stage - 1].append(self._sent(1, stage - 1, self.back[stage - 1], end))

    def _sent(self, way: int, link: int, hop: Hop, now: float) -> float:
        """When a message that leaves now has arrived; messages of one direction follow each other."""
        passed = max(now, self.links_free[way][link]) + hop.busy_s
        self.links_free[way][link] = passed
        return passed + hop.latency_s
