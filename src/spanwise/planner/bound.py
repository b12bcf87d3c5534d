"""A lower bound on the step time of any plan of a problem, in the simulator's model, and why it is one.

Write x[d][l] for the part of the batch's G rows that device d takes through layer l, t[d][l] for the seconds
of all G rows there at d's best rows per micro-batch (``rates.py``), T for the step time. Over many steps no
device is busy, and no capacity of the network is used, for longer than the steps take. So for every plan

    sum over d of x[d][l] = 1,        sum over l of x[d][l] * t[d][l] <= T.

**Compute.** For any weights w >= 0 with sum 1: T >= sum over d, l of w[d] x[d][l] t[d][l] >= sum over l of
min over d of w[d] t[d][l] (weak duality), so that every w gives a bound; a good w is sought by mirror ascent.

**Links.** Take blocks of devices (sites, single devices, one site and the rest) and what can enter and leave
block b a second (``crossing.py``), c_in and c_out. A row is *whole* in b if b takes it through all layers.

- Is a row whole in b and another in another block, every parameter is held in both. Rings sum its gradient,
  each
  sends at least its bytes over every edge, and enters and leaves b: T >= parameter bytes / min(c_in, c_out).
- Every other row with a layer in b crosses its border at a cut: activations one way, their gradient the
  other. So
  if no row is whole in b, x[b][l] * G * min over cuts of (activation + gradient) <= T * (c_in + c_out).
- Raw rows start on the data devices: layer 0 of b may take at most T * c_in / bytes a row more rows than
  start
  there, and at most T * c_out / bytes a row fewer.

So at a given T either one block b0, or only blocks with T >= parameter bytes / min(c_in, c_out), may have
whole rows; the others have x[b][l] <= q_b(T). With these caps the sum over l of the least sum over d of w[d]
x[d][l] t[d][l] is again a bound by weak duality. It falls as T grows, so T is refuted, and with it all less,
if it is above T for every b0. The bound is the greatest T refuted.

What is left out makes it weaker, not wrong: the bubble of the pipeline, that layers of a stage stand
together, latencies, the cost of messages, sums of gradients inside a block, memory beyond single layers. It
is one on the mean of the steps from the start on; the simulator's distance between the ends of its last two
steps is that in steady state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spanwise.planner.crossing import Block, blocks_of, partitions
from spanwise.planner.problem import Problem
from spanwise.planner.rates import IMPOSSIBLE_S, least_seconds
from spanwise.planner.tables import Floats

ASCENTS = 200  # mirror ascent for the compute bound
ASCENTS_AT_T = 40  # and for every T tried
BISECTIONS = 24


@dataclass(frozen=True, slots=True)
class Bound:
    """No plan is faster.

    Attributes:
        step_time_s: the bound.
        compute_s: the part of it that holds whatever the links and, beyond single layers, the memory.
        term: what binds, in words.
    """

    step_time_s: float
    compute_s: float
    term: str

    def gap(self, step_time_s: float) -> float:
        """By which part a step time is above the bound."""
        return step_time_s / self.step_time_s - 1 if self.step_time_s > 0 else float("inf")


def lower_bound(problem: Problem) -> Bound:
    """The greatest of the bounds by compute and by the links between blocks."""
    seconds = least_seconds(problem)
    compute_s = compute_bound(seconds)
    best = Bound(
        compute_s, compute_s, f"compute on all {len(seconds)} devices" if len(seconds) > 1 else "compute"
    )
    for name, groups in partitions(problem):
        blocks = blocks_of(problem, groups)
        refuted = _greatest_refuted(seconds, blocks, best.step_time_s)
        if refuted > best.step_time_s:
            tight = _tightest(seconds, blocks, refuted)
            best = Bound(refuted, compute_s, f"{name}, above all what crosses {tight}")
    return best


def compute_bound(seconds: Floats) -> float:
    """Seconds no division of the rows over devices can beat; ``[device, layer]`` seconds of the whole batch."""
    weights, best = _start(seconds), 0.0
    layer = np.arange(seconds.shape[1])
    for n in range(ASCENTS):
        who = (weights[:, None] * seconds).argmin(axis=0)
        best = max(best, float((weights[who] * seconds[who, layer]).sum()))
        weights = _ascended(weights, np.bincount(who, seconds[who, layer], len(seconds)), n)
    return best


def _start(seconds: Floats) -> Floats:
    """Weights by the speed on the whole model: the best ones where devices differ by a factor only."""
    possible = seconds < IMPOSSIBLE_S
    mean = np.where(possible, seconds, 0.0).sum(axis=1) / np.maximum(possible.sum(axis=1), 1)
    speed = possible.any(axis=1) / np.maximum(mean, 1e-12)
    return speed / speed.sum() if speed.any() else np.full(len(seconds), 1 / len(seconds))


def _ascended(weights: Floats, loads: Floats, n: int) -> Floats:
    """One step of mirror ascent: more weight where more seconds fell, by smaller and smaller steps."""
    most = loads.max()
    if most <= 0:
        return weights
    grown = weights * np.exp(0.5 / np.sqrt(n + 1.0) * loads / most)
    return grown / grown.sum()


def _greatest_refuted(seconds: Floats, blocks: Sequence[Block], known: float) -> float:
    """The greatest T, to a part in 1000, that these blocks refute; ``known`` if they refute no more."""
    if not _refutes(seconds, blocks, known * 1.001):
        return known
    low, high = known * 1.001, known * 2
    while high < IMPOSSIBLE_S and _refutes(seconds, blocks, high):
        low, high = high, high * 4
    for _ in range(BISECTIONS):
        if high <= low * 1.001:
            break
        middle = (low * high) ** 0.5
        if _refutes(seconds, blocks, middle):
            low = middle
        else:
            high = middle
    return low


def _refutes(seconds: Floats, blocks: Sequence[Block], at_s: float) -> bool:
    """Whether no plan can take ``at_s`` seconds: whichever block has rows that are whole in it."""
    open_ = [at_s >= block.sum_s for block in blocks]
    return all(
        _least(seconds, blocks, at_s, whole=[o or i == b0 for i, o in enumerate(open_)]) > at_s
        for b0 in range(len(blocks))
    )


def _least(seconds: Floats, blocks: Sequence[Block], at_s: float, *, whole: Sequence[bool]) -> float:
    """Weighted seconds that any plan needs if only these blocks may have whole rows; infinite if none can be."""
    layers = seconds.shape[1]
    caps = np.ones((len(blocks), layers))
    floors = np.zeros((len(blocks), layers))
    for i, block in enumerate(blocks):
        if not whole[i]:
            caps[i] = min(1.0, at_s / block.row_s) if block.row_s > 0 else 1.0
        caps[i, 0] = min(caps[i, 0], block.most_here + at_s / block.raw_in_s if block.raw_in_s > 0 else 1.0)
        floors[i, 0] = max(0.0, block.least_here - at_s / block.raw_out_s if block.raw_out_s > 0 else 0.0)
    if (
        (caps.sum(axis=0) < 1 - 1e-9).any()
        or (floors > caps + 1e-9).any()
        or (floors.sum(axis=0) > 1 + 1e-9).any()
    ):
        return float("inf")
    weights, best = _start(seconds), 0.0
    for n in range(ASCENTS_AT_T):
        value, loads = _filled(seconds, blocks, weights, caps, floors)
        best = max(best, value)
        if best > at_s:
            break
        weights = _ascended(weights, loads, n)
    return best


def _filled(
    seconds: Floats, blocks: Sequence[Block], weights: Floats, caps: Floats, floors: Floats
) -> tuple[float, Floats]:
    """Every layer's rows to the blocks where they weigh least, within caps and floors: the least sum,
    exactly.

    Returns:
        The sum, and the seconds that fall on every device.
    """
    weighted = weights[:, None] * seconds
    layer = np.arange(seconds.shape[1])
    who = np.stack([np.array(b.devices)[weighted[list(b.devices)].argmin(axis=0)] for b in blocks])
    cost = weighted[who, layer]
    order = np.argsort(cost, axis=0, kind="stable")
    room = np.take_along_axis(caps - floors, order, axis=0)
    left = 1.0 - floors.sum(axis=0)
    taken = np.clip(left - (np.cumsum(room, axis=0) - room), 0.0, room)
    share = floors.copy()
    np.put_along_axis(share, order, np.take_along_axis(floors, order, axis=0) + taken, axis=0)
    loads = np.zeros(len(seconds))
    np.add.at(loads, who, share * seconds[who, layer])
    return float((share * cost).sum()), loads


def _tightest(seconds: Floats, blocks: Sequence[Block], at_s: float) -> str:
    """The block whose border, were it free, would lower the bound most."""

    def without(index: int) -> float:
        some = [b.freed() if i == index else b for i, b in enumerate(blocks)]
        return min(
            _least(seconds, some, at_s, whole=[i == b0 or at_s >= b.sum_s for i, b in enumerate(some)])
            for b0 in range(len(some))
        )

    return blocks[min(range(len(blocks)), key=without)].name
