"""Another plan for a run under way: the cheapest change of the one that runs which pays, up to a new one.

The order is that of our method for drifting links and devices: (a) micro-batches and warm-up depths, (b)
rows, (c) borders of stages, (d) a plan from the ground up. (a) and (b) move no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError, InputError, PlanError
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan, Replica, ScheduleName
from spanwise.core.profile import Profile
from spanwise.core.routes import Routes
from spanwise.lowering import move_bytes, moves
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.build import Depth, build, fixed_span
from spanwise.planner.plans.halved import halved
from spanwise.planner.plans.price import price
from spanwise.planner.plans.trial import Priced, simulated, timed, timeline
from spanwise.planner.plans.variants import segmented
from spanwise.planner.problem import Problem, largest_remainder
from spanwise.planner.registry import make_plan

Kind = Literal["segments", "micro-batches", "rows", "borders", "plan"]
KINDS: tuple[Kind, ...] = ("segments", "micro-batches", "rows", "borders", "plan")

FINALISTS = 4  # simulated of every kind
TRIES = 160  # plans that the search for borders prices
_REACHES = (8, 4, 2, 1)  # by how many layers it moves a border at once
NEARLY, MOST_NEARER = 1.06, 40  # slower than the best by less is looked at, and so many at most
NEARER = 0.7  # part of the time to move that the next must take at most


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan to change to: what it gives by simulation, and what the change moves.

    ``move_s`` is how long the busiest link is at it.
    """

    plan: Plan
    kind: Kind
    step_s: float
    moved_bytes: int
    move_s: float


def replan(
    plan: Plan, graph: ModelGraph, profile: Profile, cluster: Cluster, job: Job, *, strategy: str = "hpp"
) -> Plan:
    """The plan to go over to when devices or links are no longer what ``plan`` was made for.

    Args:
        plan: what runs.
        graph: its model.
        profile: layer times, device factors and measured links as they are now.
        cluster: devices and links as they are now; it must have the plan's devices.
        job: the job that runs.
        strategy: who makes plans from the ground up.

    Returns:
        The fastest by simulation of all changes that keep the rows of every step; ``plan`` itself if none is
        faster. Of plans within a per cent of each other the one that changes least.

    Raises:
        InputError: a device of the plan is not in the cluster; what it alone holds cannot be moved.
        InfeasibleError: neither the plan itself nor any change of it can run there.
    """
    missing = [device for device in plan.devices if device not in cluster.ids]
    if missing:
        raise InputError(
            f"plan '{plan.strategy}': device '{missing[0]}' is not in cluster '{cluster.name}', so its state "
            "cannot move; make a new plan and resume from a checkpoint"
        )
    problem = Problem(graph=graph, profile=profile, cluster=cluster, job=job)
    found = [c for group in candidates(problem, plan, strategy) for c in group]
    try:
        least = timeline(problem, plan).step_time_s
    except (InfeasibleError, PlanError):
        least = float("inf")
    if not found and least == float("inf"):
        raise InfeasibleError(f"plan '{plan.strategy}': neither it nor any change of it can run now")
    best = min(found, key=lambda c: c.step_s * (1 + 0.01 * KINDS.index(c.kind)), default=None)
    return plan if best is None or best.step_s >= least else best.plan


def candidates(problem: Problem, plan: Plan, strategy: str) -> Iterator[list[Candidate]]:
    """Changes of a plan, each group as soon as it is known: small ones first, then a plan from the ground up.

    All keep the data devices and how many rows each gives to a step, so the same rows make up every step.
    Plans over a server have no small changes here: other segments come from ``resegment.py``.
    """
    if plan.servers:
        yield from from_the_ground_up(problem, plan, strategy)
        return
    small = _distinct([*_other_micro_batches(problem, plan), *_other_rows(problem, plan)])
    found = _tried(problem, plan, small)
    yield found
    start = min(found, key=lambda c: c.step_s).plan if found else plan
    yield _tried(problem, plan, _distinct(_other_borders(problem, start, plan)))
    yield from from_the_ground_up(problem, plan, strategy)


def from_the_ground_up(problem: Problem, plan: Plan, strategy: str) -> Iterator[list[Candidate]]:
    """The plan that a strategy makes now, as a change of the one that runs."""
    try:
        whole = make_plan(problem, strategy)
    except InfeasibleError:
        return
    yield [*_tried(problem, plan, [whole]), *_nearer(problem, plan, whole)]


def _nearer(problem: Problem, plan: Plan, whole: Plan) -> list[Candidate]:
    """Of the plans that were simulated for the best one those that are a little slower and far nearer.

    State that moves over a link that has become slow takes longer than such a plan ever loses.
    """
    out: list[Candidate] = []
    least = candidate(problem, plan, whole)
    most_s = least.move_s if least is not None else math.inf
    slowest_s = NEARLY * timeline(problem, whole).step_time_s
    near = [entry for entry in timed(problem) if entry[1] <= slowest_s]
    for other, _ in sorted(near, key=lambda entry: entry[1])[:MOST_NEARER]:
        if not same_rows(problem, plan, other) or shape(other) == shape(plan):
            continue
        found = candidate(problem, plan, other.model_copy(update={"strategy": whole.strategy}))
        if found is not None and found.move_s < NEARER * most_s:
            out.append(found)
            most_s = found.move_s
    return out


def kind_of(old: Plan, new: Plan) -> Kind:
    """The least word for what changes between two plans."""

    def groups(plan: Plan) -> list[set[str]]:
        return [set(stage.devices) for stage in plan.stages]

    def rows(plan: Plan) -> list[dict[str, int]]:
        return [{r.device: r.rows * plan.micro_batches for r in stage.replicas} for stage in plan.stages]

    held = {stage.replicas for plan in (old, new) for stage in plan.stages}
    if old.servers and new.servers and len(held) == 1:
        return "segments"
    if groups(old) != groups(new):
        return "plan"
    if [stage.stop for stage in old.stages] != [stage.stop for stage in new.stages]:
        return "borders"
    return "micro-batches" if rows(old) == rows(new) else "rows"


def same_rows(problem: Problem, old: Plan, new: Plan) -> bool:
    """Whether the same rows make up every step: always where the data is everywhere, else by data device."""
    if not problem.shares:
        return old.batch == new.batch

    def given(plan: Plan) -> list[tuple[str, int]]:
        return [(source.device, source.rows * plan.micro_batches) for source in plan.sources]

    return given(old) == given(new)


def shape(plan: Plan) -> Plan:
    """The plan without its maker's name: equal for plans that do the same."""
    return plan.model_copy(update={"strategy": ""})


def _counts(problem: Problem, plan: Plan) -> list[int]:
    """Micro-batch counts under which the data devices give the same rows to a step."""
    most = max(len(stage.replicas) for stage in plan.stages)
    try:
        choices = problem.micro_batch_choices(most)
    except InfeasibleError:
        return [plan.micro_batches]
    out: list[int] = []
    for count in dict.fromkeys((*choices, plan.micro_batches)):
        sources = problem.source_rows(problem.job.batch // count)
        given = [(r.device, r.rows * count) for r in sources]
        if not sources or given == [(s.device, s.rows * plan.micro_batches) for s in plan.sources]:
            out.append(count)
    return out


def _other_micro_batches(problem: Problem, plan: Plan) -> Iterator[Plan]:
    """The same layers on the same devices in the same proportions of rows."""
    for count in _counts(problem, plan):
        spans: list[Span] = []
        for stage in plan.stages:
            least = problem.least_rows(stage.start, stage.stop)
            rows = problem.job.batch // count
            if rows < least * len(stage.replicas):
                break
            parts = largest_remainder(rows, tuple(float(r.rows) for r in stage.replicas), least)
            spans.append(Span(stage.start, stage.stop, _group(problem, stage.replicas), parts))
        else:
            yield from _built(problem, plan, Outline(count, tuple(spans)))


def _other_rows(problem: Problem, plan: Plan) -> Iterator[Plan]:
    """The same layers on the same devices, rows by how fast they are now."""
    for count in _counts(problem, plan):
        yield from _built(problem, plan, Outline(count, _spans(problem, plan, _edges(plan), count)))


def _other_borders(problem: Problem, start: Plan, plan: Plan) -> Iterator[Plan]:
    """The same groups with other layers: borders move, far first, while the price by formula falls."""
    best, least, left = start, price(problem, start).step_time_s, TRIES
    for reach in _REACHES:
        moved = True
        while moved and left > 0:
            moved = False
            for edges in _near(best, reach):
                spans = _spans(problem, best, edges, best.micro_batches)
                left -= 1
                found = next(_built(problem, plan, Outline(best.micro_batches, spans)), None)
                cost = float("inf") if found is None else price(problem, found).step_time_s
                if found is not None and cost < least:
                    best, least, moved = found, cost, True
                    break
    if best is not start:
        yield best
        yield from _other_rows(problem, best)


def _near(plan: Plan, reach: int) -> Iterator[list[int]]:
    """Edges of the stages with one border, or all borders from one on, ``reach`` layers further."""
    edges = _edges(plan)
    for first in range(1, len(edges) - 1):
        for width in {1, len(edges) - 1 - first}:
            for step in (-reach, reach):
                new = [e + step if first <= i < first + width else e for i, e in enumerate(edges)]
                if all(a < b for a, b in pairwise(new)):
                    yield new


def _spans(problem: Problem, plan: Plan, edges: Sequence[int], micro_batches: int) -> tuple[Span, ...]:
    """Stages on the devices of the plan's; rows are worked out anew unless data must stay."""
    last = len(plan.stages) - 1
    out: list[Span] = []
    for index, (start, stop) in enumerate(pairwise(edges)):
        if (index == 0 and problem.first_is_fixed) or (index == last and problem.last_is_fixed):
            out.append(fixed_span(problem, start, stop, micro_batches))
        else:
            out.append(Span(start, stop, _group(problem, plan.stages[index].replicas)))
    return tuple(out)


def _edges(plan: Plan) -> list[int]:
    return [0, *(stage.stop for stage in plan.stages)]


def _group(problem: Problem, replicas: Sequence[Replica]) -> tuple[int, ...]:
    return tuple(problem.index[replica.device] for replica in replicas)


def _built(problem: Problem, plan: Plan, outline: Outline) -> Iterator[Plan]:
    depths: tuple[Depth, ...] = ("deep", "shallow") if len(outline.spans) > 1 else ("deep",)
    # Orders in halves are made for the few that turn out best.
    schedule: ScheduleName = "1f1b" if plan.schedule == "zero_bubble" else plan.schedule
    for depth in depths:
        try:
            found = build(problem, plan.strategy, outline, depth=depth, schedule=schedule)
        except InfeasibleError:
            continue
        if same_rows(problem, plan, found):
            yield found


def _distinct(plans: Iterator[Plan] | Sequence[Plan]) -> list[Plan]:
    return list(dict.fromkeys(plans))


def _tried(problem: Problem, plan: Plan, plans: Sequence[Plan]) -> list[Candidate]:
    """The best of some plans by simulation, also in halves and segments, with what a change to them takes."""
    allowed = [p for p in plans if same_rows(problem, plan, p) and shape(p) != shape(plan)]
    if not allowed:
        return []
    pool = [Priced(p, price(problem, p).step_time_s) for p in allowed]
    try:
        best = simulated(problem, pool, FINALISTS)
    except InfeasibleError:
        return []
    fastest = best[0] if best[0].schedule == "gpipe" else segmented(problem, halved(problem, best))
    found = [candidate(problem, plan, new) for new in dict.fromkeys((fastest, *best))]
    return [entry for entry in found if entry is not None]


def candidate(problem: Problem, plan: Plan, new: Plan) -> Candidate | None:
    """A simulated plan as a change of the one that runs; none if its state cannot get to its devices."""
    try:
        needed = moves(plan, new, problem.graph, problem.cluster, problem.profile.links)
    except PlanError:
        return None
    routes = Routes(problem.cluster, problem.profile.links)
    total, loads = 0, dict[str, float]()
    for move in needed:
        nbytes = move_bytes(move, problem.graph, problem.copies)
        total += nbytes
        for name, rate in routes.route(move.source, move.target).resources:
            loads[name] = loads.get(name, 0.0) + nbytes / rate
    seconds = timeline(problem, new).step_time_s
    return Candidate(new, kind_of(plan, new), seconds, total, max(loads.values(), default=0.0))
