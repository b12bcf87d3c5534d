"""Layouts of more machines than can be listed: single changes while the bound falls.

A change is a worker more or less, another one in its place, two that change places, another cut, another
finisher, or that the finisher starts rows or does not. Where roles are given only cuts change. The bound
(``search.py``) stands for the step time, as it needs no search for rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np

from spanwise.planner.facts.tables import Ints
from spanwise.planner.hiertrain.layout import Layout, Roles
from spanwise.planner.hiertrain.search import Numbers, allowed_cuts, bounds

MOST_ROUNDS = 40
KEPT = 2  # layouts of every number of helpers
Change = tuple[Roles, tuple[int, ...], int | None]  # roles, cuts, and which cut may be any


def grown(
    numbers: Numbers, start: Layout, grid: Sequence[int], micro_batches: int, *, roles_are_given: bool = False
) -> dict[Layout, float]:
    """Every layout that was the best of its round, with its bound in seconds."""
    rows = numbers.instance.rows // micro_batches
    current, least = start, float("inf")
    out: dict[Layout, float] = {}
    for _ in range(MOST_ROUNDS):
        moved = False
        same = (current.roles, current.cuts, None)
        changes = _recut(current) if roles_are_given else _changes(current, len(numbers.both))
        for roles, cuts, free in (same, *changes):
            best = _best(
                numbers, roles, cuts, free, grid,
                rows=rows, micro_batches=micro_batches, ordered=roles_are_given,
            )  # fmt: skip
            if best is not None and best[0] < least * (1 - 1e-12):
                moved, (least, current) = True, best
                out[current] = least
        if not moved:
            break
    return out


def widened(numbers: Numbers, grid: Sequence[int], micro_batches: int, width: int) -> list[Layout]:
    """The best layouts of every number of helpers, found from those of one less.

    Of every number the ``width`` best roles go on, each with the best cut for the one who came.
    """
    rows = numbers.instance.rows // micro_batches
    machines = range(len(numbers.both))
    level: dict[Roles, tuple[float, Layout]] = {}
    out: list[Layout] = []
    changes: list[Change] = [
        (Roles(o, (worker,), starts), (1,), 0)
        for o, worker in permutations(machines, 2)
        for starts in (True, False)
    ]
    while changes:
        level = {}
        for roles, cuts, free in changes:
            best = _best(numbers, roles, cuts, free, grid, rows=rows, micro_batches=micro_batches)
            if best is not None:
                level[roles] = best
        kept = sorted(level.values(), key=lambda pair: pair[0])[:width]
        out += [layout for _, layout in kept[:KEPT]]
        changes = [change for _, layout in kept for change in _joined(layout, len(machines))]
    return out


def _best(
    numbers: Numbers,
    roles: Roles,
    cuts: tuple[int, ...],
    free: int | None,
    grid: Sequence[int],
    *,
    rows: int,
    micro_batches: int,
    ordered: bool = False,
) -> tuple[float, Layout] | None:
    """The least bound with one cut anywhere between its neighbours; none where nothing is possible."""
    places = _places(numbers, roles, cuts, free, grid, ordered=ordered)
    found = bounds(numbers, roles, places) if len(places) else None
    if found is None:
        return None
    seconds = found.seconds(rows, micro_batches)
    at = int(np.argmin(seconds))
    return float(seconds[at]), Layout(roles, tuple(int(m) for m in places[at]))


def _places(
    numbers: Numbers,
    roles: Roles,
    cuts: tuple[int, ...],
    free: int | None,
    grid: Sequence[int],
    *,
    ordered: bool,
) -> Ints:
    """``[layout, worker]`` the cuts with one of them anywhere between its neighbours."""
    layers = numbers.instance.layers
    if free is None:
        found = [cuts]
    else:
        low = cuts[free - 1] if free else 1
        high = cuts[free + 1] if free + 1 < len(cuts) else layers
        found = [(*cuts[:free], m, *cuts[free + 1 :]) for m in grid if low <= m <= high]
    places = np.reshape(np.array(found, dtype=np.int64), (len(found), len(cuts)))
    return allowed_cuts(roles, places, layers, ordered=ordered) if roles.workers else places


def _recut(layout: Layout) -> Iterator[Change]:
    for j in range(len(layout.cuts)):
        yield layout.roles, layout.cuts, j


def _changes(layout: Layout, machines: int) -> Iterator[Change]:
    roles, cuts = layout.roles, layout.cuts
    o, workers = roles.finisher, roles.workers
    unused = [m for m in range(machines) if m != o and m not in workers]
    yield from _recut(layout)
    for j, worker in enumerate(workers):
        before, after = workers[:j], workers[j + 1 :]
        if len(workers) > 1 or roles.starts:
            yield Roles(o, before + after, roles.starts), cuts[:j] + cuts[j + 1 :], None
        yield Roles(worker, (*before, o, *after), roles.starts), cuts, j
        for i, earlier in enumerate(before):
            swapped = (*workers[:i], worker, *workers[i + 1 : j], earlier, *after)
            yield Roles(o, swapped, roles.starts), cuts, j
        for other in unused:
            yield Roles(o, (*before, other, *after), roles.starts), cuts, j
    for other in unused:
        yield Roles(other, workers, roles.starts), cuts, len(cuts) - 1 if cuts else None
    yield from _joined(layout, machines)
    if workers:
        yield Roles(o, workers, not roles.starts), cuts, None


def _joined(layout: Layout, machines: int) -> Iterator[Change]:
    """One worker more, at any place."""
    roles, cuts = layout.roles, layout.cuts
    workers = roles.workers
    for other in range(machines):
        if other != roles.finisher and other not in workers:
            for j in range(len(workers) + 1):
                more = (*workers[:j], other, *workers[j:])
                yield Roles(roles.finisher, more, roles.starts), (*cuts[:j], 1, *cuts[j:]), j
