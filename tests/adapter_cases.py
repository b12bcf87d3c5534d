"""A run that is only simulated: what its devices would show if the world were other than believed."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from spanwise.core.cluster import Cluster
from spanwise.core.model import ModelGraph
from spanwise.core.observed import Arrival, ComputeTime, Departure, DeviceStep, noted
from spanwise.core.plan import Plan
from spanwise.core.profile import LinkTimes, Profile
from spanwise.core.program import Action
from spanwise.core.timeline import Timeline
from spanwise.lowering import lower
from spanwise.planner.adapting.ratios import Expected
from spanwise.planner.problem import Problem
from spanwise.simulator import simulate


def timeline_of(problem: Problem, plan: Plan, world: Profile) -> Timeline:
    """What happens where devices and links are as ``world`` says."""
    return _timeline(problem.graph, problem.cluster, plan, world)


@functools.lru_cache(maxsize=64)
def _timeline(graph: ModelGraph, cluster: Cluster, plan: Plan, world: Profile) -> Timeline:
    """Simulated once for all steps that go alike."""
    return simulate(lower(plan, graph), plan, graph, world, cluster)


def shown(
    problem: Problem, plan: Plan, world: Profile, *, noise: float = 0.0, seed: int = 0
) -> tuple[float, tuple[DeviceStep, ...]]:
    """Step time and what the devices tell of a step in that world; ``noise`` is a relative deviation."""
    rng = random.Random(seed)
    timeline = timeline_of(problem, plan, world)
    step_s = timeline.step_time_s

    def blurred(value: float) -> float:
        return value * max(0.2, rng.gauss(1.0, noise))

    compute: dict[str, list[ComputeTime]] = {d: [] for d in plan.devices}
    for (device, kind, stage), seconds in Expected.of(timeline).compute_s.items():
        compute[device].append(ComputeTime(kind, stage, blurred(seconds)))
    sent: dict[str, list[Departure]] = {d: [] for d in plan.devices}
    received: dict[str, list[Arrival]] = {d: [] for d in plan.devices}
    last = max(span.step for span in timeline.spans)
    for span in timeline.spans:
        source, arrow, target = span.lane.partition(">")
        if not arrow or span.step != last or span.kind == "reduce":
            continue
        action = Action.parse(span.action)
        came = span.start_s + blurred(span.seconds) + latency_s(problem.cluster, world, source, target)
        sent[source].append(Departure(target, action.transfer, action.nbytes, span.start_s))
        received[target].append(Arrival(source, action.transfer, came, True))
    chosen = {
        (d, p): noted([(x.tag, x.nbytes) for x in sent[d] if x.peer == p])
        for d in plan.devices
        for p in plan.devices
    }
    for d in plan.devices:
        sent[d] = [x for x in sent[d] if x.tag in chosen[d, x.peer]]
        received[d] = [x for x in received[d] if x.tag in chosen[x.peer, d]]
    steps = tuple(DeviceStep(d, tuple(compute[d]), tuple(sent[d]), tuple(received[d])) for d in plan.devices)
    return blurred(step_s), steps


def latency_s(cluster: Cluster, world: Profile, source: str, target: str) -> float:
    known = {(x.source, x.target): x.latency_s for x in world.links}
    return known.get((source, target), cluster.route(source, target).latency_s)


def slower(profile: Profile, device: str, factor: float) -> Profile:
    """The profile with one device ``factor`` times as slow."""
    devices = tuple(
        d.model_copy(update={"factor": d.factor * factor}) if d.device == device else d
        for d in profile.devices
    )
    return profile.model_copy(update={"devices": devices})


def thinner(profile: Profile, cluster: Cluster, pairs: Sequence[tuple[str, str]], factor: float) -> Profile:
    """The profile with some links at ``1 / factor`` of their rate."""
    links = tuple(
        LinkTimes(
            source=a, target=b, latency_s=cluster.route(a, b).latency_s,
            bandwidth_bytes_per_s=cluster.route(a, b).bandwidth_bytes_per_s / factor,
        )
        for a, b in pairs
    )  # fmt: skip
    return profile.model_copy(update={"links": (*profile.links, *links)})
