"""Exhaustive search over small clusters: every order of groups, every cut, every number of micro-batches.

Independent of the planner's dynamic programme: nothing is dropped on the way. All plans are priced by the
formula of ``plans.price`` at typical rows; the cheapest of every number of stages are built with their
own rows and priced again; the best of those are simulated with both warm-up rules. Rows of a stage are
those of ``min_max_rows``, which is exact against brute force (tests/unit/test_planner_rows.py).

That is the space of orders, groups, cuts and rows. ``hpp`` has more: backward passes in halves, layers that
run again, sums in segments. So that it is not compared with less than it may use itself, the fastest plans
are then tried with all of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.bubble import zero_bubble_variants
from spanwise.planner.plans.build import Depth, build
from spanwise.planner.plans.price import price
from spanwise.planner.plans.trial import seconds_of
from spanwise.planner.plans.variants import recomputed, segmented
from spanwise.planner.problem import Problem
from spanwise.planner.search.groups import INFEASIBLE_S, Groups

Group = tuple[int, ...]
Floats = NDArray[np.float64]
PRICED = 150  # outlines of every number of stages that are built and priced exactly
SIMULATED = 25  # plans of every number of stages that are simulated, and as many of all
FINISHED = 24  # the fastest of these are tried with halves, layers that run again and segments
FINALISTS = 4  # of a plan's variants, tried in segments
DEPTHS: tuple[Depth, ...] = ("deep", "shallow")
NONE = float("inf")


@dataclass(frozen=True)
class Best:
    """The least step time by simulation, without and with halves, layers that run again and segments, and the
    least price; infinite without a plan.
    """

    simulated_s: float
    finished_s: float
    price_s: float
    plan: Plan | None
    looked_at: int


def sequences(devices: Group) -> Iterator[tuple[Group, ...]]:
    """Every sequence of disjoint, not empty groups; devices may be left out."""
    for count in range(1, len(devices) + 1):
        for head in combinations(devices, count):
            yield (head,)
            rest = tuple(d for d in devices if d not in head)
            yield from ((head, *tail) for tail in sequences(rest))


def exhaustive(problem: Problem, *, everything: bool = False) -> Best:
    """The best plan there is. ``everything`` simulates all of them, which takes minutes for 4 devices."""
    layers = len(problem.graph)
    groups = Groups(problem, tuple(range(layers + 1)), problem.micro_batch_choices(), 1)
    rough: dict[int, list[tuple[float, Outline]]] = {}
    looked_at = 0
    for sequence in sequences(tuple(range(len(problem.cluster.devices)))):
        if len(sequence) > layers:
            continue
        edges = _edges(layers, len(sequence))
        prices = _prices(groups, sequence, edges)
        looked_at += prices.size
        kept = rough.setdefault(len(sequence), [])
        flat = prices.ravel()
        few = flat.size if everything else min(PRICED, flat.size)
        for at in np.argpartition(flat, few - 1)[:few] if few < flat.size else range(flat.size):
            if flat[at] < INFEASIBLE_S:
                m, c = divmod(int(at), len(edges))
                spans = tuple(
                    Span(int(a), int(b), g)
                    for a, b, g in zip(edges[c][:-1], edges[c][1:], sequence, strict=True)
                )
                kept.append((float(flat[at]), Outline(groups.micro_batches[m], spans)))
        if len(kept) > 4 * PRICED and not everything:
            kept.sort(key=lambda entry: entry[0])
            del kept[PRICED:]
    return _decide(problem, rough, everything, looked_at)


def _edges(layers: int, stages: int) -> NDArray[np.int64]:
    inner = list(combinations(range(1, layers), stages - 1))
    return np.array([(0, *cut, layers) for cut in inner], dtype=np.int64)


def _prices(groups: Groups, sequence: tuple[Group, ...], edges: NDArray[np.int64]) -> Floats:
    """``[M, cuts]`` round time by formula, ``price.round_s`` written out over arrays."""
    problem, lanes = groups.problem, groups.problem.lanes
    counts = np.array(groups.micro_batches, dtype=np.float64)[:, None]
    rows = problem.job.batch / counts
    tables = problem.tables
    before = np.zeros((len(counts), len(edges)))
    most, exposed, supply = np.zeros_like(before), np.zeros_like(before), np.zeros_like(before)
    barrier = problem.job.clip_norm is not None
    source = lanes.inputs(sequence[0])
    none = np.full_like(before, INFEASIBLE_S)
    if source is None or not lanes.gets_labels(sequence[-1]):
        return none
    raw = rows * problem.graph.input_row_bytes * source.s_per_byte
    if set(source.senders) & {d for group in sequence for d in group}:
        fill = raw + source.latency_s if source.s_per_byte else 0 * raw
        most = np.maximum(most, (counts - 1) * raw + fill)
        before = before + fill
    else:
        supply = counts * raw + supply
    for number, group in enumerate(sequence):
        start, stop = edges[:, number], edges[:, number + 1]
        times = groups.times(group)
        both, back = times.both[:, start, stop], times.backward[:, start, stop]
        exposed = np.maximum(exposed, times.sum_s[start, stop][None] - before)
        most = np.maximum(most, counts * both + before)
        before = before + (back if barrier else both)
        if number + 1 == len(sequence):
            break
        ways = lanes.between(group, sequence[number + 1])
        if ways is None:
            return none
        out = rows * tables.into[stop][None] * ways[0].s_per_byte
        into = rows * tables.back[stop][None] * ways[1].s_per_byte
        total = out + into + ways[0].latency_s + ways[1].latency_s
        most = np.maximum(most, (counts - 1) * np.maximum(out, into) + total + before)
        before = before + total
    return np.maximum(most + exposed, supply)


def _decide(
    problem: Problem, rough: dict[int, list[tuple[float, Outline]]], everything: bool, looked_at: int
) -> Best:
    priced: dict[int, list[tuple[float, Plan]]] = {}
    for stages, entries in rough.items():
        entries.sort(key=lambda entry: entry[0])
        for _, outline in entries if everything else entries[:PRICED]:
            for depth in DEPTHS if stages > 1 else DEPTHS[:1]:
                try:
                    plan = build(problem, "exhaustive", outline, depth=depth)
                except InfeasibleError:
                    continue
                priced.setdefault(stages, []).append((price(problem, plan).step_time_s, plan))
    chosen: dict[Plan, float] = {}
    flat = [entry for entries in priced.values() for entry in entries]
    for entries in (flat, *priced.values()):
        few = len(entries) if everything else 2 * SIMULATED
        chosen.update({plan: p for p, plan in sorted(entries, key=lambda entry: entry[0])[:few]})
    timed = sorted((seconds(problem, plan), n) for n, plan in enumerate(chosen))
    plans = list(chosen)
    ranked = [(s, plans[n]) for s, n in timed if s < NONE]
    best, winner = ranked[0] if ranked else (NONE, None)
    least = min((entry[0] for entry in flat), default=NONE)
    return Best(best, finished_s(problem, [plan for _, plan in ranked[:FINISHED]]), least, winner, looked_at)


def seconds(problem: Problem, plan: Plan) -> float:
    """Simulated step time; infinite if memory or orders allow none."""
    found = seconds_of(problem, plan)
    return NONE if found is None else found


def finished_s(problem: Problem, plans: list[Plan]) -> float:
    """The least simulated step time of all variants of the plans."""
    least = NONE
    for plan in plans:
        whole = dict.fromkeys((plan, recomputed(problem, [plan])))
        variants = [v for w in whole for v in (w, *zero_bubble_variants(problem, w))]
        for variant in sorted(variants, key=lambda v: seconds(problem, v))[:FINALISTS]:
            least = min(least, seconds(problem, variant))
            if variant.syncs and least < NONE:
                least = min(least, seconds(problem, segmented(problem, [variant])))
    return least
