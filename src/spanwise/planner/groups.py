"""Time of every range of layers on a group of devices, at every micro-batch count: what searches look up."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spanwise.planner.lanes import Group
from spanwise.planner.problem import Problem
from spanwise.planner.rows import min_max_rows
from spanwise.planner.tables import Floats, Ints

INFEASIBLE_S = 1e30  # in place of infinity: sums, differences and products with 0 stay numbers


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Of one group; ``INFEASIBLE_S`` where memory or rows do not allow it, and below the diagonal.

    Attributes:
        forward, backward: ``[M, start, stop]`` seconds a micro-batch of the slowest replica: index of the
            micro-batch count, start and stop positions of the grid.
        sum_s: ``[start, stop]`` gradient sum and update.
        both: forward + backward.
    """

    forward: Floats
    backward: Floats
    sum_s: Floats
    both: Floats


@dataclass(slots=True)
class Groups:
    """Stage times of groups on a grid of cuts, worked out when first asked for.

    Attributes:
        cuts: grid positions.
        micro_batches: counts M, an axis of all times.
        in_flight: micro-batches whose activations must fit (fewer if M is less); 0 = memory is ignored.
    """

    problem: Problem
    cuts: tuple[int, ...]
    micro_batches: tuple[int, ...]
    in_flight: int = 1
    _times: dict[Group, StageTimes] = field(default_factory=dict[Group, StageTimes])
    _both: dict[int, Floats] = field(default_factory=dict[int, Floats])

    @property
    def ranges(self) -> tuple[Ints, Ints]:
        """Grid indices (start, stop) of all ranges."""
        start, stop = np.triu_indices(len(self.cuts), 1)
        return start.astype(np.int64), stop.astype(np.int64)

    def times(self, group: Group) -> StageTimes:
        """Of a group whose rows are shared so that its slowest replica is as fast as can be."""
        if group not in self._times:
            self._times[group] = self._stage_times(group)
        return self._times[group]

    def fixed_times(self, group: Group, rows: tuple[tuple[int, ...], ...]) -> StageTimes:
        """Of a group with given rows, one tuple for every micro-batch count."""
        least = self._least_rows()
        count, size = len(self.micro_batches), len(least)
        found = np.array(rows, dtype=np.int64)[:, None, :].repeat(size, axis=1)
        feasible = found.min(axis=2) >= least[None]
        for m in range(count):
            for at, device in enumerate(group):
                cap = self._cap(device, m, synced=len(group) > 1)
                if cap is not None:
                    feasible[m] &= found[m, :, at] <= cap
        return self._from_rows(group, list(found), list(feasible))

    def _stage_times(self, group: Group) -> StageTimes:
        least = self._least_rows()
        rows: list[Ints] = []
        feasible: list[NDArray[np.bool_]] = []
        for m, count in enumerate(self.micro_batches):
            total = self.problem.job.batch // count
            if len(group) == 1:
                cap = self._cap(group[0], m, synced=False)
                rows.append(np.full((len(least), 1), total, dtype=np.int64))
                feasible.append(least <= total if cap is None else (cap >= total) & (least <= total))
                continue
            seconds = np.stack([self._range_seconds(d)[:, :total] for d in group], axis=1)
            for at, device in enumerate(group):
                cap = self._cap(device, m, synced=True)
                if cap is not None and int(cap.min()) < total:
                    over = np.arange(1, total + 1)[None, :] > cap[:, None]
                    seconds[:, at][over] = np.inf
            found, fits = min_max_rows(seconds, total, least)
            rows.append(found)
            feasible.append(fits & (found.min(axis=1) >= least))  # without a row it is a smaller group
        return self._from_rows(group, rows, feasible)

    def _least_rows(self) -> Ints:
        """Per range."""
        at = np.array(self.cuts)
        start, stop = self.ranges
        return self.problem.tables.least_rows(at[start], at[stop])

    def _range_seconds(self, device: int) -> Floats:
        """``[range, rows]`` of 1..batch rows, forward and backward."""
        if device not in self._both:
            tables = self.problem.tables
            at = np.array(self.cuts)
            both = (tables.forward[device] + tables.backward[device])[at, 1:]
            start, stop = self.ranges
            # Differences of prefix sums can fall by rounding; the rows must never make time shorter.
            self._both[device] = np.maximum.accumulate(both[stop] - both[start], axis=1)
        return self._both[device]

    def _cap(self, device: int, m: int, *, synced: bool) -> Ints | None:
        """Most rows per range by memory; None if memory is ignored."""
        if not self.in_flight:
            return None
        at = np.array(self.cuts)
        start, stop = self.ranges
        depth = min(self.in_flight, self.micro_batches[m])
        return self.problem.tables.row_cap(device, at[start], at[stop], in_flight=depth, synced=synced)

    def _from_rows(self, group: Group, rows: list[Ints], feasible: list[NDArray[np.bool_]]) -> StageTimes:
        tables, links = self.problem.tables, self.problem.links
        at = np.array(self.cuts)
        start, stop = self.ranges
        first, last = at[start], at[stop]
        side = len(self.cuts)
        forward = np.full((len(self.micro_batches), side, side), INFEASIBLE_S)
        backward = np.full_like(forward, INFEASIBLE_S)
        for m, (found, fits) in enumerate(zip(rows, feasible, strict=True)):
            f = np.zeros(len(start))
            b = np.zeros(len(start))
            for position, device in enumerate(group):
                y, extra = found[:, position], 2 * tables.message_s[device]
                f = np.maximum(f, tables.forward[device, last, y] - tables.forward[device, first, y] + extra)
                b = np.maximum(
                    b, tables.backward[device, last, y] - tables.backward[device, first, y] + extra
                )
            forward[m, start, stop] = np.where(fits, f, INFEASIBLE_S)
            backward[m, start, stop] = np.where(fits, b, INFEASIBLE_S)
        per_byte, fixed = links.ring(links.in_order(group))
        update = float(tables.update_s_per_byte[list(group)].max())
        sum_s = np.full((side, side), INFEASIBLE_S)
        sum_s[start, stop] = np.minimum(
            (per_byte + update) * tables.parameters[first, last] + fixed, INFEASIBLE_S
        )
        return StageTimes(forward, backward, sum_s, forward + backward)
