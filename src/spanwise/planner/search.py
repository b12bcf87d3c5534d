"""Which devices hold which layers: dynamic programming over sets of devices, groups and cuts at once.

The price of ``price.py`` obeys Bellman's principle from the back: with ``G`` the time of the dominant step of
the stages from here on and ``X`` their exposed gradient sum,

    G = max((M - 1) * busy + E, E + G of what follows),     X = max(Ta, X of what follows - E).

A state is the set of devices used from here to the end, the group at its head and the layer where it
starts. All micro-batch counts and cuts are array axes. One plan, that with the least ``G + max(0, X)``, is
kept per state. Without gradient sums this is exact for the price. Sets are all subsets of few devices, or
the runs of a device order if there are many, as in Asteroid's dynamic programme (Ye et al., MobiCom 2024;
read from re-implementations). The search over sets is our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from spanwise.planner.groups import INFEASIBLE_S, Groups, StageTimes
from spanwise.planner.lanes import Group, Ways
from spanwise.planner.outline import Outline, Span
from spanwise.planner.price import SHARED
from spanwise.planner.tables import Floats, Ints

Extension = tuple[int, int]  # (set used afterwards, group at its head), as bit masks


@dataclass(frozen=True, slots=True)
class Tail:
    """A given last stage: from which position of the grid, on which group, how long."""

    at: int
    group: Group
    times: StageTimes


@dataclass(frozen=True, slots=True)
class Head:
    """A given first stage up to a position of the grid."""

    at: int
    group: Group
    times: StageTimes


@dataclass(slots=True)
class _State:
    """All heads of one set of devices. Arrays are ``[head, M, position]``."""

    heads: list[int] = field(default_factory=list[int])
    groups: list[Group] = field(default_factory=list[Group])
    most: list[Floats] = field(default_factory=list[Floats])
    exposed: list[Floats] = field(default_factory=list[Floats])
    cut: list[Ints] = field(default_factory=list[Ints])
    follower: list[Ints] = field(default_factory=list[Ints])
    stacked: tuple[Floats, Floats] | None = None

    def arrays(self) -> tuple[Floats, Floats]:
        if self.stacked is None:
            self.stacked = (np.stack(self.most), np.stack(self.exposed))
        return self.stacked


@dataclass(frozen=True, slots=True)
class Found:
    """The best plan of one state that reaches the first layer."""

    price_s: float
    micro_batches: int
    used: int
    head: int


def members(mask: int) -> Group:
    """Device indices of a bit mask."""
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


def mask_of(devices: Iterable[int]) -> int:
    """Bit mask of device indices."""
    return sum(1 << d for d in set(devices))


def all_subsets(devices: Group, *, singles: bool = False) -> Iterator[Extension]:
    """Every set with every group at its head, smaller sets first; ``singles``: groups of one device."""
    whole = mask_of(devices)
    used = sorted((s for s in range(1, whole + 1) if s & ~whole == 0), key=lambda s: (s.bit_count(), s))
    for mask in used:
        if singles:
            yield from ((mask, 1 << d) for d in members(mask))
            continue
        group = mask
        while group:
            yield mask, group
            group = (group - 1) & mask


def runs_of(order: Group, most: int) -> Iterator[Extension]:
    """Every run of a device order with every group of at most ``most`` devices at its front."""
    for length in range(1, len(order) + 1):
        for first in range(len(order) - length + 1):
            run = order[first : first + length]
            for size in range(1, min(length, most) + 1):
                yield mask_of(run), mask_of(run[:size])


class Search:
    """One pass of dynamic programming over given sets; then the best plan of every state, best first."""

    def __init__(
        self,
        groups: Groups,
        extensions: Iterable[Extension],
        *,
        head: Head | None = None,
        tail: Tail | None = None,
    ) -> None:
        self.groups, self.head, self.tail = groups, head, tail
        self.lanes = groups.problem.lanes
        self.labels = groups.problem.graph.label_row_bytes > 0
        self.one_stage = groups.problem.one_stage
        self.counts = np.array(groups.micro_batches, dtype=np.float64)
        tables = groups.problem.tables
        at = np.array(groups.cuts)
        batch = groups.problem.job.batch
        self.m_index = np.arange(len(self.counts))[:, None]
        self.at_index = np.arange(len(at))[None, :]
        self.forth = (batch / self.counts)[:, None] * tables.into[at][None, :]
        self.back = (batch / self.counts)[:, None] * tables.back[at][None, :]
        self.barrier = groups.problem.job.clip_norm is not None
        self.states: dict[int, _State] = {}
        self.load = self._fixed_load()
        for used, group in extensions:
            self._extend(used, group)

    def _fixed_load(self) -> dict[int, Floats]:
        """``[M]`` seconds a micro-batch that the given first and last stage take of their devices."""
        load: dict[int, Floats] = {}
        last = len(self.groups.cuts) - 1
        if self.tail is not None:
            for device in self.tail.group:
                load[device] = load.get(device, 0.0) + self.tail.times.both[:, self.tail.at, last]
        if self.head is not None:
            for device in self.head.group:
                load[device] = load.get(device, 0.0) + self.head.times.both[:, 0, self.head.at]
        return load

    def _extend(self, used: int, group: int) -> None:
        """Puts a group in front of the best of the remaining set, for all cuts and counts."""
        devices = members(group)
        times = self.groups.times(devices)
        rest = used & ~group
        if rest and self.one_stage:
            return
        extra = np.zeros(len(self.counts))
        for device in devices:
            extra = np.maximum(extra, self.load.get(device, 0.0))
        busy = times.both
        if extra.any():
            fixed = (self.head is not None) + (self.tail is not None)
            busy = (1 + SHARED * fixed) * (times.both + extra[:, None, None])
        whole = (self.counts - 1)[:, None, None] * busy + times.both
        if rest == 0 and self.tail is None:
            if self.labels and not self.lanes.gets_labels(devices):
                return
            most = whole[:, :, -1]
            exposed = np.broadcast_to(times.sum_s[None, :, -1], most.shape)
            none = np.full(most.shape, -1, dtype=np.int64)
            self._keep(used, group, most, exposed, none, none)
            return
        follow = self._following(devices, rest)
        if follow is None:
            return
        after, hidden, who = follow
        most = np.maximum(whole, times.both + after[:, None, :])
        less = times.backward if self.barrier else times.both
        exposed = np.maximum(times.sum_s[None], hidden[:, None, :] - less)
        cut = np.argmin(most + np.maximum(exposed, 0.0), axis=2)
        chosen = (self.m_index, self.at_index, cut)
        self._keep(used, group, most[chosen], exposed[chosen], cut, who[self.m_index, cut])

    def _keep(self, used: int, group: int, most: Floats, exposed: Floats, cut: Ints, follower: Ints) -> None:
        state = self.states.setdefault(used, _State())
        state.heads.append(group)
        state.groups.append(members(group))
        state.most.append(most)
        state.exposed.append(exposed)
        state.cut.append(cut)
        state.follower.append(follower)

    def _following(self, devices: Group, rest: int) -> tuple[Floats, Floats, Ints] | None:
        """``[M, position]``: G and X from the link on with the best follower, and which follower."""
        if rest == 0:
            assert self.tail is not None
            most, exposed = self._tail_arrays(self.tail)
            heads = [self.tail.group]
        else:
            state = self.states.get(rest)
            if state is None:
                return None
            most, exposed = state.arrays()
            heads = state.groups
        lanes = [self.lanes.between(devices, head) for head in heads]
        linked = [i for i, lane in enumerate(lanes) if lane is not None]
        if not linked:
            return None
        return self._through(
            [lane for lane in lanes if lane is not None], most[linked], exposed[linked], linked
        )

    def _through(
        self, lanes: list[Ways], most: Floats, exposed: Floats, who: list[int]
    ) -> tuple[Floats, Floats, Ints]:
        columns = np.array([[f.s_per_byte, b.s_per_byte, f.latency_s, b.latency_s] for f, b in lanes])
        out = self.forth[None] * columns[:, 0, None, None]
        into = self.back[None] * columns[:, 1, None, None]
        both = out + into + (columns[:, 2] + columns[:, 3])[:, None, None]
        whole = (self.counts - 1)[None, :, None] * np.maximum(out, into) + both
        after = np.maximum(whole, both + most)
        hidden = exposed - (into + columns[:, 3, None, None] if self.barrier else both)
        best = np.argmin(after + np.maximum(hidden, 0.0), axis=0)
        return (
            after[best, self.m_index, self.at_index],
            hidden[best, self.m_index, self.at_index],
            np.array(who, dtype=np.int64)[best],
        )

    def _tail_arrays(self, tail: Tail) -> tuple[Floats, Floats]:
        """The given last stage as the only state of the empty set."""
        side = len(self.groups.cuts)
        most = np.full((1, len(self.counts), side), INFEASIBLE_S)
        exposed = np.zeros_like(most)
        own = tail.times.both[:, tail.at, side - 1]
        load = (1 + SHARED) * np.max(np.stack([self.load[d] for d in tail.group]), axis=0)
        most[0, :, tail.at] = (self.counts - 1) * load + own
        exposed[0, :, tail.at] = tail.times.sum_s[tail.at, side - 1]
        return most, exposed

    def found(self) -> list[Found]:
        """The best plan of every set, head and micro-batch count, cheapest first."""
        out: list[Found] = []
        for used, state in self.states.items():
            for index, (most, exposed) in enumerate(zip(state.most, state.exposed, strict=True)):
                devices = state.groups[index]
                if self.head is not None:
                    total = self._headed(self.head, devices, most, exposed)
                else:
                    total = self._fed(used, devices, most[:, 0], exposed[:, 0])
                out += [
                    Found(float(total[m]), m, used, index)
                    for m in range(len(self.counts))
                    if total[m] < INFEASIBLE_S
                ]
        if self.labels and self.lanes.misses_labels:
            out = [f for f in out if self._gets_labels(f)]
        return sorted(out, key=lambda f: (f.price_s, f.micro_batches, f.used, f.head))

    def _gets_labels(self, found: Found) -> bool:
        """Whether the labels reach the last stage from the first, which was not known when it was chosen."""
        spans = self.outline(found).spans
        return self.lanes.links.reach(spans[0].group, spans[-1].group)

    def _fed(self, used: int, devices: Group, most: Floats, exposed: Floats) -> Floats:
        """``[M]`` price with the raw data on its way to the first stage, where it is not there already."""
        lane = self.lanes.inputs(devices)
        if lane is None:
            return np.full(len(self.counts), INFEASIBLE_S)
        occupied = self.forth[:, 0] * lane.s_per_byte
        fill = occupied + lane.latency_s if lane.s_per_byte else np.zeros(len(self.counts))
        if not mask_of(lane.senders) & used:
            return np.maximum(most + np.maximum(exposed, 0.0), self.counts * occupied)
        total = np.maximum((self.counts - 1) * occupied + fill, fill + most)
        return total + np.maximum(exposed - (0.0 if self.barrier else fill), 0.0)

    def _headed(self, head: Head, devices: Group, most: Floats, exposed: Floats) -> Floats:
        lanes = self.lanes.between(head.group, devices)
        if lanes is None:
            return np.full(len(self.counts), INFEASIBLE_S)
        after, hidden, _ = self._through([lanes], most[None], exposed[None], [0])
        own = head.times.both[:, 0, head.at]
        less = head.times.backward[:, 0, head.at] if self.barrier else own
        load = own
        if self.tail is not None:
            load = (1 + SHARED) * np.max(np.stack([self.load[d] for d in head.group]), axis=0)
        total = np.maximum((self.counts - 1) * load + own, own + after[:, head.at])
        return total + np.maximum(np.maximum(head.times.sum_s[0, head.at], hidden[:, head.at] - less), 0.0)

    def outline(self, found: Found) -> Outline:
        """The stages behind a found price."""
        cuts, m = self.groups.cuts, found.micro_batches
        spans: list[Span] = []
        at, used, index = 0, found.used, found.head
        if self.head is not None:
            at = self.head.at
            spans.append(Span(0, cuts[at], self.head.group, self._given(self.head.group, m)))
        while used:
            state = self.states[used]
            devices = state.groups[index]
            cut, follower = int(state.cut[index][m, at]), int(state.follower[index][m, at])
            stop = len(cuts) - 1 if cut < 0 else cut
            spans.append(Span(cuts[at], cuts[stop], devices))
            used &= ~state.heads[index]
            at, index = stop, follower
        if self.tail is not None:
            spans.append(Span(cuts[at], cuts[-1], self.tail.group, self._given(self.tail.group, m)))
        return Outline(self.groups.micro_batches[m], tuple(spans), found.price_s)

    def _given(self, group: Group, m: int) -> tuple[int, ...]:
        problem = self.groups.problem
        replicas = problem.source_rows(problem.job.batch // self.groups.micro_batches[m])
        rows = {problem.cluster.ids.index(r.device): r.rows for r in replicas}
        return tuple(rows[d] for d in group)
