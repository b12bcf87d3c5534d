"""Who sums which gradients with whom, and who updates which parameters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from spanwise.core.errors import PlanError
from spanwise.core.model import ModelGraph, Parameter
from spanwise.core.plan import Plan, ServerSync, Stage, Sync
from spanwise.core.program import Buckets

Segments = tuple[tuple[str, ...], ...]  # names of parameters by segment


def holders(stages: tuple[Stage, ...], graph: ModelGraph) -> dict[str, tuple[str, ...]]:
    """Devices whose stages use each parameter, in stage and replica order."""
    found: dict[str, dict[str, None]] = {}
    for stage in stages:
        for parameter in graph.parameters_of(stage.start, stage.stop):
            found.setdefault(parameter.name, {}).update(dict.fromkeys(stage.devices))
    return {name: tuple(devices) for name, devices in found.items()}


def natural_syncs(stages: tuple[Stage, ...], graph: ModelGraph) -> tuple[Sync, ...]:
    """One Sync per set of devices that share parameters: replicas of a stage, holders of a tied weight."""
    if not graph.ties and all(len(stage.replicas) == 1 for stage in stages):
        return ()
    owners = holders(stages, graph)
    groups: dict[tuple[str, ...], set[int]] = {}
    order: dict[frozenset[str], tuple[str, ...]] = {}
    for index, layer in enumerate(graph.layers):
        for parameter in layer.parameters:
            devices = owners[parameter.name]
            if len(devices) > 1:
                ring = order.setdefault(frozenset(devices), devices)
                groups.setdefault(ring, set()).add(index)
    return tuple(Sync(layers=_ranges(where), devices=ring) for ring, where in groups.items())


def _ranges(indices: set[int]) -> tuple[tuple[int, int], ...]:
    out: list[tuple[int, int]] = []
    for index in sorted(indices):
        if out and out[-1][1] == index:
            out[-1] = (out[-1][0], index + 1)
        else:
            out.append((index, index + 1))
    return tuple(out)


def buckets_of(plan: Plan, graph: ModelGraph) -> Buckets:
    """Parameters of every segment of every sync; refuses gaps and overlaps."""
    owners = holders(plan.stages, graph)
    covered: set[str] = set()
    out: list[tuple[tuple[str, ...], ...]] = []
    for number, sync in enumerate(plan.syncs):
        chosen = _meant(sync, graph, owners)
        if not chosen:
            raise PlanError(
                f"plan '{plan.strategy}': sync {number} over {', '.join(sync.devices)} covers no parameter "
                "that exactly these devices hold; remove it"
            )
        for parameter in chosen:
            if parameter.name in covered:
                raise PlanError(
                    f"plan '{plan.strategy}': gradient of '{parameter.name}' is summed twice; "
                    "keep it in one sync"
                )
            covered.add(parameter.name)
        if isinstance(sync, ServerSync):
            out.append(by_first_use((p.name for p in chosen), graph, sync.pushes))
        elif sync.ends is not None:
            out.append(tuple(filter(None, by_first_use((p.name for p in chosen), graph, sync.ends))))
        else:
            out.append(_equal_segments(chosen, sync.segments))
    for name, devices in owners.items():
        if len(devices) > 1 and name not in covered:
            raise PlanError(
                f"plan '{plan.strategy}': '{name}' is held by {', '.join(devices)} and no sync sums its "
                "gradient; replicas would drift apart"
            )
    return tuple(out)


def ring_parameters(plan: Plan, graph: ModelGraph, sync: Sync) -> list[Parameter]:
    """Those whose gradients a sync of a plan sums, in the graph's order."""
    return _meant(sync, graph, holders(plan.stages, graph))


def _meant(
    sync: Sync | ServerSync, graph: ModelGraph, owners: Mapping[str, tuple[str, ...]]
) -> list[Parameter]:
    inside = {i for start, stop in sync.layers for i in range(start, stop)}
    members, users = set(sync.devices), graph.users
    return [
        p for p in graph.parameters if set(owners[p.name]) == members and inside.issuperset(users[p.name])
    ]


def _equal_segments(parameters: list[Parameter], count: int) -> tuple[tuple[str, ...], ...]:
    """Consecutive pieces of about equal bytes, as many as asked for or as there are parameters."""
    total = sum(p.bytes for p in parameters)
    pieces: list[list[str]] = [[]]
    done = 0
    for parameter in parameters:
        if pieces[-1] and done >= total * len(pieces) / count and len(pieces) < count:
            pieces.append([])
        pieces[-1].append(parameter.name)
        done += parameter.bytes
    return tuple(map(tuple, pieces))


def by_first_use(names: Iterable[str], graph: ModelGraph, ends: Sequence[int]) -> Segments:
    """Parameters by the segment of the first layer that uses them; a segment may have none.

    That layer's gradient is the last to be complete, and it is the first to need them.
    """
    out: list[list[str]] = [[] for _ in ends]
    for name in names:
        out[bisect_right(ends, min(graph.users[name]))].append(name)
    return tuple(map(tuple, out))


def pulled(plan: Plan, graph: ModelGraph, buckets: Buckets) -> Buckets:
    """Parameters of every pull of every sync; none of those without a server."""
    return tuple(
        by_first_use((name for names in pushes for name in names), graph, sync.pulls)
        if isinstance(sync, ServerSync)
        else ()
        for sync, pushes in zip(plan.syncs, buckets, strict=True)
    )


def steppers(plan: Plan, graph: ModelGraph, buckets: Buckets) -> tuple[str, ...]:
    """Devices that end a step with an update: those that compute, but for those that leave it to a server."""
    if not plan.servers:
        return plan.computing
    served, owners = served_names(plan, buckets), holders(plan.stages, graph)
    holding = {device for devices in owners.values() for device in devices}
    updating = {device for name, devices in owners.items() if name not in served for device in devices}
    return tuple(device for device in plan.computing if device in updating or device not in holding)


def updaters(plan: Plan, graph: ModelGraph, buckets: Buckets) -> tuple[str, ...]:
    """Those and the servers: who takes part in a gradient norm."""
    servers = (sync.server for sync in plan.servers)
    return tuple(dict.fromkeys((*steppers(plan, graph, buckets), *servers)))


def served_names(plan: Plan, buckets: Buckets) -> dict[str, str]:
    """The server of each parameter that has one."""
    return {
        name: sync.server
        for sync, segments in zip(plan.syncs, buckets, strict=True)
        if isinstance(sync, ServerSync)
        for names in segments
        for name in names
    }
