"""Time of every range of layers on a group of devices, at every micro-batch count: what searches look up."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from spanwise.planner.facts.kinds import Group, Mix, by_kind
from spanwise.planner.facts.rows import rows_of_kinds
from spanwise.planner.facts.tables import Floats, Ints
from spanwise.planner.problem import Problem

MOST_ENTRIES = 10_000  # times that are compared to share the rows of a group, about; with at least
LEAST_LOTS = 8  # lots of rows a device
INFEASIBLE_S = 1e30  # in place of infinity: sums, differences and products with 0 stay numbers


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Of one group; ``INFEASIBLE_S`` where memory or rows do not allow it, and below the diagonal.

    Attributes:
        both: ``[M, start, stop]`` seconds a micro-batch of the slowest replica, forward and backward: index
            of the micro-batch count, start and stop positions of the grid. In halves, forward and input half:
            what other stages wait for.
        whole: that of all micro-batches, one after the other, with their weight halves.
        backward: its backward or input half alone.
        sum_s: ``[start, stop]`` gradient sum and update.
    """

    both: Floats
    whole: Floats
    backward: Floats
    sum_s: Floats


@dataclass
class Groups:
    """Stage times of groups on a grid of cuts, worked out when first asked for, once for equal devices.

    Attributes:
        cuts: grid positions.
        micro_batches: counts M, an axis of all times.
        in_flight: micro-batches whose activations must fit (fewer if M is less); 0 = memory is ignored.
        halves: whether backwards are done in halves, the weight halves while others would be waited for.
        crossings: what searches know of the links between groups, by identity of these, which live as long as
            the problem.
    """

    problem: Problem
    cuts: tuple[int, ...]
    micro_batches: tuple[int, ...]
    in_flight: int = 1
    halves: bool = False
    crossings: dict[int, tuple[Floats, Floats, Floats]] = field(
        default_factory=dict[int, tuple[Floats, Floats, Floats]]
    )
    _times: dict[tuple[Mix, int], StageTimes] = field(default_factory=dict[tuple[Mix, int], StageTimes])
    _both: dict[int, Floats] = field(default_factory=dict[int, Floats])
    _caps: dict[tuple[int, int, bool], Ints] = field(default_factory=dict[tuple[int, int, bool], Ints])

    @cached_property
    def ranges(self) -> tuple[Ints, Ints]:
        """Grid indices (start, stop) of all ranges."""
        start, stop = np.triu_indices(len(self.cuts), 1)
        return start.astype(np.int64), stop.astype(np.int64)

    @cached_property
    def layers(self) -> tuple[Ints, Ints]:
        """First layer of every range and the one behind its last."""
        at = np.array(self.cuts)
        start, stop = self.ranges
        return at[start], at[stop]

    @cached_property
    def least(self) -> Ints:
        """Rows that a replica of every range needs."""
        return self.problem.tables.least_rows(*self.layers)

    def times(self, group: Group, ahead: int = 0) -> StageTimes:
        """Of a group whose rows are shared so that its slowest replica is as fast as can be.

        ``ahead`` in place of ``in_flight``, unless it is 0.
        """
        key = (self.problem.lanes.mix(group), ahead)
        if key not in self._times:
            self._times[key] = self._stage_times(group, ahead or self.in_flight)
        return self._times[key]

    def fixed_times(self, group: Group, rows: tuple[tuple[int, ...], ...]) -> StageTimes:
        """Of a group with given rows, one tuple for every micro-batch count."""
        size = len(self.least)
        found = np.array(rows, dtype=np.int64)[:, None, :].repeat(size, axis=1)
        feasible = found.min(axis=2) >= self.least[None]
        for m in range(len(self.micro_batches)):
            for at, device in enumerate(group):
                cap = self._cap(device, m, self.in_flight, synced=len(group) > 1)
                if cap is not None:
                    feasible[m] &= found[m, :, at] <= cap
        return self._from_rows(group, group, list(found), list(feasible))

    def _stage_times(self, group: Group, in_flight: int) -> StageTimes:
        alike = by_kind(self.problem.kinds, group)
        leaders = tuple(members[0] for members in alike)
        counts = [len(members) for members in alike]
        rows: list[Ints] = []
        feasible: list[NDArray[np.bool_]] = []
        for m, count in enumerate(self.micro_batches):
            total = self.problem.job.batch // count
            if len(group) > total:
                rows.append(np.zeros((len(self.least), len(leaders)), dtype=np.int64))
                feasible.append(np.zeros(len(self.least), dtype=bool))
                continue
            if len(group) == 1:
                cap, fits = self._cap(group[0], m, in_flight, synced=False), self.least <= total
                rows.append(np.full((len(self.least), 1), total, dtype=np.int64))
                feasible.append(fits if cap is None else (cap >= total) & fits)
                continue
            lot = self._lot(total, len(group), len(leaders))
            # A device that got more rows than this would leave another without any.
            most = total if lot > 1 else min(total, total - len(group) + 2)
            given = np.arange(lot, most + 1, lot)
            seconds = np.stack([self._range_seconds(d)[:, lot - 1 : most : lot] for d in leaders], axis=1)
            for at, device in enumerate(leaders):
                cap = self._cap(device, m, in_flight, synced=True)
                if cap is not None and int(cap.min()) < total:
                    seconds[:, at][given[None, :] > cap[:, None]] = np.inf
            least = self.least if lot == 1 else None
            largest, fewest, fits = rows_of_kinds(seconds, counts, total // lot, least)
            largest, fewest = lot * largest, lot * fewest
            rows.append(largest)
            feasible.append(fits & (fewest.min(axis=1) >= self.least))  # without a row it is a smaller group
        return self._from_rows(group, leaders, rows, feasible)

    def _lot(self, total: int, devices: int, kinds: int) -> int:
        """Rows that are given at once: of many rows and ranges several, which saves time in a search."""
        lot = 1
        while (
            total % (2 * lot) == 0
            and total // lot >= 2 * LEAST_LOTS * devices
            and len(self.least) * kinds * (total // lot) > MOST_ENTRIES
        ):
            lot *= 2
        return lot

    def _range_seconds(self, device: int) -> Floats:
        """``[range, rows]`` of 1..batch rows, forward and backward."""
        kind = self.problem.kinds[device]
        if kind not in self._both:
            first, last = self.layers
            both: Floats = self.problem.tables.both[device, :, 1:]
            # Differences of prefix sums can fall by rounding; the rows must never make time shorter.
            self._both[kind] = np.maximum.accumulate(both[last] - both[first], axis=1)
        return self._both[kind]

    def _cap(self, device: int, m: int, in_flight: int, *, synced: bool) -> Ints | None:
        """Most rows per range by memory; None if memory is ignored."""
        if not in_flight:
            return None
        depth = min(in_flight, self.micro_batches[m])
        key = (self.problem.kinds[device], depth, synced)
        if key not in self._caps:
            first, last = self.layers
            self._caps[key] = self.problem.tables.row_cap(device, first, last, in_flight=depth, synced=synced)
        return self._caps[key]

    def _from_rows(
        self, group: Group, leaders: Group, rows: list[Ints], feasible: list[NDArray[np.bool_]]
    ) -> StageTimes:
        """``leaders``: one device of every kind; ``rows``: the most that one of its kind has."""
        tables, links = self.problem.tables, self.problem.links
        start, stop = self.ranges
        first, last = self.layers
        side = len(self.cuts)
        both = np.full((len(self.micro_batches), side, side), INFEASIBLE_S)
        backward = np.full_like(both, INFEASIBLE_S)
        found, fits = np.stack(rows), np.stack(feasible)
        f, b, w = (np.zeros(fits.shape) for _ in range(3))
        back = tables.backward_input if self.halves else tables.backward
        for position, device in enumerate(leaders):
            y, extra = found[:, :, position], 2 * tables.message_s[device]
            ways = [(f, tables.forward, extra), (b, back, extra)]
            if self.halves:
                ways.append((w, tables.backward_weight, 0.0))
            for most, upto, more in ways:
                prefix = upto[device]
                seconds = prefix[last, y] - prefix[first, y]
                seconds += more
                np.maximum(most, seconds, out=most)
        both[:, start, stop] = np.where(fits, f + b, INFEASIBLE_S)
        backward[:, start, stop] = np.where(fits, b, INFEASIBLE_S)
        whole = both
        if self.halves:
            whole = np.full_like(both, INFEASIBLE_S)
            whole[:, start, stop] = np.where(fits, f + b + w, INFEASIBLE_S)
        per_byte, fixed = links.ring(links.in_order(group))
        update = float(tables.update_s_per_byte[list(leaders)].max())
        sum_s = np.full((side, side), INFEASIBLE_S)
        sum_s[start, stop] = np.minimum(
            (per_byte + update) * tables.parameters[first, last] + fixed, INFEASIBLE_S
        )
        return StageTimes(both, np.array(self.micro_batches)[:, None, None] * whole, backward, sum_s)
