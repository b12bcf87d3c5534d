"""Plan + ModelGraph to Program: who computes, sends, receives and reduces what, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

from spanwise.core.errors import PlanError
from spanwise.core.model import ModelGraph, TensorSpec
from spanwise.core.plan import Plan, row_ranges
from spanwise.core.precision import Precision, wire_row_bytes
from spanwise.core.program import Action, Program, RowPayload
from spanwise.core.syncs import AnySync, ServerSync, Sync
from spanwise.core.trained import GroupSync
from spanwise.lowering.check import check
from spanwise.lowering.order import StageOp, compute_order
from spanwise.lowering.serve import Key, Serving
from spanwise.lowering.syncs import buckets_of, holders, layers_of, served_names, steppers, updaters
from spanwise.lowering.units import trained_units, units_of


def lower(plan: Plan, graph: ModelGraph, *, clip: bool = False) -> Program:
    """The checked Program of one training step.

    Args:
        plan: what to run.
        graph: the model it was made for.
        clip: whether gradients are clipped by their global norm, which takes one more exchange.

    Raises:
        PlanError: the plan is for another model, does not cover it, or cannot end.
    """
    program = unchecked(plan, graph, clip=clip)
    check(program, plan, graph)
    return program


def unchecked(plan: Plan, graph: ModelGraph, *, clip: bool = False) -> Program:
    """As ``lower`` for one of many plans that a planner tries: the one that it keeps is lowered again.

    Raises:
        PlanError: the plan is for another model or does not cover it, or a sync has a gap or an overlap.
    """
    if plan.graph_digest != graph.digest:
        raise PlanError(
            f"plan '{plan.strategy}' was made for model {plan.graph_digest}, not for "
            f"'{graph.name}' ({graph.digest}); plan again"
        )
    if clip and any(sync.as_aggregated for sync in plan.servers):
        raise PlanError(
            f"plan '{plan.strategy}': a server updates segments as they are aggregated, but clip_norm needs "
            "all gradients first; choose a plan whose pulls follow all pushes, or train without clip_norm"
        )
    if clip and any(group.way == "masked" for group in plan.groups):
        raise PlanError(
            f"plan '{plan.strategy}': devices of a masked group update by their own gradients, but clip_norm "
            "needs the norm of their sum; choose grouped sums, or train without clip_norm"
        )
    if plan.stages[-1].stop != len(graph):
        raise PlanError(
            f"plan '{plan.strategy}' covers layers [0:{plan.stages[-1].stop}), model "
            f"'{graph.name}' has {len(graph)}; plan again"
        )
    return _Lowering(plan, graph, clip).program()


class _Meeting(NamedTuple):
    """Rows of a device that another has to do with, the same in every micro-batch."""

    peer: str
    rows: tuple[int, int]
    nbytes: int
    precision: Precision


def _summing(sync: AnySync) -> tuple[str, ...]:
    """Devices whose gradients a sync takes before the step."""
    if not isinstance(sync, GroupSync):
        return sync.devices
    return sync.trainers if sync.way == "grouped" and len(sync.trainers) > 1 else ()


class _Lowering:
    """State of one lowering: transfer numbers and the growing lists."""

    def __init__(self, plan: Plan, graph: ModelGraph, clip: bool) -> None:
        self.plan, self.graph, self.clip = plan, graph, clip
        self.buckets = buckets_of(plan, graph)
        self.stepping = steppers(plan, graph, self.buckets)
        self.norming = updaters(plan, graph, self.buckets) if clip else ()
        self.serving = Serving(plan, graph, self.buckets, self._number)
        self.users = graph.users
        self.sizes = {p.name: p.bytes for p in graph.parameters}
        self.sizes |= {unit.text: unit.nbytes for unit in units_of(plan, graph)}
        self.actions: dict[str, list[Action]] = {device: [] for device in plan.devices}
        self.sources = row_ranges(plan.sources)
        self.ranges = tuple(stage.row_ranges() for stage in plan.stages)
        self.rows = [{device: (a, b) for device, a, b in held} for held in self.ranges]
        self.numbers: dict[Key, int] = {}
        self.meetings: dict[tuple[str, str, RowPayload, int], tuple[_Meeting, ...]] = {}

    def program(self) -> Program:
        order = compute_order(self.plan)
        for device in self.plan.devices:
            self._device(device, order.get(device, ()))
        held = {d: list[str]() for d in self.plan.devices}
        served = served_names(self.plan, self.buckets)
        for name, devices in holders(self.plan.stages, self.graph).items():
            server = served.get(name)
            for device in devices if server is None else dict.fromkeys((*devices, server)):
                held[device].append(name)
        return Program(
            {d: tuple(a) for d, a in self.actions.items()},
            {d: tuple(names) for d, names in held.items()},
            self.buckets,
            self.serving.pulled,
            self._trained(held),
        )

    def _trained(self, held: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
        """Units by device, with the parameters of stages that train everything; empty if all stages do."""
        if not self.plan.sparse:
            return {}
        found = trained_units(self.plan, self.graph)
        apart = {unit.parameter for unit in units_of(self.plan, self.graph)}
        return {d: (*found.get(d, ()), *(n for n in names if n not in apart)) for d, names in held.items()}

    def _device(self, device: str, order: tuple[StageOp, ...]) -> None:
        loads = self._load_slots(device, order)
        self._loads(device, loads.get(-1, ()))
        # Down to which layer the last micro-batch has left gradients behind, by stage.
        reached = {op.stage: self.plan.stages[op.stage].stop for op in order}
        reduced: dict[int, int] = {}
        pulls = self.serving.pulls(device, order)
        for position, op in enumerate(order):
            self.actions[device] += pulls.get(position, ())
            match op.kind:
                case "forward":
                    self._forward(device, op)
                case "backward_input":
                    self._backward(device, op)
                case "backward" | "backward_weight":
                    for start in self._finish(device, op):
                        if self._is_last(op):
                            reached[op.stage] = start
                            self._reduce(device, reached, reduced)
            self._loads(device, loads.get(position, ()))
        first, then = self.serving.served(device)
        out = self.actions[device]
        out += first
        if device in self.norming:
            out.append(Action("norm", members=self.norming))
        out += then
        if device in self.stepping:
            out.append(Action("step"))
        out += self._passed_on(device)

    def _load_slots(self, device: str, order: tuple[StageOp, ...]) -> dict[int, tuple[int, ...]]:
        """After which position of the compute order each micro-batch is loaded; -1 = at the start.

        A source that computes the first stage loads a little ahead of itself, so that raw rows for
        others do not stand before activations in the queue of a link.
        """
        if device not in {source.device for source in self.plan.sources}:
            return {}
        total = self.plan.micro_batches
        own = [i for i, op in enumerate(order) if op.stage == 0 and op.kind == "forward"]
        if not own:
            return {-1: tuple(range(total))}
        ahead = min(total, self.plan.stages[0].warmup + 1)
        slots: dict[int, tuple[int, ...]] = {-1: tuple(range(ahead))}
        for micro_batch in range(ahead, total):
            slots[own[micro_batch - ahead]] = (micro_batch,)
        return slots

    def _loads(self, device: str, micro_batches: tuple[int, ...]) -> None:
        for m in micro_batches:
            a, b = next((a, b) for d, a, b in self.sources if d == device)
            self.actions[device].append(Action("load", micro_batch=m, rows=(a, b)))
            self._moves("send", device, "input", -1, m, (a, b), self.ranges[0])
            self._moves("send", device, "label", -1, m, (a, b), self.ranges[-1])

    def _forward(self, device: str, op: StageOp) -> None:
        s, m = op.stage, op.micro_batch
        rows = self._rows(s, device)
        if s == 0:
            self._moves("recv", device, "input", -1, m, rows, self.sources)
        else:
            self._moves("recv", device, "activation", s - 1, m, rows, self.ranges[s - 1])
        if s == len(self.ranges) - 1:
            self._moves("recv", device, "label", -1, m, rows, self.sources)
        self.actions[device].append(Action("forward", s, m, rows))
        if s + 1 < len(self.ranges):
            self._moves("send", device, "activation", s, m, rows, self.ranges[s + 1])

    def _backward(self, device: str, op: StageOp) -> None:
        s, m = op.stage, op.micro_batch
        rows = self._rows(s, device)
        if s + 1 < len(self.ranges):
            self._moves("recv", device, "gradient", s, m, rows, self.ranges[s + 1])
        self.actions[device].append(Action(op.kind, s, m, rows))
        if s > 0:
            self._moves("send", device, "gradient", s - 1, m, rows, self.ranges[s - 1])

    def _finish(self, device: str, op: StageOp) -> Iterator[int]:
        """What ends the backward of a micro-batch; yields the layer down to which its gradients are there.

        Where gradients are summed in several segments, the last micro-batch goes through in halves, and the
        weight half in parts, with those of others that are done at once with it, so that each segment can be
        summed as soon as its layers are done.
        """
        stage, rows = self.plan.stages[op.stage], self._rows(op.stage, device)
        borders = self._borders(device, op.stage) if self._is_last(op) else []
        if op.kind == "backward":
            self._backward(device, op._replace(kind="backward_input") if borders else op)
            if not borders:
                yield stage.start
                return
        edges = [stage.stop, *borders, stage.start]
        for stop, start in pairwise(edges):
            part = (start, stop) if borders else None
            self.actions[device].append(
                Action("backward_weight", op.stage, op.micro_batch, rows, part, at_once=op.at_once)
            )
            yield start

    def _is_last(self, op: StageOp) -> bool:
        """Whether the last micro-batch is among those of a backward."""
        return op.micro_batch + op.at_once == self.plan.micro_batches

    def _borders(self, device: str, stage: int) -> list[int]:
        """Layers inside a stage at which the gradients of a segment are complete, falling."""
        first, stop = self.plan.stages[stage].start, self.plan.stages[stage].stop
        lowest = {
            min(first_layers)
            for sync, segments in zip(self.plan.syncs, self.buckets, strict=True)
            if isinstance(sync, Sync) and device in sync.devices and len(segments) > 1
            for names in segments
            if (first_layers := [i for name in names for i in self.users[name] if first <= i < stop])
        }
        return sorted(lowest - {first}, reverse=True)

    def _reduce(self, device: str, reached: dict[int, int], reduced: dict[int, int]) -> None:
        """Starts every sum whose gradients on this device are complete, or pushes these to the server.

        Segments of a sync go from the last to the first, on all its devices alike: one ring follows another.
        """
        for number, sync in enumerate(self.plan.syncs):
            if device not in _summing(sync):
                continue
            segments = self.buckets[number]
            for segment in range(len(segments) - 1 - reduced.get(number, 0), -1, -1):
                names = segments[segment]
                if not all(self._is_complete(name, reached) for name in names):
                    break
                reduced[number] = reduced.get(number, 0) + 1
                if not isinstance(sync, ServerSync):
                    nbytes = sum(self.sizes[name] for name in names)
                    self.actions[device].append(
                        Action("reduce", sync=number, segment=segment, nbytes=nbytes, members=_summing(sync))
                    )
                elif names and device != sync.server:
                    self.actions[device].append(self.serving.push(device, number, segment))

    def _passed_on(self, device: str) -> Iterator[Action]:
        """What goes from those who train to all who hold it, after the update; in one order everywhere."""
        for number, sync in enumerate(self.plan.syncs):
            if not isinstance(sync, GroupSync) or device not in sync.devices:
                continue
            for segment, names in enumerate(self.buckets[number]):
                nbytes = sum(self.sizes[name] for name in names)
                if sync.way == "masked":
                    yield Action("average", sync=number, segment=segment, nbytes=nbytes, members=sync.devices)
                elif sync.receivers and device in sync.chain:
                    yield Action(
                        "broadcast", sync=number, segment=segment, nbytes=nbytes, members=sync.chain,
                        every=sync.refresh_every,
                    )  # fmt: skip

    def _is_complete(self, name: str, reached: dict[int, int]) -> bool:
        stages = self.plan.stages
        return all(
            layer >= low
            for layer in layers_of(name, self.graph)
            for stage, low in reached.items()
            if stages[stage].start <= layer < stages[stage].stop
        )

    def _rows(self, stage: int, device: str) -> tuple[int, int]:
        return self.rows[stage][device]

    def _moves(
        self,
        kind: Literal["send", "recv"],
        device: str,
        payload: RowPayload,
        stage: int,
        micro_batch: int,
        rows: tuple[int, int],
        others: tuple[tuple[str, int, int], ...],
    ) -> None:
        """One send or recv per other device whose rows meet ours; rows that stay here need none."""
        which = (kind, device, payload, stage)
        met = self.meetings.get(which)
        if met is None:
            met = self.meetings[which] = tuple(self._meet(kind, device, payload, stage, rows, others))
        for peer, shared, nbytes, precision in met:
            ends = (device, peer) if kind == "send" else (peer, device)
            number = self._number((payload, stage, micro_batch, *ends))
            self.actions[device].append(  # by position, which is faster: most actions are messages
                Action(
                    kind, stage, micro_batch, shared, None, payload, peer, number, nbytes, precision=precision
                )
            )

    def _number(self, key: Key) -> int:
        """Of a transfer: the same at both of its ends."""
        return self.numbers.setdefault(key, len(self.numbers))

    def _meet(
        self,
        kind: str,
        device: str,
        payload: RowPayload,
        stage: int,
        rows: tuple[int, int],
        others: tuple[tuple[str, int, int], ...],
    ) -> Iterator[_Meeting]:
        specs = self._specs(payload, stage)
        if not any(spec.row_bytes for spec in specs):
            return
        for peer, c, e in others:
            first, last = max(rows[0], c), min(rows[1], e)
            if peer == device or first >= last:
                continue
            ends = (device, peer) if kind == "send" else (peer, device)
            precision = self.plan.precision(*ends) if stage >= 0 else "full"  # raw rows stay as they are
            yield _Meeting(peer, (first, last), wire_row_bytes(specs, precision) * (last - first), precision)

    def _specs(self, payload: RowPayload, stage: int) -> tuple[TensorSpec, ...]:
        match payload:
            case "input":
                return self.graph.inputs
            case "label":
                return self.graph.labels
            case "activation":
                return self.graph.layers[self.plan.stages[stage].stop - 1].outputs
            case "gradient":
                outputs = self.graph.layers[self.plan.stages[stage].stop - 1].outputs
                return tuple(spec for spec in outputs if spec.differentiable)
