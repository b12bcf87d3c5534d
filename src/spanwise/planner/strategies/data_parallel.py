"""Data parallelism: every device has the whole model and computes its rows of each micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner.facts.kinds import Group, by_kind
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.build import fixed_span
from spanwise.planner.plans.trial import Priced, fastest, priced, simulated
from spanwise.planner.plans.variants import segmented
from spanwise.planner.problem import Problem, largest_remainder
from spanwise.planner.search.extensions import END, Extension, all_subsets
from spanwise.planner.search.groups import Groups
from spanwise.planner.search.orders import link_clusters
from spanwise.planner.search.sets import Search

FINALISTS = 4
MOST_SETS = 32
MOST_PRICED = 64
ALL_SUBSETS = 8  # devices; beyond it the fastest few, then one device fewer or more as long as that helps
MOST_ROUNDS = 24
EVERY_SIZE = (
    16  # up to here sets of every size are tried, beyond it about so many from one doubling to the next
)


def data_parallel(problem: Problem) -> Plan:
    """Equal shares over all devices, as equal as integers allow; gradients by a ring (PyTorch DDP).

    With private data the replicas are the data devices with their own shares.

    Raises:
        InfeasibleError: the batch has too few rows for all devices, or memory is short on one of them.
    """
    if problem.first_is_fixed:
        return _over_sources(problem, "data_parallel")
    count = len(problem.cluster.devices)
    layers, everyone = len(problem.graph), tuple(range(count))
    outlines: list[Outline] = []
    for m in reversed(problem.micro_batch_choices(count)):
        rows = largest_remainder(problem.job.batch // m, (1.0,) * count)
        outlines.append(Outline(m, (Span(0, layers, everyone, rows),)))
    return segmented(problem, simulated(problem, priced(problem, "data_parallel", outlines), FINALISTS))


def weighted_data_parallel(problem: Problem) -> Plan:
    """Rows by speed and memory; devices that do not pay are left out (shares as in EDDL, SEC 2021).

    Raises:
        InfeasibleError: memory is short on every choice of devices.
    """
    if problem.first_is_fixed:
        return _over_sources(problem, "weighted_data_parallel")
    outlines = weighted_outlines(problem, 1) or weighted_outlines(problem, 0)
    pool = priced(problem, "weighted_data_parallel", leaders(outlines)[:MOST_SETS] + outlines[:MOST_PRICED])
    first: dict[frozenset[str], Priced] = {}
    for entry in pool:
        first.setdefault(frozenset(entry.plan.stages[0].devices), entry)
    try:
        best = fastest(problem, list(first.values()), FINALISTS)
    except InfeasibleError:  # the simulator found more bytes than the formula: other counts may need fewer
        return segmented(problem, simulated(problem, pool, FINALISTS))
    devices = frozenset(best.stages[0].devices)
    same = [entry for entry in pool if frozenset(entry.plan.stages[0].devices) == devices]
    return segmented(problem, simulated(problem, same, FINALISTS))


def leaders(outlines: list[Outline]) -> list[Outline]:
    """The first outline of every set of devices."""
    best: dict[Group, Outline] = {}
    for outline in outlines:
        best.setdefault(outline.spans[0].group, outline)
    return list(best.values())


def weighted_outlines(problem: Problem, in_flight: int) -> list[Outline]:
    """Data parallelism over sets of devices, cheapest by formula first."""
    key = f"weighted_data_parallel {in_flight}"
    if key not in problem.memo.outlines:
        problem.memo.outlines[key] = _weighted(problem, in_flight)
    return problem.memo.outlines[key]


def _weighted(problem: Problem, in_flight: int) -> list[Outline]:
    groups = Groups(problem, (0, len(problem.graph)), problem.micro_batch_choices(), in_flight)
    count = len(problem.cluster.devices)
    if count <= ALL_SUBSETS:
        subsets = all_subsets(tuple(range(count)), problem.kinds)
        return _of_sets(groups, [e.group for e in subsets if e.rest == END])
    tried = dict.fromkeys(_fastest_sets(problem, in_flight))
    best = _of_sets(groups, tried)
    for _ in range(MOST_ROUNDS if best else 0):
        near = [s for s in _one_apart(problem, best[0].spans[0].group) if s not in tried]
        tried.update(dict.fromkeys(near))
        found = _of_sets(groups, near)
        closer = bool(found) and found[0].price_s < best[0].price_s
        best = sorted(best + found, key=lambda o: o.price_s)
        if not closer:
            break
    return best


def _of_sets(groups: Groups, sets: Iterable[Group]) -> list[Outline]:
    search = Search(groups, [Extension(number, used) for number, used in enumerate(sets, 1)])
    return [search.outline(f) for f in search.found()]


def _fastest_sets(problem: Problem, in_flight: int) -> Iterator[Group]:
    """Every device alone; the fastest few of every link cluster, and of the first few clusters together."""
    tables, layers = problem.tables, np.array([len(problem.graph)])
    yield from ((own[0],) for own in by_kind(problem.kinds, range(len(problem.kinds))))
    slowness, none = tables.both[:, -1, -1], np.array([0])
    least = problem.least_rows(0, len(problem.graph))

    def able(device: int) -> bool:
        cap = tables.row_cap(device, none, layers, in_flight=in_flight, synced=True)
        return not in_flight or int(cap[0]) >= least

    clusters = link_clusters(problem)
    together = [tuple(d for c in clusters[: i + 1] for d in c) for i in range(1, len(clusters))]
    for cluster in (*clusters, *together):
        fit = sorted((d for d in cluster if able(d)), key=lambda d: (float(slowness[d]), problem.kinds[d], d))
        for size in range(2, min(len(fit), problem.job.batch // least) + 1):
            if size <= EVERY_SIZE or size % (size // EVERY_SIZE) == 0:
                yield tuple(sorted(fit[:size]))


def _one_apart(problem: Problem, group: Group) -> Iterator[Group]:
    """One device of a kind fewer, or one more."""
    others = [d for d in range(len(problem.kinds)) if d not in set(group)]
    if len(group) > 1:
        for own in by_kind(problem.kinds, group):
            yield tuple(d for d in group if d != own[-1])
    for own in by_kind(problem.kinds, others):
        yield tuple(sorted((*group, own[0])))


def _over_sources(problem: Problem, strategy: str) -> Plan:
    layers = len(problem.graph)
    choices = reversed(problem.micro_batch_choices())
    outlines = [Outline(m, (fixed_span(problem, 0, layers, m),)) for m in choices]
    return segmented(problem, simulated(problem, priced(problem, strategy, outlines), FINALISTS))
