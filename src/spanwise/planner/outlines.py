"""The best divisions of the model over devices by formula: the search behind ``pipeline`` and ``hpp``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from spanwise.planner.build import fixed_span
from spanwise.planner.grid import all_cuts, coarse_cuts, fine_cuts
from spanwise.planner.groups import Groups
from spanwise.planner.lanes import Group
from spanwise.planner.orders import searched_orders
from spanwise.planner.outline import Outline
from spanwise.planner.problem import Problem
from spanwise.planner.search import Extension, Head, Search, Tail, all_subsets, mask_of

EXACT_DEVICES = 8  # up to here all orders and groups, beyond it a local search over device orders
EXACT_PAIRS = 6  # the same for each of the cuts tried behind a fixed first and before a fixed last stage
KEPT = 64


def best_outlines(
    problem: Problem,
    *,
    singles: bool,
    in_flight: int,
    cuts: tuple[int, ...],
    keep: int = KEPT,
    only: frozenset[Group] = frozenset(),
) -> list[Outline]:
    """The ``keep`` cheapest outlines on a grid of cuts, each the best of its devices, first group and M.

    Args:
        problem: with or without fixed first and last stages.
        singles: one device a stage.
        in_flight: micro-batches whose activations must fit; 0 = memory is ignored.
        cuts: grid of layer positions.
        keep: how many, about.
        only: groups to build from; all if empty.
    """
    groups = Groups(problem, cuts, problem.micro_batch_choices(), in_flight)
    devices = tuple(range(len(problem.cluster.devices)))
    if problem.first_is_fixed:
        return _fixed_outlines(problem, groups, singles, keep, only)
    if len(devices) <= EXACT_DEVICES:
        return _outlines([Search(groups, _extensions(devices, singles, only))], keep)
    return _outlines(searched_orders(groups, singles=singles), keep)


def refined_outlines(
    problem: Problem, *, singles: bool, in_flight: int = 1, keep: int = KEPT
) -> list[Outline]:
    """On a coarse grid first and then, if that left cuts out, on a fine one around the best of them."""
    layers = len(problem.graph)
    coarse = coarse_cuts(problem.tables)
    found = best_outlines(problem, singles=singles, in_flight=in_flight, cuts=coarse, keep=keep)
    if len(coarse) == layers + 1 or not found:
        return found
    around = [span.stop for outline in found[:8] for span in outline.spans]
    fine = fine_cuts(layers, around)
    only = frozenset(span.group for outline in found[:keep] for span in outline.spans)
    more = best_outlines(problem, singles=singles, in_flight=in_flight, cuts=fine, keep=keep, only=only)
    return sorted(found + more, key=lambda o: o.price_s)[:keep]


def all_cut_outlines(
    problem: Problem, *, singles: bool, in_flight: int = 1, keep: int = KEPT
) -> list[Outline]:
    """On the grid of all cuts: exact for the price where the search is."""
    cuts = all_cuts(len(problem.graph))
    return best_outlines(problem, singles=singles, in_flight=in_flight, cuts=cuts, keep=keep)


def _outlines(searches: Sequence[Search], keep: int) -> list[Outline]:
    """The cheapest of all, and the cheapest few of every number of devices: price favours many stages."""
    found = [(f, search) for search in searches for f in search.found()]
    found.sort(key=lambda pair: pair[0].price_s)
    kept = found[:keep]
    few = max(4, keep // 6)
    for search in searches:
        kept += [pair for pair in found if pair[1] is search][:2]
    for size in {f.used.bit_count() for f, _ in found}:
        kept += [pair for pair in found if pair[0].used.bit_count() == size][:few]
    outlines = dict.fromkeys(search.outline(f) for f, search in kept)
    return sorted(outlines, key=lambda o: o.price_s)


def _fixed_outlines(
    problem: Problem, groups: Groups, singles: bool, keep: int, only: frozenset[Group]
) -> list[Outline]:
    """The data devices hold the first stage and, unless labels may leave, the last; others the middle."""
    layers = len(problem.graph)
    held = tuple(problem.cluster.ids.index(d) for d in problem.sources)
    alone = [Outline(m, (fixed_span(problem, 0, layers, m),)) for m in groups.micro_batches]
    if singles and len(held) > 1:
        return []
    searches: list[Search] = []
    total = problem.tables.forward + problem.tables.backward
    middle = tuple(int(d) for d in np.argsort(total[:, -1, -1], kind="stable"))  # fastest first
    if singles or len(middle) > EXACT_PAIRS or len(held) == 1:
        middle = tuple(d for d in middle if d not in held)
    for head, tail in _ends(problem, groups, held, len(middle)):
        extensions = _extensions(middle, singles, only)
        searches.append(Search(groups, extensions, head=head, tail=tail))
    return alone + _outlines(searches, keep)


def _extensions(devices: Group, singles: bool, only: frozenset[Group]) -> list[Extension]:
    """All sets of few devices; of many those that the fastest ones make."""
    if len(devices) > EXACT_DEVICES:
        devices = tuple(sorted(devices[:EXACT_DEVICES]))
    masks = {mask_of(group) for group in only}
    return [(used, g) for used, g in all_subsets(devices, singles=singles) if not masks or g in masks]


def _ends(problem: Problem, groups: Groups, held: Group, middle: int) -> Iterator[tuple[Head, Tail | None]]:
    """The fixed first and last stages worth trying: cheap for the data devices and over their links."""
    rows = tuple(
        tuple(r.rows for r in problem.source_rows(problem.job.batch // m)) for m in groups.micro_batches
    )
    times = groups.fixed_times(held, rows)
    side = len(groups.cuts)
    tries = 5 if middle <= 4 else 3 if middle <= EXACT_PAIRS else 2
    others = tuple(d for d in range(len(problem.cluster.devices)) if d not in held)
    lanes = problem.lanes.between(held, others) if others else None
    per_byte = max(lanes[0].s_per_byte, lanes[1].s_per_byte) if lanes else 0.0
    at = np.array(groups.cuts)
    crossing = problem.job.batch * per_byte * np.maximum(problem.tables.into, problem.tables.back)[at]
    count = np.array(groups.micro_batches, dtype=np.float64)[:, None]
    first = np.min(count * times.both[:, 0, :], axis=0) + crossing
    last = np.min(count * times.both[:, :, side - 1], axis=0) + crossing
    inner = np.arange(1, side - 1)
    heads = sorted(inner[np.argsort(first[inner], kind="stable")][:tries].tolist())
    if not problem.last_is_fixed:
        for h in heads:
            yield Head(h, held, times), None
        return
    tails = sorted(inner[np.argsort(last[inner], kind="stable")][:tries].tolist())
    for h in heads:
        for t in tails:
            if h < t:
                yield Head(h, held, times), Tail(t, held, times)
