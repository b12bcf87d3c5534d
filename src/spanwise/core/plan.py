"""A Plan: decisions only, no predictions. Everything that runs or is simulated follows from one."""

from __future__ import annotations

from functools import cached_property
from itertools import combinations, pairwise
from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, Tag, model_validator

from spanwise.core.cluster import Id
from spanwise.core.errors import PlanError
from spanwise.core.noun import Noun
from spanwise.core.order import Kept, Op, check_halves, kept_over, parse_order
from spanwise.core.precision import Precision

ScheduleName = Literal["gpipe", "1f1b", "zero_bubble"]


class Replica(Noun):
    """A device of a stage and how many rows of each micro-batch it computes."""

    device: Id
    rows: int = Field(ge=1)


class Stage(Noun):
    """Consecutive layers ``[start, stop)`` held by one or several replicas.

    Rows are assigned consecutively in replica order. ``warmup`` is how many forwards the stage may run
    ahead of its backwards; under 1f1b it must not rise from one stage to the next. ``order`` is what the
    stage computes, in order, as ``F0 F1 I0 W0 ...``: of zero_bubble plans only, where it was made by a
    scheduler that knew seconds. ``recompute`` has half-open ranges of its layers, from the first to the last,
    of which each keeps only what enters it between forward and backward, and runs its forward again just
    before its own backward; layers in none of them keep what they save.
    """

    start: int = Field(ge=0)
    stop: int
    replicas: tuple[Replica, ...] = Field(min_length=1)
    warmup: int = Field(default=1, ge=1)
    order: str | None = None
    recompute: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="after")
    def _not_empty(self) -> Stage:
        if self.stop <= self.start:
            raise PlanError(f"plan: stage of layers [{self.start}:{self.stop}) is empty")
        devices = [replica.device for replica in self.replicas]
        if len(set(devices)) != len(devices):
            raise PlanError(
                f"plan: stage [{self.start}:{self.stop}) lists a device twice: {', '.join(devices)}"
            )
        least = self.start
        for a, b in self.recompute:
            if not least <= a < b <= self.stop:
                raise PlanError(
                    f"plan: stage [{self.start}:{self.stop}) runs layers [{a}:{b}) again; ranges must lie in "
                    "the stage, hold a layer and follow each other"
                )
            least = b
        return self

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """Its devices in replica order."""
        return tuple(replica.device for replica in self.replicas)

    @cached_property
    def rows(self) -> int:
        """Rows of a micro-batch over all replicas."""
        return sum(replica.rows for replica in self.replicas)

    def meets(self, start: int, stop: int) -> bool:
        """Whether it holds some of the layers ``[start, stop)``."""
        return start < self.stop and self.start < stop

    def row_ranges(self) -> tuple[tuple[str, int, int], ...]:
        """(device, first row, row after the last) per replica."""
        return row_ranges(self.replicas)

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """Its order as values; none where the schedule makes it.

        Raises:
            PlanError: an entry is none of F, B, I, W with a number.
        """
        return parse_order(self.order or "")

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        """Micro-batches that its order keeps at once: before their backward, and between its halves."""
        return kept_over(self.ops)


class Sync(Noun):
    """Gradients of some layers summed over some devices, once a step, by a ring.

    Meant are the parameters in these half-open layer ranges that exactly these devices hold: a tied weight
    whose layers lie in two stages has a Sync of its own, over the devices of both. ``devices`` is the order
    of the ring.

    The sum may be cut into segments, each a ring, one after the other from the last layers to the first, each
    as soon as the last micro-batch has left its gradients behind: at layers, by ``ends``, of every segment
    the layer after its last, rising, the last that of the sync (a parameter belongs to the first layer that
    uses it); or into so many ``segments`` of about equal bytes.
    """

    layers: tuple[tuple[int, int], ...] = Field(min_length=1)
    devices: tuple[Id, ...] = Field(min_length=2)
    segments: int = Field(default=1, ge=1)
    ends: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _cut_once(self) -> Sync:
        if self.ends is None:
            return self
        first, stop = self.layers[0][0], self.layers[-1][1]
        if not self.ends or self.ends[-1] != stop or any(a >= b for a, b in pairwise((first, *self.ends))):
            raise PlanError(
                f"plan: sum over {', '.join(self.devices)}: segments of layers [{first}:{stop}) end at "
                f"{', '.join(map(str, self.ends)) or 'none'}; ends must rise and the last must be {stop}"
            )
        if self.segments > 1:
            raise PlanError(
                f"plan: sum over {', '.join(self.devices)} has both {self.segments} segments and ends of "
                "segments; give one of them"
            )
        return self

    @property
    def most_segments(self) -> int:
        """In how many segments it is cut, those without a parameter counted in."""
        return self.segments if self.ends is None else len(self.ends)


class ServerSync(Noun):
    """Gradients of layers ``[start, stop)`` pushed to a server, their parameters pulled from it, once a step.

    The server (a parameter server: Li et al., "Scaling Distributed Machine Learning with the Parameter
    Server", OSDI 2014) sums in the order of ``devices``, updates, and keeps the state of the optimizer, which
    the devices do without. Meant are the parameters that exactly these devices hold, as in a Sync. The server
    may be one of them: what is its own does not travel.

    ``pushes`` and ``pulls`` cut the layers into segments, each a message: of every segment the layer after
    its last, rising; the last is ``stop``. A parameter travels with the first layer that uses it. ``order``
    has every pull once, as the server sends them. With ``as_aggregated`` it updates a segment as soon as all
    gradients of it are in and sends what it may; else it updates nothing before all gradients are in, so that
    a step that fails in between has changed nothing.
    """

    server: Id
    devices: tuple[Id, ...] = Field(min_length=1)
    start: int = Field(default=0, ge=0)
    pushes: tuple[int, ...] = Field(min_length=1)
    pulls: tuple[int, ...] = Field(min_length=1)
    order: tuple[int, ...]
    as_aggregated: bool = False

    @model_validator(mode="after")
    def _whole(self) -> ServerSync:
        where = f"plan: server '{self.server}'"
        for what, ends in (("push", self.pushes), ("pull", self.pulls)):
            if any(a >= b for a, b in pairwise((self.start, *ends))):
                raise PlanError(
                    f"{where}: {what} segments of layers from {self.start} on end at "
                    f"{', '.join(map(str, ends))}; ends must rise, each segment holds a layer"
                )
        if self.pushes[-1] != self.pulls[-1]:
            raise PlanError(
                f"{where}: pushes end at layer {self.pushes[-1]}, pulls at {self.pulls[-1]}; "
                "all layers travel both ways"
            )
        if sorted(self.order) != list(range(len(self.pulls))):
            raise PlanError(
                f"{where}: order {', '.join(map(str, self.order)) or 'missing'} of {len(self.pulls)} pulls; "
                "it must have each of them once"
            )
        if len(set(self.devices)) != len(self.devices):
            raise PlanError(f"{where} lists a device twice: {', '.join(self.devices)}")
        if self.devices == (self.server,):
            raise PlanError(f"{where} serves nobody but itself; remove it, a device updates what it holds")
        return self

    @property
    def stop(self) -> int:
        """The layer after the last."""
        return self.pushes[-1]

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """As half-open ranges, like those of a Sync."""
        return ((self.start, self.stop),)

    @property
    def clients(self) -> tuple[str, ...]:
        """The devices that push and pull: all but the server itself."""
        return tuple(device for device in self.devices if device != self.server)


def _form_of_sync(data: object) -> str:
    is_server = isinstance(data, ServerSync) or (isinstance(data, dict) and "server" in cast("Any", data))
    return "server" if is_server else "ring"


AnySync = Annotated[  # told apart by form, so that an error speaks of the form that was written
    Annotated[Sync, Tag("ring")] | Annotated[ServerSync, Tag("server")], Discriminator(_form_of_sync)
]


class Wire(Noun):
    """Activations and gradients from one device to another travel with fewer bits than they have."""

    source: Id
    target: Id
    precision: Precision


class Plan(Noun):
    """How one training step is spread over devices.

    Attributes:
        strategy: who made it.
        graph_digest: of the ModelGraph that it was made for.
        micro_batches: M. ``micro_batch_rows``: B; the global batch is M * B.
        sources: where the rows of each micro-batch start out, consecutively, as replicas.
        stages: cover layers 0..L in order and every row of a micro-batch once each.
        schedule: order of forwards and backwards inside a stage; under ``zero_bubble`` each has its own.
        syncs: gradient sums, by a ring or a server. Every parameter held by several devices must be covered.
        wires: between which devices activations and gradients travel in reduced precision; all others, and
            all raw rows and gradient sums, travel as they are. With any of them a plan is not exact.
    """

    strategy: str
    graph_digest: str
    micro_batches: int = Field(ge=1)
    micro_batch_rows: int = Field(ge=1)
    sources: tuple[Replica, ...] = Field(min_length=1)
    stages: tuple[Stage, ...] = Field(min_length=1)
    schedule: ScheduleName = "1f1b"
    syncs: tuple[AnySync, ...] = ()
    wires: tuple[Wire, ...] = ()

    @model_validator(mode="after")
    def _covers(self) -> Plan:
        expected = 0
        for index, stage in enumerate(self.stages):
            if stage.start != expected:
                raise PlanError(
                    f"plan '{self.strategy}': stage {index} starts at layer {stage.start}, "
                    f"not {expected}; stages must cover the layers in order"
                )
            expected = stage.stop
            if stage.rows != self.micro_batch_rows:
                raise PlanError(
                    f"plan '{self.strategy}': stage {index} computes {stage.rows} rows of a micro-batch "
                    f"of {self.micro_batch_rows}; rows must add up"
                )
        held = sum(source.rows for source in self.sources)
        if held != self.micro_batch_rows:
            raise PlanError(
                f"plan '{self.strategy}': sources hold {held} rows of a micro-batch of "
                f"{self.micro_batch_rows}; rows must add up"
            )
        holders = [source.device for source in self.sources]
        if len(set(holders)) != len(holders):
            raise PlanError(f"plan '{self.strategy}': sources list a device twice: {', '.join(holders)}")
        self._check_orders()
        self._check_servers()
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if self.schedule == "1f1b" and after.warmup > before.warmup:
                raise PlanError(
                    f"plan '{self.strategy}': warm-up depth rises from {before.warmup} (layers "
                    f"[{before.start}:{before.stop})) to {after.warmup}; the later stage would wait for "
                    "forwards that the earlier may not run yet"
                )
        return self

    def _check_orders(self) -> None:
        for index, stage in enumerate(self.stages):
            where = f"plan '{self.strategy}': stage {index}"
            if self.schedule != "zero_bubble":
                if stage.order is not None:
                    raise PlanError(f"{where} has an order, which {self.schedule} makes itself; remove it")
                continue
            if stage.order is None:
                raise PlanError(f"{where} has no order; under zero_bubble each stage needs one")
            try:
                check_halves(stage.ops, self.micro_batches)
            except PlanError as error:
                raise PlanError(f"{where}: {error}") from None
            ahead = max(kept.whole for kept in stage.kept)
            if ahead > stage.warmup:
                raise PlanError(f"{where} runs {ahead} forwards ahead, its warm-up depth is {stage.warmup}")

    def _check_servers(self) -> None:
        for sync in self.servers:
            if sync.stop > self.stages[-1].stop:
                raise PlanError(
                    f"plan '{self.strategy}': server '{sync.server}' serves layers "
                    f"[{sync.start}:{sync.stop}) of {self.stages[-1].stop}"
                )
        for one, other in combinations(self.servers, 2):
            if one.start < other.stop and other.start < one.stop:
                raise PlanError(
                    f"plan '{self.strategy}': layer {max(one.start, other.start)} is served by "
                    f"'{one.server}' and by '{other.server}'; a layer has one server"
                )

    @cached_property
    def servers(self) -> tuple[ServerSync, ...]:
        """Those of the syncs that go over a server."""
        return tuple(sync for sync in self.syncs if isinstance(sync, ServerSync))

    def precision(self, source: str, target: str) -> Precision:
        """How activations and gradients travel from one device to another."""
        return self._precisions.get((source, target), "full")

    @cached_property
    def _precisions(self) -> dict[tuple[str, str], Precision]:
        return {(wire.source, wire.target): wire.precision for wire in self.wires}

    @property
    def exact(self) -> bool:
        """Whether its gradients are those of one device, to rounding."""
        return all(wire.precision == "full" for wire in self.wires)

    @property
    def batch(self) -> int:
        """Rows of a global batch."""
        return self.micro_batches * self.micro_batch_rows

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """Every device that takes part, sources and servers included, in order of first mention."""
        found = [device for stage in self.stages for device in stage.devices]
        found += [source.device for source in self.sources]
        return tuple(dict.fromkeys(found + [sync.server for sync in self.servers]))

    @cached_property
    def computing(self) -> tuple[str, ...]:
        """Devices that hold a stage, in order of first mention."""
        return tuple(dict.fromkeys(device for stage in self.stages for device in stage.devices))


def row_ranges(replicas: tuple[Replica, ...]) -> tuple[tuple[str, int, int], ...]:
    """(device, first row, row after the last) for replicas in order."""
    out: list[tuple[str, int, int]] = []
    first = 0
    for replica in replicas:
        out.append((replica.device, first, first + replica.rows))
        first += replica.rows
    return tuple(out)
