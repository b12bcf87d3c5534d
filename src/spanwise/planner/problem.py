"""What a planner looks at, and the questions that every planner asks about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from math import floor
from typing import TYPE_CHECKING

from spanwise.core.cluster import Cluster, DataShare
from spanwise.core.errors import InfeasibleError
from spanwise.core.importance import Importance
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.core.profile import Profile
from spanwise.core.timeline import Timeline
from spanwise.cost.training import optimizer_copies
from spanwise.planner.facts.kinds import Group, Kinds, device_kinds
from spanwise.planner.facts.lanes import Lanes
from spanwise.planner.facts.links import Links, Shares
from spanwise.planner.facts.tables import Tables
from spanwise.planner.facts.ways import Way
from spanwise.planner.outline import Outline

if TYPE_CHECKING:
    from spanwise.planner.hiertrain.plan import Arena
    from spanwise.planner.plans.price import StageStep
    from spanwise.schedules import StageSeconds

MOST_MICRO_BATCHES = 64
MOST_CHOICES = 8

Halves = tuple[list[tuple[Stage, ...]], Iterator[tuple[Stage, ...]]]
Trial = tuple[str, Timeline | InfeasibleError]  # the strategy that asked first, and what came of it


@dataclass(slots=True)
class Memo:
    """What was worked out about one problem: kept so that strategies share tables and simulations.

    ``trials`` has every plan that was simulated, under no strategy's name, ``paces`` what was found without,
    ``halves`` the stages of zero_bubble variants so far and what makes more of them, ``ways`` those to run
    layers of a stage again, by its layers and rows, ``arenas`` HierTrain's numbers, by devices, ``sequences``
    groups of stages that a search kept, by whether they are single devices and whether in halves. Plans that
    are compared have most stages in common: ``shares`` has rows by group, layers and depth, ``stages`` the
    stages made of them, ``stage_bytes``, ``steps`` and ``seconds`` what a stage takes.
    """

    index: dict[str, int] = field(default_factory=dict[str, int])
    kinds: Kinds = ()
    tables: Tables | None = None
    links: Links | None = None
    lanes: Lanes | None = None
    sequences: dict[tuple[bool, bool], list[tuple[Group, ...]]] = field(
        default_factory=dict[tuple[bool, bool], "list[tuple[Group, ...]]"]
    )
    outlines: dict[str, list[Outline]] = field(default_factory=dict[str, "list[Outline]"])
    trials: dict[Plan, Trial] = field(default_factory=dict[Plan, "Trial"])
    paces: dict[tuple[object, ...], float] = field(default_factory=dict[tuple[object, ...], float])
    halves: dict[tuple[object, ...], Halves] = field(default_factory=dict[tuple[object, ...], "Halves"])
    ways: dict[tuple[int, int, int], tuple[Way, ...]] = field(
        default_factory=dict[tuple[int, int, int], tuple[Way, ...]]
    )
    arenas: dict[Group, Arena] = field(default_factory=dict[Group, "Arena"])
    source_rows: dict[int, tuple[Replica, ...]] = field(default_factory=dict[int, tuple[Replica, ...]])
    shares: dict[tuple[Group, int, int, int, int], Shares] = field(
        default_factory=dict[tuple[Group, int, int, int, int], Shares]
    )
    stages: dict[tuple[int, int, Shares, int], Stage] = field(
        default_factory=dict[tuple[int, int, Shares, int], Stage]
    )
    stage_bytes: dict[tuple[object, ...], int] = field(default_factory=dict[tuple[object, ...], int])
    steps: dict[tuple[object, ...], StageStep] = field(default_factory=dict[tuple[object, ...], "StageStep"])
    seconds: dict[tuple[object, ...], StageSeconds] = field(
        default_factory=dict[tuple[object, ...], "StageSeconds"]
    )
    joined: dict[tuple[object, ...], float] = field(default_factory=dict[tuple[object, ...], float])


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything a planner looks at. ``memo`` holds derived values only and takes no part in equality.

    ``importance``: scores of parameters, for planners that choose what trains where. ``thorough``: whether
    plans may take two or three times as long to look for, to be a per cent or so better on average.
    """

    graph: ModelGraph
    profile: Profile
    cluster: Cluster
    job: Job
    importance: Importance | None = None
    thorough: bool = True
    memo: Memo = field(default_factory=Memo, compare=False, repr=False)

    @property
    def shares(self) -> tuple[DataShare, ...]:
        """Devices that hold the data: those of the job, else those of the cluster.

        Empty if every device has all of it: then the sources of a plan are the replicas of its first stage.
        """
        return self.cluster.data_devices(self.job.data_devices)

    @property
    def sources(self) -> tuple[str, ...]:
        """Ids of the devices that hold the data; empty if all of them do."""
        return tuple(share.device for share in self.shares)

    @property
    def copies(self) -> int:
        """Copies of the parameters that the optimizer keeps."""
        return optimizer_copies(self.job.optimizer)

    @property
    def labels_stay(self) -> bool:
        """Whether labels must not leave the sources, so that these must hold the last stage too."""
        return self.job.private and not self.job.share_labels and self.graph.label_row_bytes > 0

    @property
    def first_is_fixed(self) -> bool:
        """Whether the first stage must be data devices that are known beforehand, with their own rows."""
        return self.job.private and bool(self.shares)

    @property
    def last_is_fixed(self) -> bool:
        """Whether the last stage must be data devices that are known beforehand, with their own rows."""
        return self.labels_stay and bool(self.shares)

    @property
    def one_stage(self) -> bool:
        """Whether planners look for plans of one stage only.

        Where any device may be a source and labels must stay, first and last stage are alike. One stage is
        that by itself; plans that come back to their first devices are possible, but not searched for.
        """
        return self.labels_stay and not self.shares

    @property
    def index(self) -> dict[str, int]:
        """Place of every device in file order."""
        if not self.memo.index:
            self.memo.index.update({device: i for i, device in enumerate(self.cluster.ids)})
        return self.memo.index

    @property
    def kinds(self) -> Kinds:
        """Which devices are interchangeable."""
        if not self.memo.kinds:
            self.memo.kinds = device_kinds(self.cluster, self.profile, self.sources)
        return self.memo.kinds

    @property
    def tables(self) -> Tables:
        """Layer times and memory as arrays."""
        if self.memo.tables is None:
            self.memo.tables = Tables.of(self.graph, self.profile, self.cluster, self.job.batch, self.copies)
        return self.memo.tables

    @property
    def links(self) -> Links:
        """Rates and latencies between all devices."""
        if self.memo.links is None:
            self.memo.links = Links.of(self.cluster, self.profile.links)
        return self.memo.links

    @property
    def lanes(self) -> Lanes:
        """Messages between groups at typical rows."""
        if self.memo.lanes is None:
            batch = self.job.batch
            held = tuple((self.index[r.device], r.rows / batch) for r in self.source_rows(batch))
            self.memo.lanes = Lanes(self.tables, self.links, held, self.kinds)
        return self.memo.lanes

    def source_rows(self, rows: int) -> tuple[Replica, ...]:
        """Where ``rows`` rows of a micro-batch start out: by share, largest remainder, at least one each.

        Empty if every device has all of the data. Where the data devices must compute their own rows it is at
        least as many as the model needs, if the micro-batch has them.
        """
        known = self.memo.source_rows
        if rows not in known:
            known[rows] = self._source_rows(rows)
        return known[rows]

    def _source_rows(self, rows: int) -> tuple[Replica, ...]:
        if not self.shares:
            return ()
        least = self.least_rows(0, len(self.graph)) if self.first_is_fixed else 1
        weights = tuple(share.share for share in self.shares)
        counts = largest_remainder(rows, weights, least if rows >= least * len(weights) else 1)
        return tuple(Replica(device=s.device, rows=n) for s, n in zip(self.shares, counts, strict=True))

    def least_rows(self, start: int, stop: int) -> int:
        """Rows of a micro-batch that a replica of layers ``[start, stop)`` needs: 2 for batch statistics."""
        mixing = self.tables.mixing
        return 2 if mixing[stop] > mixing[start] else 1

    def micro_batch_choices(self, replicas: int = 1) -> tuple[int, ...]:
        """Micro-batch counts worth trying: divisors of the batch, at most 8, spread evenly by ratio.

        Args:
            replicas: devices that compute rows of every micro-batch.

        Raises:
            InfeasibleError: the batch has fewer rows than the data devices or the replicas need.
        """
        each = self.least_rows(0, len(self.graph))
        batch, least = self.job.batch, max(each * replicas, len(self.shares))
        found = [
            m for m in range(1, min(batch, MOST_MICRO_BATCHES) + 1) if batch % m == 0 and batch // m >= least
        ]
        if not found:
            raise InfeasibleError(self._too_few_rows(replicas, each, least))
        while len(found) > MOST_CHOICES:
            # The inner value whose neighbours lie closest together by ratio is missed least.
            del found[min(range(1, len(found) - 1), key=lambda i: found[i + 1] / found[i - 1])]
        return tuple(found)

    def _too_few_rows(self, replicas: int, each: int, least: int) -> str:
        batch, sources = f"a batch of {_rows(self.job.batch)}", len(self.shares)
        if least == sources:
            return (
                f"{batch} is smaller than its {sources} data devices, each gives a row; raise the batch to "
                f"{least} or name fewer data devices"
            )
        if each == 1:
            return (
                f"{batch} is smaller than its {replicas} replicas, each needs a row; raise the batch to "
                f"{least} or use fewer devices"
            )
        of = f"{replicas} replicas with" if replicas > 1 else "a replica with"
        layer = next(layer.name for layer in self.graph.layers if layer.batch_statistics)
        return (
            f"{batch} is too small for {of} batch statistics (layer '{layer}'), each needs {_rows(each)}; "
            f"raise the batch to {least}{' or use fewer devices' if replicas > 1 else ''}"
        )


def _rows(count: int) -> str:
    return f"{count} row{'s' if count != 1 else ''}"


def largest_remainder(total: int, weights: tuple[float, ...], least: int = 1) -> tuple[int, ...]:
    """``total`` in whole parts by weight: floors, then one each to the largest remainders.

    No part is below ``least``; needs ``total >= least * len(weights)``.
    """
    scale = total / sum(weights)
    parts = [floor(weight * scale) for weight in weights]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - weights[i] * scale, i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    for i in range(len(parts)):
        while parts[i] < least:
            richest = reduce(lambda a, b: b if parts[b] > parts[a] else a, range(len(parts)))
            parts[richest] -= 1
            parts[i] += 1
    return tuple(parts)
