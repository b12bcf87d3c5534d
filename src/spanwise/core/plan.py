"""A Plan: decisions only, no predictions. Everything that runs or is simulated follows from one."""

from __future__ import annotations

from functools import cached_property
from itertools import combinations
from typing import Literal

from pydantic import Field, model_validator

from spanwise.core.cluster import Id
from spanwise.core.errors import PlanError
from spanwise.core.noun import Noun
from spanwise.core.order import Kept, Op, check_halves, kept_over, parse_order
from spanwise.core.precision import Precision
from spanwise.core.syncs import AnySync, ServerSync
from spanwise.core.trained import GroupSync, Ranking, Trained

ScheduleName = Literal["gpipe", "1f1b", "zero_bubble"]


class Replica(Noun):
    """A device of a stage, how many rows of each micro-batch it computes, what it trains (all by default)."""

    device: Id
    rows: int = Field(ge=1)
    trains: tuple[Trained, ...] | None = None

    @cached_property
    def trained(self) -> dict[str, int | None] | None:
        """What it trains: channels, or None for all of them, by parameter; None if it trains everything."""
        if self.trains is None:
            return None
        return {one.parameter: one.channels for one in self.trains}


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
        if self.sparse and (self.recompute or self.order is not None):
            raise PlanError(
                f"plan: stage [{self.start}:{self.stop}) trains some of its parameters only, and "
                f"{'runs layers again' if self.recompute else 'goes back in halves'}; it can do one of both"
            )
        return self

    @cached_property
    def sparse(self) -> bool:
        """Whether some replica does not train everything."""
        return any(replica.trains is not None for replica in self.replicas)

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
        rankings: channels in order of importance of the weights of which some replica trains a part.
        stored_statistics: whether BatchNorm normalises by its running statistics, which then stay as they
            are, and not by those of the rows at hand.
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
    rankings: tuple[Ranking, ...] | None = None
    stored_statistics: bool | None = None

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
        self._check_trained()
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

    def _check_trained(self) -> None:
        for replica in (replica for stage in self.stages for replica in stage.replicas):
            for one in replica.trains or ():
                order = self.ranking.get(one.parameter)
                if one.channels is not None and (order is None or one.channels >= len(order)):
                    raise PlanError(
                        f"plan '{self.strategy}': '{replica.device}' trains {one.channels} channels of "
                        f"'{one.parameter}', whose ranking has {len(order or ())}; rank its channels, or "
                        "train all of them"
                    )
            names = [one.parameter for one in replica.trains or ()]
            if len(set(names)) != len(names):
                raise PlanError(f"plan '{self.strategy}': '{replica.device}' trains a parameter twice")
        if self.stored_statistics and any(s.recompute or s.order is not None for s in self.stages):
            raise PlanError(
                f"plan '{self.strategy}': normalises by stored statistics, and runs layers again or goes "
                "back in halves; it can do one of both"
            )
        if self.sparse and self.servers:
            raise PlanError(
                f"plan '{self.strategy}': has servers and devices that train some parameters only; "
                "it can have one of both"
            )

    @cached_property
    def sparse(self) -> bool:
        """Whether some device does not train everything that it holds."""
        return any(stage.sparse for stage in self.stages)

    @cached_property
    def ranking(self) -> dict[str, tuple[int, ...]]:
        """Channels by parameter, the most important first."""
        return {one.parameter: one.channels for one in self.rankings or ()}

    @cached_property
    def groups(self) -> tuple[GroupSync, ...]:
        """Those of the syncs that are of units."""
        return tuple(sync for sync in self.syncs if isinstance(sync, GroupSync))

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
