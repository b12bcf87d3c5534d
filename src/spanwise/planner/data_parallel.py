"""Data parallelism: every device has the whole model and computes its rows of each micro-batch."""

from __future__ import annotations

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner.build import fixed_span
from spanwise.planner.groups import Groups
from spanwise.planner.lanes import Group
from spanwise.planner.outline import Outline, Span
from spanwise.planner.problem import Problem, largest_remainder
from spanwise.planner.search import Search, mask_of, members
from spanwise.planner.trial import Priced, fastest, priced, segmented

FINALISTS = 4
MOST_SETS = 32
MOST_PRICED = 64
ALL_SUBSETS = 8  # devices; beyond it devices are left out one after the other


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
    return segmented(problem, fastest(problem, priced(problem, "data_parallel", outlines), FINALISTS))


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
        return segmented(problem, fastest(problem, pool, FINALISTS))
    devices = frozenset(best.stages[0].devices)
    same = [entry for entry in pool if frozenset(entry.plan.stages[0].devices) == devices]
    return segmented(problem, fastest(problem, same, FINALISTS))


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
    whole = mask_of(range(count))
    if count <= ALL_SUBSETS:
        search = Search(groups, ((s, s) for s in range(1, whole + 1)))
        return [search.outline(f) for f in search.found()]
    best: list[Outline] = []
    slowness = (problem.tables.forward + problem.tables.backward)[:, -1, -1]
    current = whole
    while current:
        masks = [current, *(current & ~(1 << d) for d in members(current) if current != 1 << d)]
        search = Search(groups, ((s, s) for s in masks))
        found = search.found()
        best += [search.outline(f) for f in found]
        smaller = [f for f in found if f.used != current]
        # Nothing found: a device would be left without a row, or is short of memory. The slowest goes first.
        slowest = max(members(current), key=lambda d: float(slowness[d]))
        current = smaller[0].used if smaller else current & ~(1 << slowest)
    return sorted(best, key=lambda o: o.price_s)


def _over_sources(problem: Problem, strategy: str) -> Plan:
    layers = len(problem.graph)
    choices = reversed(problem.micro_batch_choices())
    outlines = [Outline(m, (fixed_span(problem, 0, layers, m),)) for m in choices]
    return segmented(problem, fastest(problem, priced(problem, strategy, outlines), FINALISTS))
