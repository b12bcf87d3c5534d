"""What the published planners know of devices and links, and the cost formula as it was published.

Spec of the formula: Asteroid (Ye et al., MobiCom 2024), read from two unofficial re-implementations; DAPPLE's
(Fan et al., PPoPP 2021, section 4) is of the same form. A plan is a list of steps c: compute, link, compute,
..., each with seconds ``Ef``, ``Eb`` a micro-batch and ``Ta`` once, its gradient sum:

    dominant  dm = argmax over c of M * (Ef_c + Eb_c) + sum over i < c of (Ef_i + Eb_i),   its value: G
    round     max over s of Tw_s + Te_s + Ta_s  =  G + max(0, max over s of Ta_s - sum over i < s of Eb_i)

None of the corrections of ``price.py`` is in it: a link is busy with activations and gradients in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from spanwise.cost.training import ring_edge_bytes, ring_rounds
from spanwise.planner.facts.lanes import Group
from spanwise.planner.facts.tables import Floats
from spanwise.planner.problem import Problem

NO_LINK_S = 1e30  # in place of infinity: sums and products with 0 stay numbers


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds per byte and latency of the slowest pair; ``NO_LINK_S`` where a link is missing."""

    s_per_byte: float
    latency_s: float


def slowest_pair(problem: Problem, group: Group, other: Group) -> Pace:
    """Of all pairs of unlike devices of two groups, both ways; free if there is none."""
    slowest, farthest = 0.0, 0.0
    for a, b in product(group, other):
        if a == b:
            continue
        for route in (problem.links.route(a, b), problem.links.route(b, a)):
            if route is None:
                return Pace(NO_LINK_S, NO_LINK_S)
            slowest = max(slowest, 1 / route.bandwidth_bytes_per_s)
            farthest = max(farthest, route.latency_s)
    return Pace(slowest, farthest)


def ring_pace(problem: Problem, group: Group) -> Pace:
    """Of a gradient sum by a ring of the group: ``2(n-1)/n`` of the bytes, ``2(n-1)`` latencies."""
    slowest, count = slowest_pair(problem, group, group), len(group)
    if count < 2 or slowest.s_per_byte >= NO_LINK_S:
        return slowest
    return Pace(ring_edge_bytes(count, 1.0) * slowest.s_per_byte, ring_rounds(count) * slowest.latency_s)


def mean_times(problem: Problem) -> tuple[Floats, Floats]:
    """Forward and backward of the mean device ``[layer, rows]``, prefix-summed over layers.

    For planners whose papers assume equal devices: seconds are averaged over all devices of the cluster.
    """
    tables = problem.tables
    return tables.forward.mean(), tables.backward.mean()


def mean_rate(problem: Problem) -> float:
    """Bytes per second of the mean link: over all ordered pairs that are joined; infinite for one device."""
    pairs = permutations(range(len(problem.cluster.devices)), 2)
    routes = (problem.links.route(a, b) for a, b in pairs)
    found = [route.bandwidth_bytes_per_s for route in routes if route is not None]
    return float(np.mean(found)) if found else float("inf")
