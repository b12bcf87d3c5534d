"""``hiertrain`` and ``hiertrain_n``: machines start rows of their own, and one finishes them all.

After HierTrain (Liu, Chen, Zhou, Ling, arXiv 2003.09876, 2020; IEEE Open Journal of the Communications
Society, vol. 1): three machines, of which one holds all layers and two a short and a long prefix of them,
with the gradients of the prefixes summed. Formulas, search and rows are our own (``model.py``,
``search.py``, ``rows.py``). The published method is one micro-batch; more of them, other
numbers of machines, and moves that the simulator finds to pay, are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import comb, perm

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner.hiertrain.grow import grown, widened
from spanwise.planner.hiertrain.instance import promising
from spanwise.planner.hiertrain.layout import Layout, Roles
from spanwise.planner.hiertrain.plan import Arena, Kind
from spanwise.planner.hiertrain.search import Candidate, Search
from spanwise.planner.plans.build import Depth
from spanwise.planner.plans.feasible import closest
from spanwise.planner.plans.trial import timeline
from spanwise.planner.plans.variants import segmented
from spanwise.planner.problem import Problem
from spanwise.planner.published.decided import exactly

MACHINES = 6  # among which the three are chosen
MACHINES_OF_N = 8
FINALISTS = 5  # of a family that are simulated
OF_EACH_COUNT = 4  # candidates of every number of micro-batches
OF_EACH_ROLES = 3  # finalists; the formula may be wrong about links that are shared, and so about roles
MOST_SOLVED = 16  # layouts of more than one micro-batch, where the formula is rougher
MOVES = 24  # simulations for small changes of the best plan
MOST_LISTED = 100_000
WIDTH = 16  # roles of every number of helpers that are given one more
ALONE: Kind = (0, True)
SPLIT: Kind = (1, False)
ONE_HELPER: Kind = (1, True)
TWO_HELPERS: tuple[Kind, ...] = ((2, True), (2, False))
THREE_MACHINES: tuple[tuple[Kind, ...], ...] = ((ALONE,), (SPLIT,), (ONE_HELPER,), TWO_HELPERS)


@dataclass(frozen=True, slots=True)
class Simulated:
    """A candidate's plan and its simulated step time."""

    step_time_s: float
    plan: Plan
    candidate: Candidate


def hiertrain(problem: Problem) -> Plan:
    """The least simulated step time of the best layouts of up to three machines, by families.

    Raises:
        InfeasibleError: memory, links or data constraints allow none.
    """
    refuse_many_sources(problem)
    arena = Arena.on(problem, promising(problem, MACHINES))
    return finished(arena, "hiertrain", of_families(arena, "hiertrain", THREE_MACHINES))


def hiertrain_n(problem: Problem) -> Plan:
    """The same with any number of helpers.

    Raises:
        InfeasibleError: memory, links or data constraints allow none.
    """
    arena = Arena.on(problem, promising(problem, MACHINES_OF_N, alike=MACHINES_OF_N))
    found: list[Simulated] = []
    reasons: list[InfeasibleError] = []
    try:
        found = of_families(arena, "hiertrain_n", THREE_MACHINES)
    except InfeasibleError as error:
        reasons.append(error)
    more = _more_helpers(arena, found)
    try:
        found += simulated(arena, "hiertrain_n", more) if more else []
    except InfeasibleError as error:
        reasons.append(error)
    if not found:
        raise closest(reasons)
    return finished(arena, "hiertrain_n", found)


def refuse_many_sources(problem: Problem) -> None:
    """``InfeasibleError`` where more devices than three must start rows of their own."""
    if problem.first_is_fixed and len(problem.sources) > 3:
        raise InfeasibleError(
            f"raw data on {' and '.join(problem.sources)} must not leave them (private = true), "
            "but at most three devices share the work here; use hiertrain_n"
        )


def of_families(arena: Arena, strategy: str, families: Sequence[tuple[Kind, ...]]) -> list[Simulated]:
    """The simulated finalists of every family.

    Raises:
        InfeasibleError: there is none; tells why of the one that comes closest.
    """
    search = Search(arena.instance, arena.room)
    for family in families:
        if family not in arena.finalists:
            arena.finalists[family] = finalists(arena, search, family)
    candidates = [c for family in families for c in arena.finalists[family]]
    if not candidates:  # plans that do not fit tell what is short
        search = Search(arena.instance, arena.roomy)
        candidates = [c for family in families for c in finalists(arena, search, family)]
    return simulated(arena, strategy, candidates)


def finalists(arena: Arena, search: Search, family: tuple[Kind, ...]) -> list[Candidate]:
    """The best by formula over all micro-batch counts, first that of one micro-batch.

    Of machines that work alone the best few of each.
    """
    bounds = [one for helpers, starts in family for one in arena.families(helpers, starts=starts)]
    found: list[Candidate] = []
    for pool in [[one] for one in bounds] if family == (ALONE,) else [bounds]:
        best: list[Candidate] = []
        for count in arena.problem.micro_batch_choices():
            most = None if count == 1 else MOST_SOLVED
            best += search.best(pool, count, keep=OF_EACH_COUNT, most=most)
        best.sort(key=lambda c: (c.micro_batches > 1, c.price_s))
        found += _unlike(best[:1] + sorted(best[1:], key=lambda c: c.price_s))[:FINALISTS]
    return found


def _unlike(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first few of all roles."""
    seen: dict[Roles, int] = {}
    out: list[Candidate] = []
    for candidate in candidates:
        count = seen[candidate.layout.roles] = seen.get(candidate.layout.roles, 0) + 1
        out += [candidate] if count <= OF_EACH_ROLES else []
    return out


def simulated(arena: Arena, strategy: str, candidates: Sequence[Candidate]) -> list[Simulated]:
    """The plans of the candidates that fit.

    Raises:
        InfeasibleError: none fits; tells why of the one that comes closest.
    """
    out: list[Simulated] = []
    reasons: list[InfeasibleError] = []
    for candidate in candidates:
        try:
            found = _simulated(arena, strategy, candidate, "deep")
        except InfeasibleError as error:
            reasons.append(error)
            continue
        if found is not None:
            out.append(found)
    if not out:
        none = "the links allow no plan; data devices must reach the device that finishes their rows"
        raise closest(reasons) if reasons else InfeasibleError(f"{none}, and that one its helpers")
    return out


def _simulated(arena: Arena, strategy: str, candidate: Candidate, depth: Depth) -> Simulated | None:
    decision = arena.decision(candidate, depth)
    if decision is None:
        return None
    plan = exactly(arena.problem, strategy, decision)
    return Simulated(timeline(arena.problem, plan).step_time_s, plan, candidate)


def fastest(found: Sequence[Simulated]) -> Simulated:
    """The first of those with the least simulated step time."""
    return min(found, key=lambda entry: entry.step_time_s)


def finished(arena: Arena, strategy: str, found: Sequence[Simulated]) -> Plan:
    """The best after small changes that the simulator finds to pay, its sums in segments where that pays.

    The formula knows neither what messages share on their way nor which of its parts overlap.
    """
    best, tried = fastest(found), 0
    step = max(1, best.plan.micro_batch_rows // 8)
    while step:
        moved = False
        for candidate, depth in _near(arena, best.candidate, step):
            if tried >= MOVES:
                return segmented(arena.problem, [best.plan])
            tried += 1
            try:
                near = _simulated(arena, strategy, candidate, depth)
            except InfeasibleError:
                continue
            if near is not None and near.step_time_s < best.step_time_s:
                best, moved = near, True
                break
        step = step if moved else step // 4
    return segmented(arena.problem, [best.plan])


def _near(arena: Arena, candidate: Candidate, step: int) -> Iterator[tuple[Candidate, Depth]]:
    """Rows from one machine to another, cuts one further, and less deep warm-up."""
    layout, rows = candidate.layout, candidate.rows
    if candidate.micro_batches > 1 and layout.cuts:
        yield candidate, "shallow"
    held = [j for j, y in enumerate(rows) if y]
    for a in () if arena.problem.first_is_fixed else held:
        for b in held:
            if a != b and rows[a] > step:
                moved = [y - step * (j == a) + step * (j == b) for j, y in enumerate(rows)]
                yield _with(candidate, layout, tuple(moved)), "deep"
    for j, cut in enumerate(layout.cuts):
        place = arena.grid.index(cut)
        for other in arena.grid[max(0, place - 1) : place + 2 : 2] if place else arena.grid[1:2]:
            cuts = (*layout.cuts[:j], other, *layout.cuts[j + 1 :])
            if list(cuts) == sorted(cuts) and (layout.roles.starts or cuts[-1] < arena.instance.layers):
                yield _with(candidate, Layout(layout.roles, cuts), rows), "deep"


def _with(candidate: Candidate, layout: Layout, rows: tuple[int, ...]) -> Candidate:
    return Candidate(candidate.price_s, layout, rows, candidate.micro_batches)


def _more_helpers(arena: Arena, found: Sequence[Simulated]) -> list[Candidate]:
    """Layouts with three helpers and more: the best of all if they are few, else what grows from others."""
    search = Search(arena.instance, arena.room)
    counts = dict.fromkeys((1, fastest(found).candidate.micro_batches if found else 1))
    if _are_few(arena):
        pool = [
            bounds
            for helpers in range(3, len(arena.devices))
            for starts in (True, False)
            for bounds in arena.families(helpers, starts=starts)
        ]
        return [c for m in counts for c in search.best(pool, m, keep=OF_EACH_COUNT, most=FINALISTS)]
    given = arena.problem.first_is_fixed
    out: list[Candidate] = []
    for count in counts:
        layouts: dict[Layout, float] = {}
        for seed in _seeds(arena, count):
            layouts |= grown(arena.numbers, seed, arena.grid, count, roles_are_given=given)
        many = [layout for layout in layouts if len(layout.roles.workers) > 2]
        solved = (search.solve(layout, count) for layout in sorted(many, key=lambda one: layouts[one]))
        out += islice((candidate for candidate in solved if candidate is not None), OF_EACH_COUNT)
    return out


def _are_few(arena: Arena) -> bool:
    """Whether all layouts of three helpers and more can be listed."""
    machines, places = len(arena.devices), len(arena.grid)
    return (
        sum(
            2 * perm(machines, helpers + 1) * comb(places + helpers - 1, helpers)
            for helpers in range(3, machines)
        )
        <= MOST_LISTED
    )


def _seeds(arena: Arena, micro_batches: int) -> Iterator[Layout]:
    """Where to begin: the best of ever more helpers; where roles are given, equally long prefixes."""
    if not arena.problem.first_is_fixed:
        yield from widened(arena.numbers, arena.grid, micro_batches, WIDTH)
        return
    for roles in arena.given_roles():
        for place in {0, len(arena.grid) // 2}:
            yield Layout(roles, (arena.grid[place],) * len(roles.workers))
