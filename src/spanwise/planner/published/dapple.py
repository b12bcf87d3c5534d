"""``dapple``: baseline. Stages added from the front, each on devices placed by one of three policies.

Fan et al., "DAPPLE: A Pipelined Data Parallel Approach for Training Large Models", PPoPP 2021, section 4
(planner: pivot stage and placements) and section 3 (warm-up policies A, P-p, and B, 2(P-p)-1). The price is
that of ``known.py``, whose dominant step is DAPPLE's pivot stage. From secondary sources, unverified.

A state is how many devices of every server are used and how many layers are placed. The plan so far is priced
with all that is left as one last stage; the cheapest is kept per state; then the next m' devices hold the
next stage: fresh first (servers not used yet), append first (servers already used), or scatter first (spread
evenly).

Limits. Equal devices are assumed: times are those of the mean device and replicas get equal rows; links count
by the slowest pair of the two groups. A server is a site of the cluster file. All devices are used. Memory,
raw data and privacy are unknown to it: a plan that does not fit is infeasible (the paper's D, which lowers
the warm-up depth to what memory holds, is left out). Both warm-up policies are tried, the simulator decides.
Models of more than 24 layers are planned on the grid of ``grid.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from spanwise.core.plan import Plan, Replica, Stage
from spanwise.planner.facts.lanes import Group
from spanwise.planner.facts.tables import Floats, Ints
from spanwise.planner.plans.build import Depth, warmup
from spanwise.planner.problem import Problem, largest_remainder
from spanwise.planner.published.decided import Decision, fastest_decision
from spanwise.planner.published.known import NO_LINK_S, mean_times, ring_pace, slowest_pair
from spanwise.planner.search.grid import coarse_cuts

Occupancy = tuple[int, ...]  # devices used of every server; of each the first in file order


def dapple(problem: Problem) -> Plan:
    """The plan of the search at the micro-batch count and warm-up policy that suit it best.

    Raises:
        InfeasibleError: memory, links or privacy do not allow its plans; says why.
    """
    decisions: list[Decision] = []
    depths: tuple[Depth, ...] = ("shallow", "deep")
    for m in problem.micro_batch_choices():
        layout = _Layout(problem, m).best()
        decisions += [Decision(m, _stages(problem, layout, m, depth)) for depth in depths if layout]
    return fastest_decision(problem, "dapple", decisions)


def placements(servers: tuple[Group, ...], used: Occupancy, count: int) -> Iterator[Occupancy]:
    """How many more devices of every server the three policies take, each result once.

    Needs ``count`` free devices.
    """
    free = [len(server) - n for server, n in zip(servers, used, strict=True)]
    fresh = [i for i, n in enumerate(used) if n == 0]
    begun = [i for i, n in enumerate(used) if n > 0]
    seen: set[Occupancy] = set()
    for order in (fresh + begun, begun + fresh):
        taken, left = [0] * len(servers), count
        for i in order:
            taken[i] = min(free[i], left)
            left -= taken[i]
        seen.add(tuple(taken))
    taken, left = [0] * len(servers), count
    while left:  # evenly over the servers that are begun, over all if none is, then over the rest
        for i in [i for i in begun if taken[i] < free[i]] or [i for i in fresh if taken[i] < free[i]]:
            if left:
                taken[i] += 1
                left -= 1
    seen.add(tuple(taken))
    yield from sorted(seen, reverse=True)


@dataclass(frozen=True, slots=True)
class _State:
    """The cheapest plan so far per cut at which it ends.

    Of the formula: price, G, seconds of all steps, exposed gradient sum, seconds of all backwards; then where
    the last stage starts, and the state before with the devices of that stage.
    """

    price: Floats
    most: Floats
    before: Floats
    exposed: Floats
    backward: Floats
    start: Ints
    parent: list[tuple[Occupancy, Group] | None]

    @classmethod
    def empty(cls, side: int) -> _State:
        zero = np.zeros(side, np.int64)
        full = [np.full(side, 4 * NO_LINK_S), *(np.zeros(side) for _ in range(4))]
        return cls(full[0], full[1], full[2], full[3], full[4], zero, [None] * side)


@dataclass(slots=True)
class _Layout:
    problem: Problem
    micro_batches: int
    servers: tuple[Group, ...] = field(init=False)
    cuts: tuple[int, ...] = field(init=False)
    mean: tuple[Floats, Floats] = field(init=False)
    states: dict[Occupancy, _State] = field(default_factory=dict[Occupancy, _State])
    _times: dict[Group, tuple[Floats, Floats, Floats]] = field(
        default_factory=dict[Group, "tuple[Floats, Floats, Floats]"]
    )

    def __post_init__(self) -> None:
        devices = self.problem.cluster.devices
        sites = tuple(dict.fromkeys(d.site for d in devices))
        self.servers = tuple(tuple(i for i, d in enumerate(devices) if d.site == site) for site in sites)
        self.cuts = coarse_cuts(self.problem.tables)
        self.mean = mean_times(self.problem)

    def best(self) -> list[tuple[int, int, Group]]:
        """(start, stop, devices) of every stage; empty if a micro-batch has too few rows for the devices."""
        side, sizes = len(self.cuts), tuple(len(server) for server in self.servers)
        nothing = tuple(0 for _ in sizes)
        start = _State.empty(side)
        start.price[0] = 0.0
        self.states[nothing] = start
        for total in range(sum(sizes)):
            for used in [u for u in self.states if sum(u) == total]:
                self._extend(used, sum(sizes) - total)
        end = self.states.get(sizes)
        if end is None or end.price[-1] >= NO_LINK_S:
            return []
        stages: list[tuple[int, int, Group]] = []
        used, at = sizes, side - 1
        while at:
            state = self.states[used]
            parent, begin = state.parent[at], int(state.start[at])
            assert parent is not None  # every priced state but the empty one has been reached from another
            stages.insert(0, (self.cuts[begin], self.cuts[at], parent[1]))
            used, at = parent[0], begin
        return stages

    def _extend(self, used: Occupancy, left: int) -> None:
        """Puts the next stage behind a state: all sizes, policies and cuts."""
        rows = self.problem.job.batch // self.micro_batches
        for count in range(1, min(left, rows) + 1):
            for taken in placements(self.servers, used, count):
                group = tuple(
                    d
                    for server, begin, n in zip(self.servers, used, taken, strict=True)
                    for d in server[begin : begin + n]
                )
                now = tuple(a + b for a, b in zip(used, taken, strict=True))
                rest = tuple(d for server, n in zip(self.servers, now, strict=True) for d in server[n:])
                self._behind(used, now, group, rest)

    def _behind(self, used: Occupancy, now: Occupancy, group: Group, rest: Group) -> None:
        """Prices ``group`` on every range behind state ``used``, what is left as one stage on ``rest``."""
        state, side = self.states[used], len(self.cuts)
        most, before, exposed, backward = self._added(state, used, group)
        price = most + np.maximum(exposed, 0.0) + np.where(state.price[:, None] < NO_LINK_S, 0.0, NO_LINK_S)
        if rest:
            link, last = self._link_s(group, rest), self._stage(rest)
            ends, m = np.arange(side), self.micro_batches
            link_both, last_both = 2 * link[None], (last[0] + last[1])[ends, -1][None]
            whole = np.maximum(most, before + m * link_both)
            whole = np.maximum(whole, before + link_both + m * last_both)
            hidden = last[2][ends, -1][None] - backward - link[None]
            price = np.where(price < NO_LINK_S, whole + np.maximum(np.maximum(exposed, hidden), 0.0), price)
            price[:, -1] = 4 * NO_LINK_S  # layers must be left for the devices that are left
        else:
            price[:, :-1] = 4 * NO_LINK_S
        start, ends = np.argmin(price, axis=0), np.arange(side)
        kept = self.states.setdefault(now, _State.empty(side))
        for at in np.flatnonzero(price[start, ends] < np.minimum(kept.price, NO_LINK_S)):
            s = start[at]
            kept.price[at], kept.start[at] = price[s, at], s
            kept.most[at], kept.before[at] = most[s, at], before[s, at]
            kept.exposed[at], kept.backward[at] = exposed[s, at], backward[s, at]
            kept.parent[at] = (used, group)

    def _added(self, state: _State, used: Occupancy, group: Group) -> tuple[Floats, Floats, Floats, Floats]:
        """``[start, stop]`` of the plan with one stage more: G, all steps, exposed sum, all backwards."""
        m = self.micro_batches
        f, b, sums = self._stage(group)
        most, before = state.most, state.before
        exposed, backward = state.exposed, state.backward
        if any(used):
            link = self._links_from(state, group)
            most = np.maximum(most, before + m * 2 * link)
            before, backward = before + 2 * link, backward + link
        most = np.maximum(most[:, None], before[:, None] + m * (f + b))
        exposed = np.maximum(exposed[:, None], sums - backward[:, None])
        return most, before[:, None] + f + b, exposed, backward[:, None] + b

    def _links_from(self, state: _State, group: Group) -> Floats:
        """``[cut]`` seconds one way from the stage that ends there in a state."""
        out = np.full(len(self.cuts), NO_LINK_S)
        known: dict[Group, Floats] = {}
        for at, parent in enumerate(state.parent):
            if parent is not None:
                if parent[1] not in known:
                    known[parent[1]] = self._link_s(parent[1], group)
                out[at] = known[parent[1]][at]
        return out

    def _link_s(self, group: Group, other: Group) -> Floats:
        rows = self.problem.job.batch // self.micro_batches
        pace = slowest_pair(self.problem, group, other)
        return rows * self.problem.tables.into[list(self.cuts)] * pace.s_per_byte + pace.latency_s

    def _stage(self, group: Group) -> tuple[Floats, Floats, Floats]:
        """``[start, stop]`` forward, backward and gradient sum; ``NO_LINK_S`` below the diagonal."""
        if group not in self._times:
            rows, at = self.problem.job.batch // self.micro_batches, np.array(self.cuts)
            forward, backward = (times[at, -(-rows // len(group))] for times in self.mean)
            ordered = np.triu(np.ones((len(at), len(at)), dtype=bool), 1)
            pace = ring_pace(self.problem, group)
            sums = pace.s_per_byte * self.problem.tables.parameters[at[:, None], at[None]] + pace.latency_s
            self._times[group] = (
                np.where(ordered, forward[None] - forward[:, None], NO_LINK_S),
                np.where(ordered, backward[None] - backward[:, None], NO_LINK_S),
                np.minimum(sums, NO_LINK_S),
            )
        return self._times[group]


def _stages(
    problem: Problem, layout: list[tuple[int, int, Group]], micro_batches: int, depth: Depth
) -> tuple[Stage, ...]:
    ids, rows = problem.cluster.ids, problem.job.batch // micro_batches
    out: list[Stage] = []
    for number, (start, stop, group) in enumerate(layout):
        equal = largest_remainder(rows, (1.0,) * len(group))
        replicas = tuple(Replica(device=ids[d], rows=y) for d, y in zip(group, equal, strict=True))
        ahead = warmup(depth, number, len(layout), micro_batches)
        out.append(Stage(start=start, stop=stop, replicas=replicas, warmup=ahead))
    return tuple(out)
