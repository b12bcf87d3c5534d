"""Zero bubble: backward in two halves, the weight half fills the waits.

Qi, Wan, Huang and Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024 (arXiv 2401.10241). ``zb_h1`` is their
hand-made schedule; ``zero_bubble`` is our own list scheduler for unequal stages and links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from spanwise.core.order import Op


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
    together: int = 1,
    held_back: bool = False,
    joined_s: Sequence[Callable[[int], float]] = (),
) -> tuple[tuple[Op, ...], ...]:
    """The order of every stage, by list scheduling in virtual time.

    When stage p is free it takes the input half of the next micro-batch whose gradient has arrived; else the
    next forward whose input has arrived, while fewer than ``ahead[p]`` forwards have no input half and fewer
    than ``kept[p]`` no weight half; else the oldest weight halves, up to ``together`` at once; else it waits.
    So a stage that is always busy takes none before ``kept[p]`` asks for it, and then many. If they are
    ``held_back`` a stage waits rather than to take any before ``kept[p]`` asks for it or all input halves are
    done.

    Args:
        micro_batches: M.
        stages: seconds a micro-batch; of replicas those of the slowest.
        forth: links behind each stage but the last, towards the end.
        back: the same links, towards the front.
        ahead: K1, at least 1.
        kept: K2, at least 1; what memory allows.
        together: at least 1.
        held_back: so that weight halves come together.
        joined_s: by stage, seconds of so many weight halves at once; without it as many times those of one.
    """
    found: list[_Stage] = [
        _Stage(seconds, most, held, None, None, together, held_back, several)
        for seconds, most, held, several in zip(
            stages, ahead, kept, joined_s or (None,) * len(stages), strict=True
        )
    ]
    for before, after, out, into in zip(found, found[1:], forth, back, strict=False):
        before.forth, after.back = _Link(out, after.inputs), _Link(into, before.gradients)
    found[0].inputs += [0.0] * micro_batches
    return _scheduled(found, micro_batches)


@dataclass(slots=True)
class _Stage:
    """Where a stage is in virtual time; arrivals are known as soon as what causes them is decided.

    ``inputs`` and ``gradients`` have arrivals by micro-batch, ``forwards``, ``halves`` and ``weights`` count
    what is done of each kind.
    """

    seconds: StageSeconds
    ahead: int
    kept: int
    forth: _Link | None
    back: _Link | None
    together: int
    held_back: bool
    joined_s: Callable[[int], float] | None
    free: float = 0.0
    forwards: int = 0
    halves: int = 0
    weights: int = 0
    inputs: list[float] = field(default_factory=list[float])
    gradients: list[float] = field(default_factory=list[float])
    order: list[Op] = field(default_factory=list[Op])

    def due(self, micro_batches: int) -> float | None:
        """When it next has something to do, as far as is known; None if nothing is."""
        if self.weights < self.halves and (not self.held_back or self.halves == micro_batches):
            return self.free
        first = None
        if self.halves < len(self.gradients):
            first = self.gradients[self.halves]
        if self.forwards < len(self.inputs) and (
            self.may_forward(micro_batches) or self.must_free(micro_batches)
        ):
            arrival = self.inputs[self.forwards]
            if first is None or arrival < first:
                first = arrival
        if first is None or first > self.free:
            return first
        return self.free

    def may_forward(self, micro_batches: int) -> bool:
        """Whether the limits allow one more forward."""
        done = self.forwards
        return done < micro_batches and done - self.halves < self.ahead and done - self.weights < self.kept

    def must_free(self, micro_batches: int) -> bool:
        """Whether the next forward waits for nothing but a weight half that is held back."""
        done = self.forwards
        held = done - self.weights >= self.kept and self.weights < self.halves
        return held and done < micro_batches and done - self.halves < self.ahead

    def one_by_one(self, count: int) -> float:
        """Seconds of so many weight halves."""
        return count * self.seconds.weight_s

    def take(self, now: float, micro_batches: int) -> None:
        """Decides what to do now."""
        if self.halves < len(self.gradients) and self.gradients[self.halves] <= now:
            self.free = now + self.seconds.input_s
            self.order.append(Op("backward_input", self.halves))
            self.halves += 1
            if self.back is not None:
                self.back.send(self.free)
        elif (
            self.forwards < len(self.inputs)
            and self.inputs[self.forwards] <= now
            and self.may_forward(micro_batches)
        ):
            self.free = now + self.seconds.forward_s
            self.order.append(Op("forward", self.forwards))
            self.forwards += 1
            if self.forth is None:
                self.gradients.append(self.free)
            else:
                self.forth.send(self.free)
        else:
            count = min(self.halves - self.weights, self.together)
            self.free = now + (self.joined_s or self.one_by_one)(count)
            self.order += [Op("backward_weight", self.weights + i) for i in range(count)]
            self.weights += count


@dataclass(slots=True)
class _Link:
    """One direction of a link; messages follow each other."""

    hop: Hop
    arrivals: list[float]
    free: float = 0.0

    def send(self, now: float) -> None:
        """A message that leaves now."""
        self.free = max(now, self.free) + self.hop.busy_s
        self.arrivals.append(self.free + self.hop.latency_s)


def _scheduled(stages: Sequence[_Stage], micro_batches: int) -> tuple[tuple[Op, ...], ...]:
    """One decision after the other, always the earliest, so that none misses an arrival before it."""
    last = len(stages) - 1
    due = [stage.due(micro_batches) for stage in stages]
    heap = [(at, number) for number, at in enumerate(due) if at is not None]
    heapify(heap)
    while heap:
        now, number = heappop(heap)
        if due[number] != now:
            continue  # decided meanwhile, or due earlier since
        stages[number].take(now, micro_batches)
        for near in range(max(number - 1, 0), min(number + 1, last) + 1):
            at = stages[near].due(micro_batches)
            if at is not None and (at != due[near] or near == number):
                heappush(heap, (at, near))
            due[near] = at
    return tuple(tuple(stage.order) for stage in stages)
