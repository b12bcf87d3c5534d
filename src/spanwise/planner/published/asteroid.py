"""``asteroid``: baseline. Devices sorted by memory, dynamic programming over layers and devices from the
back.

Ye et al., "Asteroid: Resource-Efficient Hybrid Pipeline Parallelism for Collaborative DNN Training on
Heterogeneous Edge Devices", MobiCom 2024, arXiv 2408.08015, the planner's section. Read from two unofficial
re-implementations that cite the paper's equation numbers, not from the paper: all of it is unverified.

Limits. The device order is by memory, largest first, and is not searched. One plan is kept per state (layers
left, devices left, stages left), which is a heuristic. Prices are those of ``known.py`` (links half
duplex). Raw data and labels on their way are not priced, privacy is unknown to it. Models of more than 24
layers are planned on the grid of ``grid.py``, as the paper merges cheap layers. Memory is Asteroid's: rows
have a cap at warm-up depth 2(P-p)-1; what the formula of ``cost`` or the simulator finds beyond it makes
the plan infeasible.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spanwise.core.plan import Plan, Replica, Stage
from spanwise.planner.facts.lanes import Group
from spanwise.planner.facts.tables import Floats, Ints
from spanwise.planner.problem import Problem
from spanwise.planner.published.decided import Decision, fastest_decision
from spanwise.planner.published.known import NO_LINK_S, Pace, ring_pace, slowest_pair
from spanwise.planner.published.two_phases import two_phase_rows
from spanwise.planner.search.grid import coarse_cuts

_Key = tuple[int, int, int]  # first device, device after the last (of the order), depth


def asteroid(problem: Problem) -> Plan:
    """The plan of the memory-sorted dynamic programme.

    Raises:
        InfeasibleError: no state of it is feasible, or its plan does not hold; says why.
    """
    found = [_Programme(problem, m).decision() for m in problem.micro_batch_choices()]
    return fastest_decision(problem, "asteroid", [d for d in found if d is not None])


@dataclass(frozen=True, slots=True)
class _Block:
    """A stage on a group at every range of the grid; ``NO_LINK_S`` where rows or memory do not allow it.

    ``forward``, ``backward``, ``sum_s`` are ``[start, stop]`` seconds, ``rows`` ``[start, stop, device]``.
    """

    forward: Floats
    backward: Floats
    sum_s: Floats
    rows: Ints


@dataclass(frozen=True, slots=True)
class _Best:
    """The best plans of the last devices from one of the order on, in so many stages, per first cut.

    ``most`` is G of the formula, ``exposed`` the longest gradient sum that nothing hides, ``stop`` the cut
    behind the first stage, ``after`` the first device of the next.
    """

    most: Floats
    exposed: Floats
    stop: Ints
    after: Ints


@dataclass(slots=True)
class _Programme:
    problem: Problem
    micro_batches: int
    order: Group = field(init=False)
    cuts: tuple[int, ...] = field(init=False)
    _blocks: dict[_Key, _Block] = field(default_factory=dict[_Key, _Block])
    _paces: dict[tuple[int, int, int], Pace] = field(default_factory=dict[tuple[int, int, int], Pace])
    _best: dict[tuple[int, int], _Best] = field(default_factory=dict[tuple[int, int], _Best])

    def __post_init__(self) -> None:
        budget = self.problem.tables.budget
        self.order = tuple(sorted(range(len(budget)), key=lambda d: (-float(budget[d]), d)))
        self.cuts = coarse_cuts(self.problem.tables)

    def decision(self) -> Decision | None:
        """The cheapest plan of any number of stages on any last devices of the order, if there is one."""
        count = len(self.order)
        best: tuple[float, int, int] | None = None
        for stages in range(1, min(count, len(self.cuts) - 1) + 1):
            for first in range(count - stages, -1, -1):
                state = self._state(stages, first)
                price = float(state.most[0] + max(float(state.exposed[0]), 0.0))
                if price < NO_LINK_S and (best is None or price < best[0]):
                    best = (price, stages, first)
        return None if best is None else Decision(self.micro_batches, self._stages(best[1], best[2]))

    def _depth(self, stages: int) -> int:
        """Warm-up depth of a stage that is the first of the last ``stages``."""
        return min(2 * stages - 1, self.micro_batches)

    def _state(self, stages: int, first: int) -> _Best:
        if (stages, first) not in self._best:
            self._best[stages, first] = self._one(first) if stages == 1 else self._several(stages, first)
        return self._best[stages, first]

    def _one(self, first: int) -> _Best:
        block = self._block(first, len(self.order), self._depth(1))
        both = block.forward[:, -1] + block.backward[:, -1]
        side = len(self.cuts)
        nobody = np.full(side, len(self.order))
        return _Best(self.micro_batches * both, block.sum_s[:, -1], np.full(side, side - 1), nobody)

    def _several(self, stages: int, first: int) -> _Best:
        side, m = len(self.cuts), self.micro_batches
        best = _Best(
            np.full(side, 2 * NO_LINK_S), np.zeros(side), np.zeros(side, np.int64), np.zeros(side, np.int64)
        )
        price = np.full(side, 2 * NO_LINK_S)
        for after in range(first + 1, len(self.order) - stages + 2):
            tail = self._state(stages - 1, after)
            one_way = self._link_s(first, after, tail.after)
            head = self._block(first, after, self._depth(stages))
            both = head.forward + head.backward
            follow = np.maximum(m * 2 * one_way, 2 * one_way + tail.most)
            most = np.maximum(m * both, both + follow[None])
            exposed = np.maximum(head.sum_s, (tail.exposed - one_way)[None] - head.backward)
            total = most + np.maximum(exposed, 0.0)
            stop, at = np.argmin(total, axis=1), np.arange(side)
            better = total[at, stop] < price
            price = np.where(better, total[at, stop], price)
            best.most[better] = most[at, stop][better]
            best.exposed[better] = exposed[at, stop][better]
            best.stop[better] = stop[better]
            best.after[better] = after
        return best

    def _link_s(self, first: int, middle: int, ends: Ints) -> Floats:
        """``[cut]`` seconds of a micro-batch one way, from one group to the one that holds what follows."""
        at = np.array(self.cuts)
        paces = [self._pace(first, middle, int(end)) for end in ends]
        rows = self.problem.job.batch // self.micro_batches
        per_byte = np.array([p.s_per_byte for p in paces])
        return rows * self.problem.tables.into[at] * per_byte + np.array([p.latency_s for p in paces])

    def _pace(self, first: int, middle: int, end: int) -> Pace:
        key = (first, middle, end)
        if key not in self._paces:
            self._paces[key] = slowest_pair(self.problem, self.order[first:middle], self.order[middle:end])
        return self._paces[key]

    def _block(self, first: int, after: int, depth: int) -> _Block:
        key = (first, after, depth)
        if key not in self._blocks:
            self._blocks[key] = self._stage(self.order[first:after], depth)
        return self._blocks[key]

    def _stage(self, group: Group, depth: int) -> _Block:
        tables, side = self.problem.tables, len(self.cuts)
        total = self.problem.job.batch // self.micro_batches
        at = np.array(self.cuts)
        begin, end = np.triu_indices(side, 1)
        start, stop = at[begin], at[end]
        both = tables.both[list(group), :, 1 : total + 1]
        # Differences of prefix sums can fall by rounding; the rows must never make time shorter.
        seconds = np.maximum.accumulate(np.moveaxis(both[:, stop] - both[:, start], 0, 1), axis=2)
        caps = [tables.row_cap(d, start, stop, in_flight=depth, synced=len(group) > 1) for d in group]
        found, fits = two_phase_rows(seconds, np.stack(caps, axis=1), total)
        forward, backward, case = np.zeros(len(start)), np.zeros(len(start)), np.arange(len(start))
        for position, device in enumerate(group):
            y = found[case, position]
            forward = np.maximum(forward, tables.forward[device, stop, y] - tables.forward[device, start, y])
            backward = np.maximum(
                backward, tables.backward[device, stop, y] - tables.backward[device, start, y]
            )
        pace = ring_pace(self.problem, group)
        sums = np.minimum(pace.s_per_byte * tables.parameters[start, stop] + pace.latency_s, NO_LINK_S)

        def square(values: Floats) -> Floats:
            out = np.full((side, side), NO_LINK_S)
            out[begin, end] = np.where(fits, values, NO_LINK_S)
            return out

        rows = np.zeros((side, side, len(group)), dtype=np.int64)
        rows[begin, end] = found
        return _Block(square(forward), square(backward), square(sums), rows)

    def _stages(self, stages: int, first: int) -> tuple[Stage, ...]:
        ids, at = self.problem.cluster.ids, 0
        out: list[Stage] = []
        for left in range(stages, 0, -1):
            state = self._state(left, first)
            stop, after = int(state.stop[at]), int(state.after[at])
            rows = self._block(first, after, self._depth(left)).rows[at, stop]
            replicas = tuple(
                Replica(device=ids[d], rows=int(y))
                for d, y in zip(self.order[first:after], rows, strict=True)
            )
            depth = self._depth(left)
            out.append(Stage(start=self.cuts[at], stop=self.cuts[stop], replicas=replicas, warmup=depth))
            at, first = stop, after
        return tuple(out)
