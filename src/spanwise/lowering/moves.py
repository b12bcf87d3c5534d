"""From one plan to another: which device must send what to which, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from spanwise.core.cluster import Cluster
from spanwise.core.errors import PlanError
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.profile import LinkTimes
from spanwise.core.routes import Routes
from spanwise.lowering.syncs import buckets_of, holders, served_names

MOST_RELAYED = 16  # devices that pass a parameter on, and among which the next to get it is chosen

_Shared: TypeAlias = tuple[tuple[str, float], ...]  # capacities by name, and bytes per second


@dataclass(frozen=True, slots=True)
class Move:
    """State that one device sends to another: parameters with their optimizer state, and buffers, by name.

    ``relayed``: the source has it from others in this very change, and passes it on.
    """

    source: str
    target: str
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    relayed: bool = False


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


def moves(
    old: Plan, new: Plan, graph: ModelGraph, cluster: Cluster, links: Iterable[LinkTimes] = ()
) -> tuple[Move, ...]:
    """What the devices of ``new`` lack and who of ``old`` sends it; ``links`` as measured, where they were.

    A parameter comes with its optimizer state from one of the devices that update it, as all have the same,
    or from one that gets it in this change and passes it on: over a slow link it goes once, however many lack
    it behind that link. Of all ways it takes the one that is done first, with all that goes over its links
    already counted in. Who had a copy that a server updated, and will not update it either, has all that it
    needs. A buffer comes from all of its holders, since each has seen its own rows; the receiver takes their
    mean by rows, as a checkpoint does.

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
    ways = _Ways(cluster, Routes(cluster, links))
    parameters: dict[tuple[bool, str, str], list[str]] = {}
    for name, copies in after.copies.items():
        sources, updating = before.updating[name], after.updating[name]
        used_only = set(before.copies[name]) - set(updating)
        targets = [t for t in copies if t not in sources and t not in used_only]
        for relayed, source, target in ways.spread(name, sizes[name], sources, targets, new.strategy):
            parameters.setdefault((relayed, source, target), []).append(name)
    buffers = {(False, *pair): names for pair, names in _buffer_moves(old, new, graph, cluster).items()}
    pairs = sorted(parameters.keys() | buffers.keys())
    return tuple(
        Move(a, b, tuple(parameters.get((late, a, b), ())), tuple(buffers.get((late, a, b), ())), late)
        for late, a, b in pairs
    )


@dataclass
class _Ways:
    """When what goes over links is done, as far as it is known."""

    cluster: Cluster
    routes: Routes
    busy_s: dict[str, float] = field(default_factory=dict[str, float])  # by what messages share
    known: dict[tuple[str, str], _Shared] = field(default_factory=dict[tuple[str, str], "_Shared"])

    def spread(
        self, name: str, nbytes: int, sources: Sequence[str], targets: Sequence[str], strategy: str
    ) -> Iterator[tuple[bool, str, str]]:
        """(relayed, source, target) for every target, the soonest first; of many in the order they have."""
        ready_s, left = dict.fromkeys(sources, 0.0), list(targets)
        relays: set[str] = set()
        while left:
            ends = {
                (source, target): self._end_s(source, target, nbytes, since_s)
                for target in (left if len(left) <= MOST_RELAYED else left[:1])
                for source, since_s in ready_s.items()
                if self.cluster.connected(source, target)
            }
            if not ends:
                raise PlanError(
                    f"plan '{strategy}': '{left[0]}' lacks '{name}', and none of its holders "
                    f"({', '.join(sources)}) has a link to it; plan again"
                )
            source, target = min(ends, key=lambda pair: ends[pair])
            self._take(source, target, nbytes)
            if source in sources and len(relays) < MOST_RELAYED:  # what was passed on stays where it is
                ready_s[target] = ends[source, target]
                relays.add(target)
            left.remove(target)
            yield source in relays, source, target

    def _end_s(self, source: str, target: str, nbytes: int, since_s: float) -> float:
        shared = self._shared(source, target)
        return max((max(self.busy_s.get(n, 0.0), since_s) + nbytes / rate for n, rate in shared), default=0.0)

    def _take(self, source: str, target: str, nbytes: int) -> None:
        for name, rate in self._shared(source, target):
            self.busy_s[name] = self.busy_s.get(name, 0.0) + nbytes / rate

    def _shared(self, source: str, target: str) -> _Shared:
        """What a message holds, and how fast each is at it; a device sends at its own link's rate."""
        found = self.known.get((source, target))
        if found is None:
            route = self.routes.route(source, target)
            found = (*route.resources, (f"sends:{source}", route.bandwidth_bytes_per_s))
            self.known[source, target] = found
        return found


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
