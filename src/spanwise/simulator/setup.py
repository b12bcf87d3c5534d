"""A Program with numbers: every action's cost and message's route, looked up once before the event loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from spanwise.core.cluster import Cluster
from spanwise.core.faults import Fault, slowdown, stretch
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan, Replica
from spanwise.core.profile import Profile
from spanwise.core.program import COLLECTIVES, Action, Program
from spanwise.core.routes import Routes
from spanwise.cost.halves import copied_bytes, weight_s
from spanwise.cost.sparse import (
    Trains,
    chain_pieces,
    sparse_backward_s,
    sparse_saved_bytes,
    sparse_state_bytes,
    unit_bytes,
    working_bytes,
)
from spanwise.cost.training import (
    again_bytes,
    again_s,
    deferred_bytes,
    kept_bytes,
    ring_edge_bytes,
    ring_rounds,
    state_bytes,
)


@dataclass(frozen=True, slots=True)
class Way:
    """Capacities (indices) and latency from one device to another."""

    resources: tuple[int, ...]
    latency_s: float


class Work(NamedTuple):
    """What a compute takes: seconds without faults, and bytes more (or fewer) from begin and end on."""

    seconds: float
    begins_bytes: int = 0
    ends_bytes: int = 0


class Costs:
    """Everything that the event loop asks for."""

    def __init__(
        self, program: Program, plan: Plan, graph: ModelGraph, profile: Profile, cluster: Cluster,
        copies: int, faults: tuple[Fault, ...],
    ) -> None:  # fmt: skip
        self.program, self.plan, self.graph = program, plan, graph
        self.profile, self.cluster = profile, cluster
        self.faults = faults
        self._timed = plan.digest if profile.stages else ""
        self.capacities: list[float] = []
        self._index: dict[str, int] = {}
        self._ways: dict[tuple[str, str], Way] = {}
        self._routes = Routes(cluster, profile.links)
        self.sizes = {p.name: p.bytes for p in graph.parameters}
        self._work: dict[tuple[str, str, int, tuple[int, int] | None, int], Work] = {}
        #: Bytes by device and stage that are kept from a forward.
        self.saved: dict[tuple[str, int], int] = {}
        #: Bytes by device and stage that operations work with above what is kept, where sparse layers run.
        self.transient: dict[tuple[str, int], int] = {}
        #: More bytes by device, stage and kind of backward: held by the layers that it runs again.
        self.again: dict[tuple[str, int, str], int] = {}
        for index, stage in enumerate(plan.stages):
            for replica in stage.replicas:
                key = (replica.device, index)
                ranges, rows = stage.recompute, replica.rows
                if self.partly(replica):
                    trains, stored = self.trains(replica), bool(plan.stored_statistics)
                    kept = sparse_saved_bytes(graph, stage.start, stage.stop, rows, trains, stored=stored)
                    self.saved[key] = sum(kept)
                    self.transient[key] = working_bytes(graph, stage.start, stage.stop, rows, kept)
                    continue
                self.saved[key] = kept_bytes(graph, stage.start, stage.stop, rows, ranges)
                if ranges:
                    for kind, in_halves in (("backward", False), ("backward_input", True)):
                        held = again_bytes(graph, stage.stop, rows, ranges, in_halves=in_halves)
                        self.again[replica.device, index, kind] = held
        self.update: dict[str, float] = {}
        self.message: dict[str, tuple[float, float]] = {}  # seconds of one, and per byte
        self.sum_byte_s: dict[str, float] = {}
        self.base: dict[str, int] = {}
        for device in program.devices:
            own = program.updated.get(device, ())
            held = self._bytes(own)
            used = self._bytes(program.held.get(device, ())) - held  # a server updates these
            buffers = sum(
                layer.buffer_bytes
                for stage in plan.stages
                if device in stage.devices
                for layer in graph.layers[stage.start : stage.stop]
            )
            # Flat buffers that are there throughout: of sums, and of what is pulled for the next step.
            kept = (
                a for a in program.devices[device] if a.kind == "reduce" or (a.kind == "recv" and a.crosses)
            )
            travels = sum(a.nbytes for a in kept)
            state = state_bytes(held, buffers, copies, synced=False)
            self.base[device] = state + state_bytes(used, 0, 0, synced=False) + travels
            stepped = self._bytes(name for name in own if name not in program.served)
            partly = [
                (s, r) for s in plan.stages for r in s.replicas if r.device == device and self.partly(r)
            ]
            if plan.sparse and any(device in stage.devices for stage in plan.stages):
                self.base[device], stepped = self._sparse_base(device, copies)
            elif partly:  # stored statistics, but everything trains
                self.base[device] -= travels
            self.update[device] = profile.update_s(device, stepped) if stepped else 0.0
            table, factor = profile.table(device)
            self.message[device] = (table.message_s * factor, table.message_s_per_byte * factor)
            self.sum_byte_s[device] = table.sum_s_per_byte * factor

    def partly(self, replica: Replica) -> bool:
        """Whether a replica runs layers that keep only what the trained parameters need."""
        return replica.trained is not None or bool(self.plan.stored_statistics)

    def trains(self, replica: Replica) -> Trains:
        """What a replica trains."""
        everything: Trains = dict.fromkeys(self.sizes)
        return everything if replica.trained is None else replica.trained

    def _sparse_base(self, device: str, copies: int) -> tuple[int, int]:
        """What a device holds throughout, and bytes of the parameters that it updates."""
        base = stepped = 0
        for stage in self.plan.stages:
            for replica in stage.replicas:
                if replica.device == device:
                    trains = self.trains(replica)
                    held = self.graph.parameters_of(stage.start, stage.stop)
                    own = unit_bytes(self.graph, trains)
                    base += sparse_state_bytes(self.graph, stage.start, stage.stop, trains, copies)
                    stepped += sum(own.get(p.name, 0) for p in held)
        return base, stepped

    def flat_bytes(self, device: str, action: Action) -> int:
        """Bytes of a collective's buffers while it runs: its parts, the flat buffer, what comes in ahead.

        0 where they are part of the base, as on devices that train everything.
        """
        stages = [s for s in self.plan.stages if device in s.devices]
        if not any(self.partly(r) for s in stages for r in s.replicas if r.device == device):
            return 0
        members = len(action.members)
        ahead = 0 if action.kind == "broadcast" else action.nbytes * min(3, members - 1) // members
        return 2 * action.nbytes + ahead

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(self.sizes[name] for name in names)

    def update_s(self, device: str, action: Action) -> float:
        """Seconds of a server's update of a segment."""
        return self.profile.update_s(device, action.nbytes)

    def work(self, device: str, action: Action) -> Work:
        """What a forward or backward, half or part, takes: the same for all micro-batches."""
        key = (device, action.kind, action.stage, action.layers, action.at_once)
        found = self._work.get(key)
        if found is None:
            found = self._work[key] = self._find_work(device, action)
        return found

    def _find_work(self, device: str, action: Action) -> Work:
        stage = self.plan.stages[action.stage]
        start, stop = action.layers or (stage.start, stage.stop)
        rows = action.rows[1] - action.rows[0]
        seconds = self._compute_s((device, start, stop, rows), action)
        saved = self.saved[device, action.stage]
        # For a weight half, or the part of it, kept from the input half on.
        deferred = deferred_bytes(self.graph, start, stop, rows)
        again = self.again.get((device, action.stage, action.kind), 0)
        works = self.transient.get((device, action.stage), 0)
        match action.kind:
            case "forward":
                return Work(seconds, saved + works, -works)
            case "backward":
                return Work(seconds, again + works, -saved - again - works)
            case "backward_input":
                return Work(seconds, again, deferred - saved - again)
            case _:
                copied = copied_bytes(self.graph, start, stop, rows=rows, count=action.at_once)
                return Work(seconds, copied, -action.at_once * deferred - copied)

    def _compute_s(self, where: tuple[str, int, int, int], action: Action) -> float:
        device = where[0]
        timed = self.profile.stage_s(self._timed, device, action.stage) if self._timed else None
        if timed is not None and action.kind in ("forward", "backward"):
            return timed[action.kind == "backward"]
        again = again_s(self.profile, self.plan.stages[action.stage], device, where[-1])
        match action.kind:
            case "forward":
                return self.profile.forward_s(*where)
            case "backward":
                stage = self.plan.stages[action.stage]
                replica = next(r for r in stage.replicas if r.device == device)
                if replica.trained is not None:
                    return sparse_backward_s(
                        self.profile, self.graph, stage, device, where[-1], replica.trained
                    )
                return self.profile.backward_s(*where) + again
            case "backward_input":
                return self.profile.halves_s(*where)[0] + again
            case _:
                _, start, stop, rows = where
                return weight_s(
                    self.profile, self.graph, device, start, stop, rows=rows, count=action.at_once
                )

    def messages_s(self, device: str, action: Action) -> float:
        """Compute that a device spends on the messages of an action, and on summing what they bring.

        Of a ring on all rounds and the sum.
        """
        each_s, byte_s = self.message[device]
        match action.kind:
            case "send" | "recv":
                summed_s = (
                    self.sum_byte_s[device] if (action.kind, action.payload) == ("recv", "push") else 0.0
                )
                return each_s + action.nbytes * (byte_s + summed_s)
            case "broadcast":
                ends = action.members[:1] + action.members[-1:]
                each = (1 if device in ends else 2) * chain_pieces(action.nbytes)
                nbytes = (1 if device in ends else 2) * action.nbytes
                return each * each_s + nbytes * byte_s
            case "reduce" | "average":
                members = len(action.members)
                both = 2 * ring_rounds(members) * each_s
                messages_s = both + 2 * ring_edge_bytes(members, action.nbytes) * byte_s
                return messages_s + action.nbytes * self.sum_byte_s[device]
            case _:
                return 0.0

    def all_messages_s(self, device: str, actions: Sequence[Action]) -> list[float]:
        """The same of each of these actions."""
        if not any((*self.message[device], self.sum_byte_s[device])):
            return [0.0] * len(actions)
        return [self.messages_s(device, action) for action in actions]

    def way(self, source: str, target: str) -> Way:
        """The route of a message; measured links replace the cluster file's numbers."""
        found = self._ways.get((source, target))
        if found is None:
            found = self._find_way(source, target)
            self._ways[source, target] = found
        return found

    def slowdown(self, device: str, step: int) -> float:
        """Factor on compute by ``slow`` faults."""
        return slowdown(self.faults, device, step)

    def stretch(self, source: str, target: str, step: int) -> float | None:
        """Factor on messages by ``slow`` faults of a link; None when it is cut."""
        return stretch(self.faults, source, target, step)

    def lost(self, device: str, step: int) -> bool:
        """Whether a ``lose`` fault has ended the device."""
        return any(f.kind == "lose" and f.device == device and step >= f.step for f in self.faults)

    def _find_way(self, source: str, target: str) -> Way:
        route = self._routes.route(source, target)
        return Way(tuple(self._resource(name, rate) for name, rate in route.resources), route.latency_s)

    def _resource(self, name: str, rate: float) -> int:
        if name not in self._index:
            self._index[name] = len(self.capacities)
            self.capacities.append(rate)
        return self._index[name]


def ring_edges(action: Action) -> tuple[tuple[str, str], ...]:
    """Neighbours of a ring, or of a chain, in its order."""
    members = action.members
    if action.kind == "broadcast":
        return tuple(pairwise(members))
    return tuple((m, members[(i + 1) % len(members)]) for i, m in enumerate(members))


def all_ways(costs: Costs) -> None:
    """Looks every route up that the Program uses, so that capacities are complete before the loop."""
    for device, actions in costs.program.devices.items():
        for action in actions:
            if action.kind == "send":
                costs.way(device, action.peer)
            elif action.kind in COLLECTIVES:
                for a, b in ring_edges(action):
                    costs.way(a, b)
            elif action.kind == "norm":
                for peer in action.members:
                    if peer != device:
                        costs.way(device, peer)


def feeders(program: Program) -> frozenset[str]:
    """Devices that only send raw rows: nothing that others do holds them up."""
    return frozenset(
        device
        for device, actions in program.devices.items()
        if actions and all(action.kind in ("load", "send") for action in actions)
    )
