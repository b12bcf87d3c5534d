"""Which devices hold which layers: dynamic programming over sets of devices, groups and cuts at once.

The price of ``price.py`` obeys Bellman's principle from the back: with ``G`` the time of the dominant step of
the stages from here on and ``X`` their exposed gradient sum,

    G = max((M - 1) * busy + E, E + G of what follows),     X = max(Ta, X of what follows - E).

A state is what may be used from here to the end, the group at its head and the layer where it starts. All
micro-batch counts and cuts are array axes. One plan, that with the least ``G + max(0, X)``, is kept per
state. Without gradient sums this is exact for the price. States are all sets of few devices, equal ones
counted and not told apart, or if there are many the devices from a place of an order on, as in Asteroid's
dynamic programme (Ye et al., MobiCom 2024; read from re-implementations). The search over sets and leaving
devices out are our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from spanwise.planner.facts.kinds import Group
from spanwise.planner.facts.lanes import Ways
from spanwise.planner.facts.tables import Floats, Ints
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.price import SHARED
from spanwise.planner.search.entries import Entry, Found, Head, State, Tail, better
from spanwise.planner.search.extensions import END, Extension
from spanwise.planner.search.groups import INFEASIBLE_S, Groups, StageTimes

MOST_HEADS = (
    16  # that a state takes over where devices are left out: fewer is faster, more is nearer to exact
)
MOST_TRACED = 2000  # cheapest plans whose devices are looked up


class Search:
    """One pass of dynamic programming over given sets; then the best plan of every state, best first."""

    def __init__(
        self,
        groups: Groups,
        extensions: Iterable[Extension],
        *,
        head: Head | None = None,
        tail: Tail | None = None,
        most_heads: int | None = None,
    ) -> None:
        self.groups, self.head, self.tail, self.most_heads = groups, head, tail, most_heads
        self.lanes = groups.problem.lanes
        self.labels = groups.problem.graph.label_row_bytes > 0
        self.one_stage = groups.problem.one_stage
        self.counts = np.array(groups.micro_batches, dtype=np.float64)
        tables = groups.problem.tables
        at = np.array(groups.cuts)
        batch = groups.problem.job.batch
        self.m_index = np.arange(len(self.counts))[:, None]
        self.at_index = np.arange(len(at))[None, :]
        self.corner = (self.m_index * len(at) + self.at_index) * len(at)  # (M, position, 0) in a flat array
        self.later = (self.counts - 1)[:, None]
        self.forth = (batch / self.counts)[:, None] * tables.into[at][None, :]
        self.back = (batch / self.counts)[:, None] * tables.back[at][None, :]
        self.raw = np.maximum(self.counts * self.forth[:, 0], 1.0)  # bytes of all samples
        self.barrier = groups.problem.job.clip_norm is not None
        self.entries: list[Entry] = []
        self.states: dict[int, State] = {}
        self.load = self._fixed_load()
        for extension in extensions:
            self.add(extension)

    def add(self, extension: Extension) -> None:
        """One more step; what it builds on must have been added before."""
        if extension.group:
            self._extend(extension)
        else:
            self._leave_out(extension)

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

    def _extend(self, extension: Extension) -> None:
        """Puts a group in front of the best of the remaining state, for all cuts and counts."""
        key, devices, rest, ends, ahead = extension
        times = self.groups.times(devices, ahead)
        whole = self._whole(devices, times) if self.load else times.whole
        found: list[tuple[Floats, Floats, Ints, Ints]] = []
        if (rest == END or ends) and self.tail is None and not self._misses_labels(devices):
            most = whole[:, :, -1]
            none = np.full(most.shape, -1, dtype=np.int64)
            found.append((most, np.broadcast_to(times.sum_s[None, :, -1], most.shape), none, none))
        follow = None if rest != END and self.one_stage else self._following(devices, rest)
        if follow is not None:
            after, hidden, who = follow
            most = times.both + after[:, None, :]
            np.maximum(whole, most, out=most)
            exposed = hidden[:, None, :] - (times.backward if self.barrier else times.both)
            np.maximum(times.sum_s, exposed, out=exposed)
            cut = np.argmin(most + np.maximum(exposed, 0.0), axis=2)
            chosen = self.corner + cut
            kept_most: Floats = np.reshape(most, -1)[chosen]
            kept_exposed: Floats = np.reshape(exposed, -1)[chosen]
            found.append((kept_most, kept_exposed, cut, who[self.m_index, cut]))
        if found:
            self._keep(key, devices, better(*found))

    def _whole(self, devices: Group, times: StageTimes) -> Floats:
        """Seconds of all micro-batches where a given first or last stage also takes time of these devices."""
        extra = np.max([self.load.get(d, np.zeros(len(self.counts))) for d in devices], axis=0)
        if not extra.any():
            return times.whole
        fixed = (self.head is not None) + (self.tail is not None)
        busy = (1 + SHARED * fixed) * (times.both + extra[:, None, None])
        return (self.counts - 1)[:, None, None] * busy + times.both

    def _misses_labels(self, last: Group) -> bool:
        return self.labels and not self.lanes.gets_labels(last)

    def _keep(self, key: int, group: Group, arrays: tuple[Floats, Floats, Ints, Ints]) -> None:
        state = self.states.setdefault(key, State([]))
        state.entries.append(len(self.entries))
        self.entries.append(Entry(key, group, *arrays))

    def _leave_out(self, extension: Extension) -> None:
        """A state also offers what the one behind it does."""
        behind = self.states.get(extension.rest)
        if behind is not None:
            self.states.setdefault(extension.key, State([])).entries += self._offered(behind)

    def _offered(self, state: State) -> list[int]:
        """All entries, or of many those best for some cut and count among all in the same sites."""
        if self.most_heads is None or len(state.entries) <= self.most_heads:
            return state.entries
        if not state.pruned:
            most, exposed = self._stacked(state)
            total = most + np.maximum(exposed, 0.0)
            kinds = self.lanes.links.kinds
            places: dict[frozenset[int], list[int]] = {}
            for i, number in enumerate(state.entries):
                places.setdefault(frozenset(kinds[d] for d in self.entries[number].group), []).append(i)
            wins = np.zeros(len(state.entries), dtype=np.int64)
            least = total.min(axis=0)
            for own in places.values():
                best = total[own].min(axis=0)
                near = (total[own] <= best) & (best < INFEASIBLE_S)
                wins[own] = near.sum(axis=(1, 2)) + 2 * (near & (best <= least)).sum(axis=(1, 2))
            chosen = np.argsort(-wins, kind="stable")[: self.most_heads]
            state.entries = [state.entries[i] for i in sorted(chosen) if wins[i]]
            state.pruned, state.stacked = True, None
        return state.entries

    def _stacked(self, state: State) -> tuple[Floats, Floats]:
        if state.stacked is None or len(state.stacked[0]) != len(state.entries):
            found = [self.entries[i] for i in state.entries]
            if len(found) == 1:
                state.stacked = found[0].most[None], found[0].exposed[None]
            else:
                state.stacked = np.stack([e.most for e in found]), np.stack([e.exposed for e in found])
        return state.stacked

    def _following(self, devices: Group, rest: int) -> tuple[Floats, Floats, Ints] | None:
        """``[M, position]``: G and X from the link on with the best follower, and which follower."""
        if rest == END:
            if self.tail is None:
                return None
            most, exposed = self._tail_arrays(self.tail)
            heads, numbers = [self.tail.group], [-1]
        else:
            state = self.states.get(rest)
            if state is None or not state.entries:
                return None
            numbers = self._offered(state)
            most, exposed = self._stacked(state)
            heads = [self.entries[i].group for i in numbers]
        between = self.lanes.between
        lanes = [(i, lane) for i, head in enumerate(heads) if (lane := between(devices, head)) is not None]
        if not lanes:
            return None
        if len(lanes) < len(heads):
            linked = [i for i, _ in lanes]
            most, exposed = most[linked], exposed[linked]
            numbers = [numbers[i] for i in linked]
        return self._through([lane for _, lane in lanes], most, exposed, numbers)

    def _through(
        self, lanes: list[Ways], most: Floats, exposed: Floats, who: list[int]
    ) -> tuple[Floats, Floats, Ints]:
        if len(who) == 1:
            both, least, late = self._crossing(lanes[0])
            one: Floats = both + most[0]
            np.maximum(least, one, out=one)
            return one, exposed[0] - late, np.full(one.shape, who[0], dtype=np.int64)
        found = [self._crossing(lane) for lane in lanes]
        after: Floats = np.stack([both for both, _, _ in found]) + most
        np.maximum(np.stack([least for _, least, _ in found]), after, out=after)
        hidden: Floats = exposed - np.stack([late for _, _, late in found])
        best = np.argmin(after + np.maximum(hidden, 0.0), axis=0)
        return (
            after[best, self.m_index, self.at_index],
            hidden[best, self.m_index, self.at_index],
            np.array(who, dtype=np.int64)[best],
        )

    def _crossing(self, lanes: Ways) -> tuple[Floats, Floats, Floats]:
        """``[M, position]`` of a link: time both ways of one micro-batch, least G, what is taken off X."""
        known = self.groups.crossings.get(id(lanes))
        if known is None:
            forth, back = lanes
            out, into = self.forth * forth.s_per_byte, self.back * back.s_per_byte
            both = out + into + (forth.latency_s + back.latency_s)
            least = self.later * np.maximum(out, into) + both
            known = self.groups.crossings[id(lanes)] = (
                both,
                least,
                into + back.latency_s if self.barrier else both,
            )
        return known

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
        """The best plan of every entry and micro-batch count, cheapest first."""
        totals = self._totals(self.entries)
        rising = np.argsort(totals, axis=None, kind="stable")
        out: list[Found] = []
        for at in rising[:MOST_TRACED]:
            number, m = divmod(int(at), len(self.counts))
            if totals[number, m] >= INFEASIBLE_S:
                break
            held = self._held(number, m)
            used = tuple(sorted({d for group in held for d in group}))
            price_s = float(totals[number, m]) if self.head is not None else self._fed(number, m, used)
            if self._labels_reach(held):
                out.append(Found(price_s, m, used, number))
        return sorted(out, key=lambda f: (f.price_s, f.micro_batches, f.used, f.entry))

    def best_s(self, key: int | None = None) -> float:
        """About the price of the first that ``found`` gives, of one state or of all; infinite if none."""
        entries = self.entries if key is None else [self.entries[i] for i in self._own(key)]
        if len(entries) == 1 and self.head is None:
            return self._least_s(entries[0])
        totals = self._totals(entries)
        least = float(totals.min()) if totals.size else INFEASIBLE_S
        return least if least < INFEASIBLE_S else float("inf")

    def _least_s(self, entry: Entry) -> float:
        """As ``best_s`` of one entry, which local searches ask for thousands of times."""
        lane = self.lanes.inputs(entry.group)
        if lane is None:
            return float("inf")
        total = entry.most[:, 0] + np.maximum(entry.exposed[:, 0], 0.0)
        least = float(np.maximum(total, lane.s_per_byte * self.raw).min())
        return least if least < INFEASIBLE_S else float("inf")

    def _own(self, key: int) -> list[int]:
        return self.states[key].entries if key in self.states else []

    def _totals(self, entries: Sequence[Entry]) -> Floats:
        """``[entry, M]`` price; where a data device computes, without the wait for its first rows."""
        if not entries:
            return np.zeros((0, len(self.counts)))
        if self.head is not None:
            return np.stack([self._headed(self.head, e.group, e.most, e.exposed) for e in entries])
        out = np.stack([e.most[:, 0] + np.maximum(e.exposed[:, 0], 0.0) for e in entries])
        lanes = [self.lanes.inputs(e.group) for e in entries]
        supply = np.array([INFEASIBLE_S if lane is None else lane.s_per_byte for lane in lanes])
        return np.maximum(out, supply[:, None] * self.raw[None])

    def _labels_reach(self, held: Sequence[Group]) -> bool:
        """Whether the labels reach the last stage from the first, which was not known when it was chosen."""
        if not (self.labels and self.lanes.misses_labels):
            return True
        return self.lanes.links.reach(held[0], held[-1])

    def _fed(self, number: int, m: int, used: Group) -> float:
        """Price with the raw data on its way to the first stage, where it is not there already."""
        entry, lane = self.entries[number], self.lanes.inputs(self.entries[number].group)
        assert lane is not None
        most, exposed = float(entry.most[m, 0]), float(entry.exposed[m, 0])
        occupied = float(self.forth[m, 0]) * lane.s_per_byte
        fill = occupied + lane.latency_s if lane.s_per_byte else 0.0
        if set(lane.senders).isdisjoint(used):
            return max(most + max(exposed, 0.0), float(self.counts[m]) * occupied)
        total = max(float(self.counts[m] - 1) * occupied + fill, fill + most)
        return total + max(exposed - (0.0 if self.barrier else fill), 0.0)

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
        spans = self._spans(found.entry, found.micro_batches)
        return Outline(self.groups.micro_batches[found.micro_batches], spans, found.price_s)

    def _held(self, number: int, m: int) -> list[Group]:
        """The groups of ``_spans``."""
        held: list[Group] = []
        at = 0
        if self.head is not None:
            at = self.head.at
            held.append(self.head.group)
        while number >= 0:
            entry = self.entries[number]
            number, cut = entry.follower.item(m, at), entry.cut.item(m, at)
            held.append(entry.group)
            at = cut
        if self.tail is not None:
            held.append(self.tail.group)
        return held

    def _spans(self, number: int, m: int) -> tuple[Span, ...]:
        cuts = self.groups.cuts
        spans: list[Span] = []
        at = 0
        if self.head is not None:
            at = self.head.at
            spans.append(Span(0, cuts[at], self.head.group, self._given(self.head.group, m)))
        while number >= 0:
            entry = self.entries[number]
            cut, number = int(entry.cut[m, at]), int(entry.follower[m, at])
            stop = len(cuts) - 1 if cut < 0 else cut
            spans.append(Span(cuts[at], cuts[stop], entry.group))
            at = stop
        if self.tail is not None:
            spans.append(Span(cuts[at], cuts[-1], self.tail.group, self._given(self.tail.group, m)))
        return tuple(spans)

    def _given(self, group: Group, m: int) -> tuple[int, ...]:
        problem = self.groups.problem
        replicas = problem.source_rows(problem.job.batch // self.groups.micro_batches[m])
        rows = {problem.index[r.device]: r.rows for r in replicas}
        return tuple(rows[d] for d in group)
