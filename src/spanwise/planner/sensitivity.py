"""What one more GiB, twice the bandwidth or a second device would give: planned again, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.core.program import COLLECTIVES
from spanwise.core.timeline import Timeline
from spanwise.core.units import format_bytes, format_seconds
from spanwise.cost.sparse import collective_sent
from spanwise.cost.training import stage_bytes
from spanwise.lowering import lower
from spanwise.planner.bounds.bound import compute_bound
from spanwise.planner.changes import Change, more_memory, second_device, wider_links
from spanwise.planner.plans.trial import timeline
from spanwise.planner.problem import Problem

MOST_REPLANS = 12
LEAST_GAIN = 1.005  # below it a gain is not worth a plan

Planner = Callable[[Problem], Plan]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One change of the cluster and the best plan for it; ``ratio`` is today's step time over the new one."""

    change: str
    step_time_s: float
    ratio: float
    strategy: str


@dataclass(frozen=True, slots=True)
class Untried:
    """A change that was not planned, and why."""

    change: str
    reason: str


@dataclass(frozen=True, slots=True)
class WhatIf:
    """All changes: those planned again, greatest gain first, and the others."""

    found: tuple[Sensitivity, ...]
    untried: tuple[Untried, ...]


def what_if(problem: Problem, plan: Plan, planner: Planner, most: int = MOST_REPLANS) -> WhatIf:
    """Plans again with one GiB more on each device, each link twice as wide, each device a second time.

    Devices that are alike stand for each other. What is busiest in ``plan`` is tried first. The old plan on
    the changed cluster is a candidate too: a search that finds less there is no loss.

    Args:
        problem: today's.
        plan: the best plan for it.
        planner: plans a problem, like ``make_plan``.
        most: how many changes are planned at most.

    Raises:
        InfeasibleError: the plan itself does not fit the problem.
    """
    today = timeline(problem, plan)
    untried: list[Untried] = []
    worth: list[tuple[float, Change]] = []
    for change, busy in _changes(problem, plan, today):
        reason = _cannot_matter(problem, change, today.step_time_s)
        if reason:
            untried.append(Untried(change.text, reason))
        else:
            worth.append((busy, change))
    worth.sort(key=lambda entry: -entry[0])
    found = [_planned(change, plan, planner, today.step_time_s) for _, change in worth[:most]]
    limit = f"beyond the {most} most promising changes"
    untried += [Untried(change.text, limit) for _, change in worth[most:]]
    return WhatIf(tuple(sorted(found, key=lambda s: -s.ratio)), tuple(untried))


def _changes(problem: Problem, plan: Plan, today: Timeline) -> Iterator[tuple[Change, float]]:
    """Every change with how busy, from 0 to 1, the thing is that it is about."""
    for alike in _alike(problem):
        uses = [today.device(d) for d in alike]
        yield second_device(problem, alike[0]), max(use.utilization for use in uses)
        budget = problem.cluster.device(alike[0]).memory_bytes
        yield more_memory(problem, alike[0]), max(use.peak_memory_bytes for use in uses) / budget
    load = _link_loads(problem, plan)
    for change in wider_links(problem):
        most = max((load.get(name, 0.0) for name in change.resources), default=0.0)
        yield change, most / today.step_time_s if today.step_time_s else 0.0


def _alike(problem: Problem) -> list[tuple[str, ...]]:
    """Devices that differ in nothing but their id: times, memory, site, ports, data, no link of their own."""
    named = {
        end for link in (*problem.cluster.links, *problem.profile.links) for end in (link.source, link.target)
    }
    times = {entry.device: (entry.table, entry.factor, entry.alone) for entry in problem.profile.devices}
    groups: dict[object, list[str]] = {}
    for d in problem.cluster.devices:
        own = d.id if d.id in named or d.id in problem.sources else ""
        key = (times.get(d.id), d.memory_bytes, d.site, d.up_bytes_per_s, d.down_bytes_per_s, own)
        groups.setdefault(key, []).append(d.id)
    return [tuple(group) for group in groups.values()]


def _link_loads(problem: Problem, plan: Plan) -> dict[str, float]:
    """Seconds of a step that every capacity of the network is busy under a plan."""
    index = {device: i for i, device in enumerate(problem.cluster.ids)}
    load: dict[str, float] = {}
    program = lower(plan, problem.graph, clip=problem.job.clip_norm is not None)
    for device, actions in program.devices.items():
        for action in actions:
            if action.kind == "send":
                peer, nbytes = action.peer, float(action.nbytes)
            elif action.kind in COLLECTIVES:
                peer, nbytes = collective_sent(action, device)
            else:
                continue
            if not peer:
                continue
            route = problem.links.route(index[device], index[peer])
            for name, rate in route.resources if route is not None else ():
                load[name] = load.get(name, 0.0) + nbytes / rate
    return load


def _cannot_matter(problem: Problem, change: Change, today_s: float) -> str:
    """Why no plan can gain by a change; empty if one might."""
    if change.kind == "link" and not change.resources:
        return "no pair of devices uses it"
    if change.kind == "memory":
        budget, most = problem.cluster.device(change.target).memory_bytes, _most_bytes(problem)
        if budget >= most:
            return f"memory does not bind: {format_bytes(most)} hold any stage, it has {format_bytes(budget)}"
    least = compute_bound(change.problem)
    if today_s < LEAST_GAIN * least:
        return f"no plan for it can be faster than {format_seconds(least)}, by compute alone"
    return ""


def _most_bytes(problem: Problem) -> int:
    """More than any plan needs on one device: each layer a stage, summed, with the whole batch in flight."""
    graph, batch = problem.graph, problem.job.batch
    stages = (
        stage_bytes(graph, i, i + 1, rows=batch, in_flight=1, copies=problem.copies, synced=True)
        for i in range(len(graph))
    )
    fixed = batch * sum(layer.saved_fixed_bytes for layer in graph.layers)
    return sum(stages) + fixed + 2 * batch * (graph.input_row_bytes + graph.label_row_bytes)


def _planned(change: Change, plan: Plan, planner: Planner, today_s: float) -> Sensitivity:
    seconds, strategy = float("inf"), plan.strategy
    for again in (True, False):
        try:
            candidate = planner(change.problem) if again else plan
            found = timeline(change.problem, candidate).step_time_s
        except InfeasibleError:
            continue
        if found < seconds:
            seconds, strategy = found, candidate.strategy
    return Sensitivity(change.text, seconds, today_s / seconds if seconds else 1.0, strategy)
