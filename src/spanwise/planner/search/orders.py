"""Many devices: dynamic programming along a device order, and a local search over the orders.

The dynamic programme along an order is Asteroid's (Ye et al., MobiCom 2024; read from re-implementations), as
is the order by memory. Searching the orders is our own: link clusters in every order, each by memory
downwards or by speed upwards, then moves of one device and exchanges of two as long as they help. Link
clusters are SpanTrain's idea (Wang, Liu et al., Big Data Research 2025), the rule that makes them is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, permutations, product

import numpy as np

from spanwise.planner.facts.kinds import Group, by_kind
from spanwise.planner.problem import Problem
from spanwise.planner.search.extensions import along
from spanwise.planner.search.grid import coarse_cuts
from spanwise.planner.search.groups import Groups
from spanwise.planner.search.sequences import Sequence, Sequences, chains
from spanwise.planner.search.sets import Search

MOST_STARTS, MOST_SINGLE_STARTS = 3, 8  # orders, of groups and of single devices
IMPROVED = 3  # best sequences of groups from which a local search starts
MOST_MOVES, MOVES_EFFORT = 300, 40_000  # tried from each, of all and by devices
FOUND = 12  # sequences along an order that are looked at again
KEPT_SEQUENCES = 32
ALL_CLUSTERS = 3  # up to here link clusters in every order
ROUGH_CUTS = 20  # grid on which orders and sequences are compared
MOST_HEADS = 8  # of a state that are looked at: fewer is faster, more is nearer to exact
JUMP = 1.5  # ratio of neighbouring link rates that parts clusters


def many_devices(groups: Groups, *, singles: bool, deep: bool = False) -> list[Search]:
    """A search of the best sequences of groups that were met along orders and near them."""
    problem = groups.problem
    key = (singles, groups.halves)
    known = problem.memo.sequences.get(key)
    if known is not None:
        return [Search(groups, chains(problem, known, deep=deep))]
    counts = _few_counts(problem)
    most = 1 if singles else problem.job.batch // counts[0]
    rough = Groups(problem, coarse_cuts(problem.tables, ROUGH_CUTS), counts, groups.in_flight, groups.halves)
    sequences = Sequences(rough)

    def look_along(order: Group) -> Sequence | None:
        search = Search(rough, along(order, problem.kinds, most), most_heads=MOST_HEADS)
        met = [tuple(s.group for s in search.outline(f).spans) for f in search.found()[:FOUND]]
        return min(met, key=sequences.price_s, default=None)

    for order in islice(starting_orders(problem), MOST_SINGLE_STARTS if singles else MOST_STARTS):
        look_along(order)
    budget = min(MOST_MOVES, max(10, MOVES_EFFORT // len(problem.kinds)))
    for start in sequences.best(IMPROVED, 1):
        better: Sequence | None = start
        while better is not None:
            near = sequences.improve(better, budget, singles=singles)
            found = look_along(_as_order(problem, near))
            gains = found is not None and sequences.price_s(found) < sequences.price_s(near) * (1 - 1e-6)
            better = found if gains else None
    best = problem.memo.sequences[key] = sequences.best(KEPT_SEQUENCES, 3)
    return [Search(groups, chains(problem, best, deep=deep))]


def _as_order(problem: Problem, sequence: Sequence) -> Group:
    """Its devices as they follow each other, then those that it leaves out, fastest first."""
    used = tuple(d for group in sequence for d in group)
    slowness = problem.tables.both[:, -1, -1]
    left = set(range(len(problem.kinds))).difference(used)
    return (*used, *sorted(left, key=lambda d: (float(slowness[d]), problem.kinds[d], d)))


def _few_counts(problem: Problem) -> tuple[int, ...]:
    """Most micro-batches, as pipelines of many stages need; a middling number, and two, for large groups."""
    counts = problem.micro_batch_choices()
    return tuple(sorted({counts[min(1, len(counts) - 1)], counts[len(counts) // 3], *counts[-3:]}))


def starting_orders(problem: Problem) -> Iterator[Group]:
    """Link clusters in several orders, each cluster by memory downwards or by speed upwards or downwards."""
    clusters = link_clusters(problem)
    tables = problem.tables
    slowness = tables.both[:, -1, -1]
    keys = (-tables.budget, -slowness, slowness)

    def sorted_by(cluster: Group, way: int) -> Group:
        return tuple(sorted(cluster, key=lambda d: (float(keys[way][d]), problem.kinds[d], d)))

    orders = list(permutations(clusters)) if len(clusters) <= ALL_CLUSTERS else _chains(problem, clusters)
    ways = [(way,) * len(clusters) for way in range(len(keys))]
    if len(clusters) <= ALL_CLUSTERS:
        ways += list(product(range(len(keys)), repeat=len(clusters)))
    seen: set[Group] = set()
    for chosen, order in product(ways, orders):
        flat = tuple(d for c, way in zip(order, chosen, strict=True) for d in sorted_by(c, way))
        if flat not in seen:
            seen.add(flat)
            yield flat


def _chains(problem: Problem, clusters: list[Group]) -> list[tuple[Group, ...]]:
    """Many clusters: those with data first, then whichever is linked best; the strongest first; both back."""
    held = {problem.index[source] for source in problem.sources}
    slowness = problem.tables.both[:, -1, -1]
    power = {c: float(np.sum(1.0 / np.maximum(slowness[list(c)], 1e-12))) for c in clusters}
    first = max(clusters, key=lambda c: (len(held.intersection(c)), power[c]))
    chain, left = [first], [c for c in clusters if c != first]
    while left:
        ahead = chain[-1]
        chain.append(max(left, key=lambda c: (_rate(problem, ahead[0], c[0]), power[c])))
        left.remove(chain[-1])
    strongest = sorted(clusters, key=lambda c: -power[c])
    return [tuple(chain), tuple(reversed(chain)), tuple(strongest), tuple(reversed(strongest))]


def link_clusters(problem: Problem) -> list[Group]:
    """Single linkage over the links above the largest jump in rates; one cluster without a clear jump.

    Devices with equal links stay together: two of them tell for all.
    """
    devices = range(len(problem.cluster.devices))
    alike = by_kind(problem.links.kinds, devices)
    count = len(alike)
    rate = np.zeros((count, count))
    for i, j in product(range(count), repeat=2):
        pair = next(((a, b) for a in alike[i][:2] for b in alike[j][:2] if a != b), None)
        if pair is not None:
            rate[i, j] = _rate(problem, *pair)
    known = np.unique(rate[rate > 0])
    if len(known) < 2 or np.max(known[1:] / known[:-1]) < JUMP:
        return [tuple(devices)]
    least = known[int(np.argmax(known[1:] / known[:-1])) + 1]
    cluster = list(range(count))
    for i, j in product(range(count), repeat=2):
        if rate[i, j] >= least and cluster[i] != cluster[j]:
            old, new = max(cluster[i], cluster[j]), min(cluster[i], cluster[j])
            cluster = [new if c == old else c for c in cluster]
    return sorted(
        tuple(sorted(d for i in range(count) if cluster[i] == c for d in alike[i])) for c in set(cluster)
    )


def _rate(problem: Problem, a: int, b: int) -> float:
    """Bytes per second of the slower way between two devices; 0 where one is missing."""
    forth, back = problem.links.route(a, b), problem.links.route(b, a)
    if forth is None or back is None:
        return 0.0
    return min(forth.bandwidth_bytes_per_s, back.bandwidth_bytes_per_s)
