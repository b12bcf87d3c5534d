"""The best divisions of the model over devices by formula: the search behind ``pipeline`` and ``hpp``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import numpy as np

from spanwise.planner.facts.kinds import Group, Mix
from spanwise.planner.facts.neighbours import neighbours
from spanwise.planner.outline import Outline
from spanwise.planner.plans.build import fixed_span
from spanwise.planner.problem import Problem
from spanwise.planner.search.entries import Head, Tail
from spanwise.planner.search.extensions import Extension, all_subsets, by_depth, subset_pairs
from spanwise.planner.search.grid import all_cuts, coarse_cuts, fine_cuts, nearest
from spanwise.planner.search.groups import Groups, StageTimes
from spanwise.planner.search.orders import many_devices
from spanwise.planner.search.sequences import chains
from spanwise.planner.search.sets import Search

EXACT_WORK = 12e6  # array elements of all sets and groups; beyond it a local search over device orders
OVERHEAD = 3000  # elements whose time every set with its group takes besides
MOST_EXACT = 16  # devices
ORDERED_CUTS = 24  # of the first grid along device orders; the second, about its best, has all
EXACT_PAIRS = 6  # of all sets for each of the cuts tried behind a fixed first and before a fixed last stage
KEPT = 128
KEPT_OF_MANY = 48
BESIDE = 8  # best sequences of groups whose neighbours are searched too


def best_outlines(
    problem: Problem,
    *,
    singles: bool,
    in_flight: int,
    cuts: tuple[int, ...],
    keep: int = KEPT,
    near: Sequence[Outline] = (),
    deep: bool = False,
    halves: bool = False,
) -> list[Outline]:
    """The ``keep`` cheapest outlines on a grid of cuts, each the best of its devices, first group and M.

    Args:
        problem: with or without fixed first and last stages.
        singles: one device a stage.
        in_flight: micro-batches whose activations must fit; 0 = memory is ignored.
        cuts: grid of layer positions.
        keep: how many, about.
        near: build only from their groups, their first stage and their last; from all if empty.
        deep: P-p micro-batches must fit in stage p of P, in place of ``in_flight`` everywhere.
        halves: backwards are done in halves, so that no stage waits for the weight half of another.
    """
    groups = Groups(problem, cuts, problem.micro_batch_choices(), in_flight, halves)
    devices = tuple(range(len(problem.cluster.devices)))
    if problem.first_is_fixed:
        return _fixed_outlines(problem, groups, singles, keep, near)
    if _is_exact(problem, cuts, singles):
        extensions = _extensions(groups, devices, singles, near)
        search = Search(groups, by_depth(extensions, len(devices)) if deep else extensions)
        return _outlines([search, *_beside(search, singles, deep)], keep)
    return _outlines(many_devices(groups, singles=singles, deep=deep), min(keep, KEPT_OF_MANY))


def refined_outlines(
    problem: Problem, *, singles: bool, in_flight: int = 1, keep: int = KEPT, deep: bool = False,
    halves: bool = False,
) -> list[Outline]:  # fmt: skip
    """On a coarse grid first and then, if that left cuts out, on a fine one around the best of them."""
    layers = len(problem.graph)
    coarse = coarse_cuts(problem.tables)
    if not _is_exact(problem, coarse, singles):
        coarse = coarse_cuts(problem.tables, ORDERED_CUTS)
    look = partial(
        best_outlines, problem, singles=singles, in_flight=in_flight, keep=keep, deep=deep, halves=halves
    )
    found = look(cuts=coarse)
    if len(coarse) == layers + 1 or not found:
        return found
    around = [span.stop for outline in found[:8] for span in outline.spans]
    fine = fine_cuts(layers, around)
    more = look(cuts=fine, near=found)
    return sorted(found + more, key=lambda o: o.price_s)[:keep]


def all_cut_outlines(
    problem: Problem, *, singles: bool, in_flight: int = 1, keep: int = KEPT
) -> list[Outline]:
    """On the grid of all cuts: exact for the price where the search is."""
    cuts = all_cuts(len(problem.graph))
    return best_outlines(problem, singles=singles, in_flight=in_flight, cuts=cuts, keep=keep)


def _beside(search: Search, singles: bool, deep: bool) -> list[Search]:
    """A search of sequences of groups next to the best: of each state only one plan was kept."""
    problem = search.groups.problem
    found = [search.outline(f) for f in search.found()[: 4 * BESIDE]]
    best = list(dict.fromkeys(tuple(span.group for span in outline.spans) for outline in found))[:BESIDE]
    near = dict.fromkeys(s for sequence in best for s in neighbours(problem.kinds, sequence, singles=singles))
    return [Search(search.groups, chains(problem, near, deep=deep))] if near else []


def _outlines(searches: Sequence[Search], keep: int) -> list[Outline]:
    """The cheapest of all, and the cheapest few of every number of devices: price favours many stages."""
    found = [(f, search) for search in searches for f in search.found()]
    found.sort(key=lambda pair: pair[0].price_s)
    kept = found[:keep]
    few = max(4, keep // 6)
    for search in searches:
        kept += [pair for pair in found if pair[1] is search][:2]
    for size in sorted({len(f.used) for f, _ in found}):
        kept += [pair for pair in found if len(pair[0].used) == size][:few]
    outlines = dict.fromkeys(search.outline(f) for f, search in kept)
    return sorted(outlines, key=lambda o: o.price_s)


def _fixed_outlines(
    problem: Problem, groups: Groups, singles: bool, keep: int, near: Sequence[Outline]
) -> list[Outline]:
    """The data devices hold the first stage and, unless labels may leave, the last; others the middle."""
    layers = len(problem.graph)
    held = tuple(problem.index[d] for d in problem.sources)
    alone = [Outline(m, (fixed_span(problem, 0, layers, m),)) for m in groups.micro_batches]
    if singles and len(held) > 1:
        return []
    searches: list[Search] = []
    slowness = problem.tables.both[:, -1, -1]
    middle = tuple(int(d) for d in np.argsort(slowness, kind="stable"))  # fastest first
    if singles or len(middle) > EXACT_PAIRS or len(held) == 1:
        middle = tuple(d for d in middle if d not in held)
    ends = list(_ends(problem, groups, held, near))
    for head, tail in ends:
        extensions = _extensions(groups, middle, singles, near, len(ends))
        searches.append(Search(groups, extensions, head=head, tail=tail))
    return alone + _outlines(searches, keep)


def _is_exact(
    problem: Problem, cuts: tuple[int, ...], singles: bool, devices: Group | None = None, searches: int = 1
) -> bool:
    """Whether all sets of these devices, or of all, can be searched in reasonable time."""
    devices = tuple(range(len(problem.cluster.devices))) if devices is None else devices
    if len(devices) > MOST_EXACT:
        return False
    pairs = subset_pairs(devices, problem.kinds, singles=singles)
    each = len(cuts) ** 2 * len(problem.micro_batch_choices()) + OVERHEAD
    return searches * pairs * each <= EXACT_WORK


def _extensions(
    groups: Groups, devices: Group, singles: bool, near: Sequence[Outline], searches: int = 1
) -> Iterator[Extension]:
    """All sets of few devices; of many those that the first ones make."""
    while not _is_exact(groups.problem, groups.cuts, singles, devices, searches):
        devices = devices[:-1]
    mixes = _mixes(groups.problem, near)
    for extension in all_subsets(devices, groups.problem.kinds, singles=singles):
        if not mixes or groups.problem.lanes.mix(extension.group) in mixes:
            yield extension


def _mixes(problem: Problem, near: Sequence[Outline]) -> set[Mix]:
    return {problem.lanes.mix(span.group) for outline in near for span in outline.spans}


def _ends(
    problem: Problem, groups: Groups, held: Group, near: Sequence[Outline]
) -> Iterator[tuple[Head, Tail | None]]:
    """The fixed first and last stages worth trying: cheap for the data devices and over their links."""
    rows = tuple(
        tuple(r.rows for r in problem.source_rows(problem.job.batch // m)) for m in groups.micro_batches
    )
    times = groups.fixed_times(held, rows)
    if near:
        divided = [o for o in near if len(o.spans) > 1]
        firsts = [nearest(groups.cuts, o.spans[0].stop) for o in divided]
        lasts = [nearest(groups.cuts, o.spans[-1].start) for o in divided]
        heads, tails = list(dict.fromkeys(firsts))[:3], list(dict.fromkeys(lasts))[:3]
    else:
        heads, tails = _cheap_ends(problem, groups, held, times)
    if not problem.last_is_fixed:
        yield from ((Head(h, held, times), None) for h in heads)
        return
    for h, t in product(heads, tails):
        if h < t:
            yield Head(h, held, times), Tail(t, held, times)


def _cheap_ends(
    problem: Problem, groups: Groups, held: Group, times: StageTimes
) -> tuple[list[int], list[int]]:
    """Grid positions where a first stage may end and a last begin: least own time and bytes to cross."""
    count = len(problem.cluster.devices)
    tries = 5 if count <= 4 else 3 if count <= EXACT_PAIRS else 2
    side = len(groups.cuts)
    others = tuple(d for d in range(count) if d not in held)
    lanes = problem.lanes.between(held, others) if others else None
    per_byte = max(lanes[0].s_per_byte, lanes[1].s_per_byte) if lanes else 0.0
    at = np.array(groups.cuts)
    crossing = problem.job.batch * per_byte * np.maximum(problem.tables.into, problem.tables.back)[at]
    counts = np.array(groups.micro_batches, dtype=np.float64)[:, None]
    inner = np.arange(1, side - 1)
    first = np.min(counts * times.both[:, 0, :], axis=0) + crossing
    last = np.min(counts * times.both[:, :, side - 1], axis=0) + crossing
    heads = inner[np.argsort(first[inner], kind="stable")][:tries]
    tails = inner[np.argsort(last[inner], kind="stable")][:tries]
    return [int(h) for h in heads], [int(t) for t in tails]
