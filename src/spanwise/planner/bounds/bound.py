"""A lower bound on the step time of any plan of a problem, in the simulator's model, and why it is one.

Over many steps no device is busy, and no capacity of the network used, for longer than the steps take. So if
a plan takes T seconds a step, every resource r (a device, the border of a block of devices outwards or
inwards) has ``load_r <= T``, and for any weights z >= 0 with sum 1 also ``sum of z_r load_r <= T``. Loads add
up row by row, and a row is a path: for every layer a device. So T is at least the batch's rows times the
cheapest path at prices z (weak duality): every z gives a bound, and a good one is sought by mirror ascent
(``paths.py``).

**Compute.** At z on devices alone the cheapest path takes every layer where it costs least:
T >= sum over layers of min over devices of z[d] t[d][l], with t the seconds of all rows at d's best rows per
micro-batch (``rates.py``).

**Links.** Blocks are sites, single devices, or some sites and the others (``crossing.py``). A path that goes
from a block to another at a cut sends activations over the border of both, gradients come back; raw rows and
labels go from the data devices to who computes the first and last layer. A path *whole* in a block crosses
nothing. But if a row is whole in block b and another in another block, each parameter is held in both, the
ring that sums its gradient enters and leaves b, with at least its bytes on each edge, or a push and a pull of
it do, wherever its server is: T >= s_b = parameter bytes / min(in, out). So below all s_b one block at most
has whole paths, whichever; at T only those with s_b <= T, and one more. The bound is the least over that one
block of the cheapest allowed paths, as far as T reaches.

What is left out makes it weaker, not wrong: the bubble of the pipeline, that a stage is consecutive layers
with the same rows, latencies, the cost of messages, sums of gradients inside a block and of few layers,
memory beyond single layers. It holds for the mean of the steps from the start on; the simulator's distance
between the ends of its last two steps is that mean in steady state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spanwise.planner.bounds.crossing import borders_of, partitions
from spanwise.planner.bounds.paths import cheapest_paths
from spanwise.planner.bounds.rates import IMPOSSIBLE_S, least_seconds
from spanwise.planner.facts.tables import Floats
from spanwise.planner.problem import Problem

ASCENTS = 200  # mirror ascent for the compute bound


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
    weights = speed_weights(seconds)
    compute_s = balanced_s(seconds, weights)
    count = len(seconds)
    best = Bound(compute_s, compute_s, f"compute on all {count} devices" if count > 1 else "compute")
    for name, groups in partitions(problem):
        borders = borders_of(problem, groups)
        at_s = best.step_time_s
        while True:
            open_ = borders.sum_s <= at_s
            least_s, tight = cheapest_paths(seconds, borders, open_, weights)
            later = float(np.min(borders.sum_s, where=~open_, initial=np.inf))
            if least_s <= at_s * (1 + 1e-9):
                break
            at_s = min(least_s, later)
            best = Bound(at_s, compute_s, f"{name}, most of all those of {tight}")
            if least_s < later:
                break
    return best


def compute_bound(problem: Problem) -> float:
    """Seconds that no plan can beat, whatever the links; from layer times alone."""
    seconds = least_seconds(problem)
    return balanced_s(seconds, speed_weights(seconds))


def balanced_s(seconds: Floats, weights: Floats) -> float:
    """Seconds that no division of the rows over devices can beat.

    Args:
        seconds: ``[device, layer]`` of the whole batch.
        weights: ``[device]`` to start from.
    """
    best, layer = 0.0, np.arange(seconds.shape[1], dtype=np.int64)
    for n in range(ASCENTS):
        who = (weights[:, None] * seconds).argmin(axis=0)
        best = max(best, float((weights[who] * seconds[who, layer]).sum()))
        loads = np.bincount(who, seconds[who, layer], len(seconds))
        weights = weights * np.exp(0.5 / np.sqrt(n + 1.0) * loads / max(float(loads.max()), 1e-300))
        weights /= weights.sum()
    return best


def speed_weights(seconds: Floats) -> Floats:
    """Weights by the speed on the whole model: the best ones where devices differ by a factor only.

    None is 0, or what a device cannot do would cost nothing there.
    """
    possible = seconds < IMPOSSIBLE_S
    mean = np.where(possible, seconds, 0.0).sum(axis=1) / np.maximum(possible.sum(axis=1), 1)
    speed = possible.any(axis=1) / np.maximum(mean, 1e-12)
    speed = np.maximum(speed, 1e-9 * max(float(speed.max()), 1e-12))
    return speed / speed.sum()
