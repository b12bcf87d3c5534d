"""From one plan to another: which device must send what to which, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from spanwise.core.cluster import Cluster
from spanwise.core.errors import PlanError
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.lowering.syncs import buckets_of, holders, served_names


@dataclass(frozen=True, slots=True)
class Move:
    """State that one device sends to another: parameters with their optimizer state, and buffers, by name."""

    source: str
    target: str
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()


class _Kept(NamedTuple):
    """Devices by parameter: all with a copy, and those of them that update it and so have its state."""

    copies: dict[str, tuple[str, ...]]
    updating: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, plan: Plan, graph: ModelGraph) -> _Kept:
        """Of a plan; where there is a server, it alone updates."""
        held, served = holders(plan.stages, graph), served_names(plan, buckets_of(plan, graph))
        servers = {name: (server,) for name, server in served.items()}
        copies = {n: tuple(dict.fromkeys((*found, *servers.get(n, ())))) for n, found in held.items()}
        return cls(copies, held | servers)


def buffer_holders(plan: Plan, graph: ModelGraph) -> dict[str, tuple[tuple[str, int], ...]]:
    """(device, rows) of every replica that keeps a buffer, such as running statistics."""
    out: dict[str, tuple[tuple[str, int], ...]] = {}
    for stage in plan.stages:
        for layer in graph.layers[stage.start : stage.stop]:
            for name in layer.buffers:
                out.setdefault(name, tuple((r.device, r.rows) for r in stage.replicas))
    return out


def moves(old: Plan, new: Plan, graph: ModelGraph, cluster: Cluster) -> tuple[Move, ...]:
    """What the devices of ``new`` lack and who of ``old`` sends it.

    A parameter comes with its optimizer state from one of the devices that update it, as all have the same:
    over the link that is done first, those that a device sends already counted in. Who had a copy that a
    server updated, and will not update it either, has all that it needs. A buffer comes from all of its
    holders, since each has seen its own rows; the receiver takes their mean by rows, as a checkpoint does.

    Raises:
        PlanError: no holder has a link to a device that lacks a parameter, or devices of one of the plans
            train some parameters only: then copies may differ, and nobody has the optimizer state of all.
    """
    for plan in (old, new):
        if plan.sparse:
            raise PlanError(
                f"plan '{plan.strategy}': its devices train some parameters only; such a run keeps its plan, "
                "start it again from a checkpoint to change it"
            )
    before, after = _Kept.of(old, graph), _Kept.of(new, graph)
    sizes = {parameter.name: parameter.bytes for parameter in graph.parameters}
    parameters: dict[tuple[str, str], list[str]] = {}
    given: dict[str, float] = {}  # seconds that each device is busy sending
    for name, targets in after.copies.items():
        sources = before.updating[name]
        for target in targets:
            used_only = target in before.copies[name] and target not in after.updating[name]
            if target in sources or used_only:
                continue
            reach = [h for h in sources if cluster.connected(h, target)]
            if not reach:
                raise PlanError(
                    f"plan '{new.strategy}': '{target}' lacks '{name}', and none of its holders "
                    f"({', '.join(sources)}) has a link to it; plan again"
                )
            ends = {
                h: given.get(h, 0.0) + sizes[name] / cluster.route(h, target).bandwidth_bytes_per_s
                for h in reach
            }
            source = min(reach, key=lambda h: ends[h])
            given[source] = ends[source]
            parameters.setdefault((source, target), []).append(name)
    buffers = _buffer_moves(old, new, graph, cluster)
    pairs = sorted(parameters.keys() | buffers.keys())
    return tuple(
        Move(a, b, tuple(parameters.get((a, b), ())), tuple(buffers.get((a, b), ()))) for a, b in pairs
    )


def move_bytes(move: Move, graph: ModelGraph, copies: int) -> int:
    """Bytes of the tensors of a move; ``copies`` is how often the optimizer keeps each parameter."""
    sizes = {parameter.name: parameter.bytes for parameter in graph.parameters}
    wanted = set(move.buffers)
    # Sizes are known by layer only: of a layer of which some buffers move, all count.
    kept = sum(layer.buffer_bytes for layer in graph.layers if wanted.intersection(layer.buffers))
    return (1 + copies) * sum(sizes[name] for name in move.parameters) + kept


def _buffer_moves(
    old: Plan, new: Plan, graph: ModelGraph, cluster: Cluster
) -> dict[tuple[str, str], list[str]]:
    held, out = buffer_holders(old, graph), dict[tuple[str, str], list[str]]()
    kept, wanted = _buffers_by_device(old, graph), _buffers_by_device(new, graph)
    for target, names in wanted.items():
        for name in names:
            if name in kept.get(target, {}):
                continue
            for source, _ in held[name]:
                if not cluster.connected(source, target):
                    raise PlanError(
                        f"plan '{new.strategy}': '{target}' lacks '{name}', and '{source}', which has a part "
                        "in its mean, has no link to it; plan again"
                    )
                out.setdefault((source, target), []).append(name)
    return out


def _buffers_by_device(plan: Plan, graph: ModelGraph) -> dict[str, dict[str, None]]:
    out: dict[str, dict[str, None]] = {}
    for stage in plan.stages:
        names = [name for layer in graph.layers[stage.start : stage.stop] for name in layer.buffers]
        for device in stage.devices:
            out.setdefault(device, {}).update(dict.fromkeys(names))
    return out
