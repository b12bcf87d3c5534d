"""Who sums which gradients with whom, and who updates which parameters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from spanwise.core.errors import PlanError
from spanwise.core.model import ModelGraph, Parameter
from spanwise.core.plan import Plan, Stage
from spanwise.core.program import Buckets
from spanwise.core.syncs import ServerSync, Sync
from spanwise.core.trained import GroupSync, parse_unit
from spanwise.lowering.units import Unit, check_units, unit_buckets

Segments = tuple[tuple[str, ...], ...]  # names of parameters by segment


def holders(stages: tuple[Stage, ...], graph: ModelGraph) -> dict[str, tuple[str, ...]]:
    """Devices whose stages use each parameter, in stage and replica order."""
    found: dict[str, dict[str, None]] = {}
    for stage in stages:
        for parameter in graph.parameters_of(stage.start, stage.stop):
            found.setdefault(parameter.name, {}).update(dict.fromkeys(stage.devices))
    return {name: tuple(devices) for name, devices in found.items()}


def natural_syncs(stages: tuple[Stage, ...], graph: ModelGraph) -> tuple[Sync, ...]:
    """One Sync per set of devices that share parameters: replicas of a stage, holders of a tied weight.

    None of stages of which some device trains a part: see ``group_syncs``.
    """
    if not graph.ties and all(len(stage.replicas) == 1 for stage in stages):
        return ()
    owners, apart = holders(stages, graph), _apart(stages, graph)
    groups: dict[tuple[str, ...], set[int]] = {}
    order: dict[frozenset[str], tuple[str, ...]] = {}
    for index, layer in enumerate(graph.layers):
        for parameter in layer.parameters:
            devices = owners[parameter.name]
            if len(devices) > 1 and parameter.name not in apart:
                ring = order.setdefault(frozenset(devices), devices)
                groups.setdefault(ring, set()).add(index)
    return tuple(Sync(layers=_ranges(where), devices=ring) for ring, where in groups.items())


def _apart(stages: tuple[Stage, ...], graph: ModelGraph) -> set[str]:
    """Parameters of stages of which some device trains a part."""
    return {p.name for s in stages if s.sparse for p in graph.parameters_of(s.start, s.stop)}


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
    owners, apart = holders(plan.stages, graph), _apart(plan.stages, graph)
    covered: set[str] = set()
    out: list[tuple[tuple[str, ...], ...]] = []
    for number, sync in enumerate(plan.syncs):
        if isinstance(sync, GroupSync):
            units = unit_buckets(plan, graph, sync, number)
            _cover(plan, [unit.text for unit in units], covered)
            out.append(_equal_segments(units, sync.segments))
            continue
        chosen = _meant(plan, sync, graph, owners)
        if not chosen:
            raise PlanError(
                f"plan '{plan.strategy}': sync {number} over {', '.join(sync.devices)} covers no parameter "
                "that exactly these devices hold; remove it"
            )
        _cover(plan, [parameter.name for parameter in chosen], covered)
        if isinstance(sync, ServerSync):
            out.append(by_first_use((p.name for p in chosen), graph, sync.pushes))
        elif sync.ends is not None:
            out.append(tuple(filter(None, by_first_use((p.name for p in chosen), graph, sync.ends))))
        else:
            out.append(_equal_segments(chosen, sync.segments))
    for name, devices in owners.items():
        if len(devices) > 1 and name not in covered and name not in apart:
            raise PlanError(
                f"plan '{plan.strategy}': '{name}' is held by {', '.join(devices)} and no sync sums its "
                "gradient; replicas would drift apart"
            )
    if apart:
        check_units(plan, graph, covered)
    return tuple(out)


def ring_parameters(plan: Plan, graph: ModelGraph, sync: Sync) -> list[Parameter]:
    """Those whose gradients a sync of a plan sums, in the graph's order."""
    return _meant(plan, sync, graph, holders(plan.stages, graph))


def _meant(
    plan: Plan, sync: Sync | ServerSync, graph: ModelGraph, owners: Mapping[str, tuple[str, ...]]
) -> list[Parameter]:
    inside = {i for start, stop in sync.layers for i in range(start, stop)}
    members, users, apart = set(sync.devices), graph.users, _apart(plan.stages, graph)
    return [
        p
        for p in graph.parameters
        if set(owners[p.name]) == members and inside.issuperset(users[p.name]) and p.name not in apart
    ]


def _cover(plan: Plan, names: Iterable[str], covered: set[str]) -> None:
    for name in names:
        if name in covered:
            raise PlanError(
                f"plan '{plan.strategy}': gradient of '{name}' is summed twice; keep it in one sync"
            )
        covered.add(name)


def _equal_segments(parts: Sequence[Parameter] | Sequence[Unit], count: int) -> tuple[tuple[str, ...], ...]:
    """Consecutive pieces of about equal bytes, as many as asked for or as there are parameters or units."""
    sizes = [(p.text, p.nbytes) if isinstance(p, Unit) else (p.name, p.bytes) for p in parts]
    total = sum(nbytes for _, nbytes in sizes)
    pieces: list[list[str]] = [[]]
    done = 0
    for name, nbytes in sizes:
        if pieces[-1] and done >= total * len(pieces) / count and len(pieces) < count:
            pieces.append([])
        pieces[-1].append(name)
        done += nbytes
    return tuple(map(tuple, pieces))


def layers_of(name: str, graph: ModelGraph) -> tuple[int, ...]:
    """Layers that use a parameter or unit of a bucket."""
    return graph.users[parse_unit(name)[0]]


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
