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

from spanwise.planner.groups import Groups
from spanwise.planner.lanes import Group
from spanwise.planner.problem import Problem
from spanwise.planner.search import Search, runs_of

MOST_ORDERS = 120  # scored in one search
MOST_STARTS = 12
KEPT_ORDERS = 4
MOST_IN_GROUP = 6
JUMP = 1.5  # ratio of neighbouring link rates that parts clusters


def searched_orders(groups: Groups, *, singles: bool) -> list[Search]:
    """The searches of the best orders met, best first; on a second grid only those of the first."""
    most = 1 if singles else MOST_IN_GROUP
    known = groups.problem.memo.orders.get(singles)
    if known is not None:
        return [Search(groups, runs_of(order, most)) for order in known]
    scored: dict[Group, tuple[float, Search]] = {}

    def score(order: Group) -> float:
        if order not in scored:
            search = Search(groups, runs_of(order, most))
            found = search.found()
            scored[order] = (found[0].price_s if found else float("inf"), search)
        return scored[order][0]

    budget = max(12, MOST_ORDERS * 10 // len(groups.problem.cluster.devices) - 60)
    starts = sorted(islice(starting_orders(groups.problem), MOST_STARTS), key=score)
    for start in starts[:2]:
        order, moved = start, True
        while moved and len(scored) < budget:
            near = list(islice(neighbours(order), max(0, budget - len(scored))))
            best = min(near, key=score, default=order)
            moved = score(best) < score(order) * (1 - 1e-9)
            order = best if moved else order
    best = sorted(scored, key=lambda order: scored[order][0])[:KEPT_ORDERS]
    groups.problem.memo.orders[singles] = tuple(best)
    return [scored[order][1] for order in best]


def neighbours(order: Group) -> Iterator[Group]:
    """Orders with two devices exchanged or one moved elsewhere; near exchanges first."""
    count = len(order)
    for distance in range(1, count):
        for i in range(count - distance):
            j = i + distance
            yield (*order[:i], order[j], *order[i + 1 : j], order[i], *order[j + 1 :])
            if distance > 1:
                rest = order[:i] + order[i + 1 :]
                yield (*rest[:j], order[i], *rest[j:])
                rest = order[:j] + order[j + 1 :]
                yield (*rest[:i], order[j], *rest[i:])


def starting_orders(problem: Problem) -> Iterator[Group]:
    """Permutations of link clusters, each cluster by memory downwards or by speed upwards."""
    clusters = link_clusters(problem)
    tables = problem.tables
    slowness = (tables.forward + tables.backward)[:, -1, -1]

    def sorted_by(cluster: Group, by_memory: bool) -> Group:
        key = -tables.budget if by_memory else -slowness
        return tuple(sorted(cluster, key=lambda d: (float(key[d]), d)))

    seen: set[Group] = set()
    alike = ((True,) * len(clusters), (False,) * len(clusters))
    for ways in (alike, product((True, False), repeat=len(clusters))):
        for order, chosen in product(permutations(clusters), ways):
            flat = tuple(d for c, way in zip(order, chosen, strict=True) for d in sorted_by(c, way))
            if flat not in seen:
                seen.add(flat)
                yield flat


def link_clusters(problem: Problem) -> list[Group]:
    """Single linkage over the links above the largest jump in rates; one cluster without a clear jump."""
    routes = problem.links.routes
    count = len(routes)
    rate = np.zeros((count, count))
    for a in range(count):
        for b in range(count):
            forth, back = routes[a][b], routes[b][a]
            if a != b and forth is not None and back is not None:
                rate[a, b] = min(forth.bandwidth_bytes_per_s, back.bandwidth_bytes_per_s)
    known = np.unique(rate[rate > 0])
    if len(known) < 2 or np.max(known[1:] / known[:-1]) < JUMP:
        return [tuple(range(count))]
    least = known[int(np.argmax(known[1:] / known[:-1])) + 1]
    cluster = list(range(count))
    for a in range(count):
        for b in range(count):
            if rate[a, b] >= least and cluster[a] != cluster[b]:
                old, new = max(cluster[a], cluster[b]), min(cluster[a], cluster[b])
                cluster = [new if c == old else c for c in cluster]
    return [tuple(d for d in range(count) if cluster[d] == c) for c in sorted(set(cluster))]
