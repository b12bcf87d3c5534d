"""Units: the pieces of parameters that one set of devices trains, and the syncs that pass their values on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from spanwise.core.errors import PlanError
from spanwise.core.model import ModelGraph, Parameter
from spanwise.core.plan import Plan, Stage
from spanwise.core.trained import GroupSync, unit_text


@dataclass(frozen=True, slots=True)
class Unit:
    """A parameter, or channels of it, in a stage of which some device trains a part.

    ``text`` names it. ``trainers`` and ``receivers`` are the devices that hold it, in replica order.
    """

    text: str
    parameter: str
    layer: int
    nbytes: int
    trainers: tuple[str, ...]
    receivers: tuple[str, ...]


def units_of(plan: Plan, graph: ModelGraph) -> tuple[Unit, ...]:
    """Units of all stages of which some device trains a part, in order of first use.

    Raises:
        PlanError: a device trains what it does not hold, or channels of what has none, or a parameter of such
            a stage is used by another stage too.
    """
    out: list[Unit] = []
    for stage in plan.stages:
        if stage.sparse:
            _check(plan, stage, graph)
            for parameter in graph.parameters_of(stage.start, stage.stop):
                out += _of_parameter(stage, graph, parameter)
    return tuple(out)


def _of_parameter(stage: Stage, graph: ModelGraph, parameter: Parameter) -> list[Unit]:
    name = parameter.name
    channels = graph.sliceable[name][1] if name in graph.sliceable else 1
    counts = {replica.device: _count(replica.trained, name, channels) for replica in stage.replicas}
    edges = sorted({0, channels, *counts.values()})
    found: list[Unit] = []
    for first, last in pairwise(edges):
        trainers = tuple(device for device, count in counts.items() if count >= last)
        receivers = tuple(device for device in counts if device not in trainers)
        nbytes = parameter.bytes * (last - first) // channels
        text = unit_text(name, first, last, channels)
        found.append(Unit(text, name, graph.users[name][0], nbytes, trainers, receivers))
    return found


def _count(trained: dict[str, int | None] | None, name: str, channels: int) -> int:
    """How many channels of a parameter a device trains."""
    if trained is None:
        return channels
    count = trained.get(name, 0)
    return channels if count is None else count


def _check(plan: Plan, stage: Stage, graph: ModelGraph) -> None:
    own = {p.name for p in graph.parameters_of(stage.start, stage.stop)}
    for name in own:
        if any(not stage.start <= layer < stage.stop for layer in graph.users[name]):
            raise PlanError(
                f"plan '{plan.strategy}': '{name}' is used by several stages, of which one trains some "
                "parameters only; a tied weight needs stages that train everything"
            )
    for replica in stage.replicas:
        for one in replica.trains or ():
            if one.parameter not in own:
                raise PlanError(
                    f"plan '{plan.strategy}': '{replica.device}' trains '{one.parameter}', which layers "
                    f"[{stage.start}:{stage.stop}) do not use; name parameters of its own stages"
                )
            if one.channels is None:
                continue
            channels = graph.sliceable.get(one.parameter, (0, 0))[1]
            if channels != len(plan.ranking.get(one.parameter, ())):
                raise PlanError(
                    f"plan '{plan.strategy}': '{one.parameter}' has {channels} channels that can be trained "
                    f"one by one, its ranking has {len(plan.ranking.get(one.parameter, ()))}; plan again"
                )


def group_syncs(plan: Plan, graph: ModelGraph) -> tuple[GroupSync, ...]:
    """One sync for each set of trainers of a stage that passes its units on or sums their gradients."""
    found: dict[tuple[int, int, tuple[str, ...]], tuple[str, ...]] = {}
    starts = [stage.start for stage in plan.stages]
    for unit in units_of(plan, graph):
        if unit.trainers and len(unit.trainers) + len(unit.receivers) > 1:
            at = max(i for i, start in enumerate(starts) if start <= unit.layer)
            found[plan.stages[at].start, plan.stages[at].stop, unit.trainers] = unit.receivers
    return tuple(
        GroupSync(layers=((start, stop),), trainers=trainers, receivers=receivers)
        for (start, stop, trainers), receivers in found.items()
    )


def unit_buckets(plan: Plan, graph: ModelGraph, sync: GroupSync, number: int) -> tuple[Unit, ...]:
    """The units that a sync is about: those in its layers that exactly its trainers train."""
    inside = {layer for start, stop in sync.layers for layer in range(start, stop)}
    chosen = tuple(
        unit
        for unit in units_of(plan, graph)
        if unit.layer in inside
        and set(unit.trainers) == set(sync.trainers)
        and set(unit.receivers) == set(sync.receivers)
    )
    if not chosen:
        raise PlanError(
            f"plan '{plan.strategy}': sync {number} of {', '.join(sync.trainers)} has no unit that exactly "
            "these devices train; remove it"
        )
    return chosen


def check_units(plan: Plan, graph: ModelGraph, covered: set[str]) -> None:
    """``PlanError`` if a unit that several devices hold and some train is in no sync: copies would drift."""
    for unit in units_of(plan, graph):
        shared = unit.trainers and len(unit.trainers) + len(unit.receivers) > 1
        if shared and unit.text not in covered:
            raise PlanError(
                f"plan '{plan.strategy}': '{unit.text}' is trained by {', '.join(unit.trainers)} and no sync "
                "passes it on; replicas would drift apart"
            )


def trained_units(plan: Plan, graph: ModelGraph) -> dict[str, tuple[str, ...]]:
    """Names of the units that each device trains, of stages of which some device trains a part."""
    out: dict[str, list[str]] = {}
    for unit in units_of(plan, graph):
        for device in unit.trainers:
            out.setdefault(device, []).append(unit.text)
    return {device: tuple(names) for device, names in out.items()}


def mean_rows(plan: Plan, sync: GroupSync) -> dict[str, int]:
    """Rows of a micro-batch that each trainer of a sync computes in its stage."""
    start = sync.layers[0][0]
    stage = next(stage for stage in plan.stages if stage.start <= start < stage.stop)
    rows = {replica.device: replica.rows for replica in stage.replicas}
    return {device: rows[device] for device in sync.trainers}
