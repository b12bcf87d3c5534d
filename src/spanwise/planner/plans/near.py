"""Plans that lie next to one: with other borders, groups or numbers of micro-batches."""

from __future__ import annotations

from itertools import combinations, pairwise, product

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner.facts.neighbours import neighbours
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.build import Depth
from spanwise.planner.plans.trial import Priced, priced
from spanwise.planner.problem import Problem


def built(problem: Problem, strategy: str, outline: Outline, depth: Depth) -> list[Priced]:
    """The plan of an outline with its price; none if it does not fit."""
    try:
        return priced(problem, strategy, [outline], depth=depth)
    except InfeasibleError:
        return []


def spans_of(problem: Problem, plan: Plan) -> tuple[Span, ...]:
    """The stages of a plan without its rows, every group in file order."""
    index = problem.index
    return tuple(Span(s.start, s.stop, tuple(sorted(index[d] for d in s.devices))) for s in plan.stages)


def near_borders(problem: Problem, plan: Plan, reach: int = 1) -> list[Outline]:
    """The same devices with one border, or both borders of a stage, at most ``reach`` layers further.

    With a reach of one both borders of a stage move the same way.
    """
    last = len(plan.stages) - 1
    edges = [0, *(stage.stop for stage in plan.stages)]
    steps = [step for step in range(-reach, reach + 1) if step]
    moves = [{at: step} for at in range(1, last + 1) for step in steps]
    moves += [
        {at: a, at + 1: b}
        for at in range(1, last)
        for a, b in product(steps, steps)
        if reach > 1 or a == b
    ]  # fmt: skip
    out: list[Outline] = []
    for move in moves:
        new = [edge + move.get(at, 0) for at, edge in enumerate(edges)]
        if any(a >= b for a, b in pairwise(new)):
            continue
        spans: list[Span] = []
        for number, (stage, a, b) in enumerate(zip(plan.stages, new[:-1], new[1:], strict=True)):
            fixed = (number == 0 and problem.first_is_fixed) or (number == last and problem.last_is_fixed)
            group = tuple(problem.index[d] for d in stage.devices)
            rows = tuple(r.rows for r in stage.replicas) if fixed else None
            spans.append(Span(a, b, group if fixed else tuple(sorted(group)), rows))
        out.append(Outline(plan.micro_batches, tuple(spans)))
    return out


def near_groups(problem: Problem, plan: Plan, *, singles: bool) -> list[Outline]:
    """The same borders with a device more, fewer or elsewhere, or two devices or groups exchanged.

    None where the first stage is given. ``singles``: one device a stage.
    """
    if problem.first_is_fixed:
        return []
    spans = spans_of(problem, plan)
    groups = tuple(span.group for span in spans)
    near = [new for new in neighbours(problem.kinds, groups, singles=singles) if len(new) == len(groups)]
    for i, j in combinations(range(len(groups)), 2):
        order = list(groups)
        order[i], order[j] = groups[j], groups[i]
        near.append(tuple(order))
    borders = [(span.start, span.stop) for span in spans]
    return [
        Outline(plan.micro_batches, tuple(Span(*b, group) for b, group in zip(borders, new, strict=True)))
        for new in dict.fromkeys(near)
    ]


def near_joins(problem: Problem, plan: Plan) -> list[Outline]:
    """One stage fewer: its layers to the one before or behind it. None where the first stage is given."""
    if problem.first_is_fixed:
        return []
    spans = spans_of(problem, plan)
    out: list[Outline] = []
    for at, (first, second) in enumerate(pairwise(spans)):
        for group in (first.group, second.group):
            joined = Span(first.start, second.stop, group)
            out.append(Outline(plan.micro_batches, (*spans[:at], joined, *spans[at + 2 :])))
    return out


def recounted(problem: Problem, plan: Plan) -> list[Outline]:
    """The same stages with other numbers of micro-batches."""
    if problem.first_is_fixed:
        return []
    spans = spans_of(problem, plan)
    return [Outline(m, spans) for m in problem.micro_batch_choices() if m != plan.micro_batches]
