"""From a problem to HierTrain's numbers, and from a layout with rows back to stages of a plan.

Rows lie in the order finisher, worker 1, ..., worker k, or in another that also keeps together what the
finisher has. Between two cuts there is a stage: the finisher has the rows of all whose prefix has ended, each
other worker its own. So devices hold several stages. Rows that stay on a device move nowhere, and the
lowering finds that activations go from worker j to the finisher at cut j and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice, pairwise, product

import numpy as np

from spanwise.core.plan import Replica, Stage, row_ranges
from spanwise.planner.hiertrain.instance import instance_of
from spanwise.planner.hiertrain.layout import Instance, Layout, Roles
from spanwise.planner.hiertrain.rows import Room
from spanwise.planner.hiertrain.search import Bounds, Candidate, Numbers, all_cuts_of, bounds, roles_of
from spanwise.planner.plans.build import Depth, fitted, warmup
from spanwise.planner.problem import Problem
from spanwise.planner.published.decided import Decision
from spanwise.planner.search.grid import coarse_cuts

MOST_CUTS = 64  # of a model, as pairs of cuts are listed for every order of three machines
MOST_CUTS_OF_MANY = 24  # where there are more than six such orders
MOST_SIDES = 5  # machines whose rows are put on either side of those before; the others' lie behind
MOST_MEETINGS = 64
Kind = tuple[int, bool]  # helpers, and whether the finisher starts rows


@dataclass(frozen=True, slots=True)
class Arena:
    """A problem in HierTrain's numbers: machine i of the instance is ``devices[i]`` of the cluster.

    ``grid``: where prefixes may end. ``finalists``: what searches found, kept for other strategies.
    """

    problem: Problem
    devices: tuple[int, ...]
    numbers: Numbers
    grid: tuple[int, ...]
    finalists: dict[tuple[Kind, ...], list[Candidate]] = field(
        default_factory=dict[tuple[Kind, ...], list[Candidate]], compare=False, repr=False
    )

    @classmethod
    def on(cls, problem: Problem, devices: tuple[int, ...]) -> Arena:
        """With these devices; made once a problem."""
        known = problem.memo.arenas
        if devices not in known:
            layers = len(problem.graph)
            cuts = MOST_CUTS if len(devices) <= 3 else MOST_CUTS_OF_MANY
            # Where labels stay with the rows, so does the last layer.
            grid = (layers,) if problem.labels_stay else coarse_cuts(problem.tables, cuts)[1:]
            known[devices] = cls(problem, devices, Numbers.of(instance_of(problem, devices)), grid)
        return known[devices]

    @property
    def instance(self) -> Instance:
        """Machines and links."""
        return self.numbers.instance

    def families(self, helpers: int, *, starts: bool) -> list[Bounds]:
        """All layouts with so many helpers, by roles; where private rows stay, those whose holders start."""
        ordered = self.problem.first_is_fixed
        roles = self.given_roles() if ordered else roles_of(range(len(self.devices)), helpers, starts=starts)
        out: list[Bounds] = []
        for one in roles:
            if (len(one.workers), one.starts) == (helpers, starts):
                cuts = all_cuts_of(one, self.grid, self.instance.layers, ordered=ordered)
                found = bounds(self.numbers, one, cuts) if len(cuts) else None
                if found is not None:
                    out.append(found)
        return out

    def given_roles(self) -> Iterator[Roles]:
        """Where data devices must start their own rows: with one of them or another device as the finisher.

        Rows that come together at a cut must lie next to each other, as they do in the sources.
        """
        place = {device: machine for machine, device in enumerate(self.devices)}
        held = [place[self.problem.index[device]] for device in self.problem.sources]
        others = [machine for machine in range(len(self.devices)) if machine not in held]
        for order in islice(_meetings(held), MOST_MEETINGS):
            yield Roles(order[0], order[1:])
            yield from (Roles(other, order, starts=False) for other in others)

    def room(self, layout: Layout, micro_batches: int) -> Room | None:
        """The rows of a micro-batch that memory, batch statistics and privacy allow; none if they do not."""
        return self._room(layout, micro_batches, bounded=True)

    def roomy(self, layout: Layout, micro_batches: int) -> Room | None:
        """The same without regard to memory."""
        return self._room(layout, micro_batches, bounded=False)

    def _room(self, layout: Layout, micro_batches: int, *, bounded: bool) -> Room | None:
        problem, roles = self.problem, layout.roles
        total = problem.job.batch // micro_batches
        edges = (0, *(layout.cuts or (self.instance.layers,)))
        lower = [problem.least_rows(0, edges[max(j, 1)]) for j in range(len(roles.workers) + 1)]
        upper = [total] * len(lower)
        if not roles.starts:
            lower[0] = upper[0] = 0
            if len(lower) > 2:  # what it takes over from the first worker it has alone
                lower[1] = problem.least_rows(0, edges[2])
        weights, most = [0.0] * len(lower), float("inf")
        if bounded:
            shared = len(lower) - 1 + roles.starts > 1
            weights, most = self._finisher_bytes(layout, shared, total)
            if most < 0:
                return None
            for j, worker in enumerate(roles.workers, 1):
                upper[j] = min(upper[j], self._cap(worker, edges[: j + 1], shared))
        if problem.first_is_fixed:
            given = {r.device: r.rows for r in problem.source_rows(total)}
            ids = problem.cluster.ids
            for j, machine in enumerate((roles.finisher, *roles.workers)):
                if j or roles.starts:
                    own = given[ids[self.devices[machine]]]
                    if not lower[j] <= own <= upper[j]:
                        return None
                    lower[j] = upper[j] = own
        return Room(tuple(lower), tuple(upper), tuple(weights), most)

    def _cap(self, machine: int, edges: Sequence[int], shared: bool) -> int:
        """Most rows that a worker with these stages has memory for."""
        fixed, per_row = self._bytes(edges, shared)
        free = float(self.problem.tables.budget[self.devices[machine]]) - sum(fixed)
        return int(free // max(sum(per_row), 1e-9)) if free >= 0 else -1

    def _finisher_bytes(self, layout: Layout, shared: bool, total: int) -> tuple[list[float], float]:
        """Bytes a row by who started it, and the most that there may be of them."""
        count = len(layout.roles.workers)
        edges = (0, *(layout.cuts or (self.instance.layers,)), self.instance.layers)
        first = 0 if layout.roles.starts else 1
        parts = [self._bytes(edges[i : i + 2], shared and i < count) for i in range(max(count, 1) + 1)]
        budget = float(self.problem.tables.budget[self.devices[layout.roles.finisher]])
        most = budget - sum(sum(fixed) for fixed, _ in parts[first:])
        own = [sum(per_row) for _, per_row in parts]
        # Position j has its rows there from stage j on; the last stage has all rows.
        return [sum(own[j:-1]) for j in range(count + 1)], most - total * own[-1]

    def _bytes(self, edges: Sequence[int], shared: bool) -> tuple[list[float], list[float]]:
        """Fixed bytes and bytes a row of the stages between these edges, empty ones left out."""
        pairs = [(a, b) for a, b in pairwise(edges) if a < b]
        start, stop = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in (0, 1))
        tables = self.problem.tables
        fixed = tables.fixed_bytes(start, stop, in_flight=1, synced=shared)
        return [float(x) for x in fixed], [float(x) for x in tables.row_bytes(start, stop, in_flight=1)]

    def decision(self, candidate: Candidate, depth: Depth = "deep") -> Decision | None:
        """Its stages, the depths lowered as memory asks; none where sources lie in another order."""
        problem = self.problem
        names = [problem.cluster.ids[device] for device in self.devices]
        sources = problem.source_rows(problem.job.batch // candidate.micro_batches)
        found = [
            stages_of(candidate.layout, candidate.rows, self.instance.layers, names, order)
            for order in row_orders(len(candidate.rows))
        ]
        if problem.first_is_fixed:
            found = [stages for stages in found if stages[0].replicas == sources]
            if not found:
                return None
        best = max(found, key=lambda stages: _rows_that_stay(sources, stages[0].replicas))
        count = candidate.micro_batches
        deep = [
            stage.model_copy(update={"warmup": warmup(depth, number, len(best), count)})
            for number, stage in enumerate(best)
        ]
        return Decision(count, fitted(problem, deep, "1f1b", count)[0])


def stages_of(
    layout: Layout, rows: Sequence[int], layers: int, names: Sequence[str], order: Sequence[int]
) -> tuple[Stage, ...]:
    """The stages of a layout, with a warm-up depth of 1.

    Args:
        layout: roles and cuts.
        rows: of a micro-batch, started by the finisher (0) and every worker.
        layers: N.
        names: device of every machine.
        order: of the rows, as 0 for the finisher's and 1, 2, ... for the workers'.
    """
    who = [names[m] for m in (layout.roles.finisher, *layout.roles.workers)]
    out: list[Stage] = []
    for number, (start, stop) in enumerate(pairwise((0, *layout.cuts, layers))):
        held: dict[str, int] = {}
        for j in order:
            device = who[0] if j <= number else who[j]
            held[device] = held.get(device, 0) + rows[j]
        if start < stop:
            replicas = tuple(Replica(device=device, rows=y) for device, y in held.items() if y)
            out.append(Stage(start=start, stop=stop, replicas=replicas))
    return tuple(out)


def row_orders(count: int) -> Iterator[tuple[int, ...]]:
    """Orders of ``count`` machines' rows in which those of the first 2, 3, ... lie next to each other."""
    sided = min(count - 1, MOST_SIDES)
    for sides in product((False, True), repeat=sided):
        order = (0,)
        for j in range(1, count):
            order = (j, *order) if j <= sided and sides[j - 1] else (*order, j)
        yield order


def _meetings(held: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Orders in which neighbours in a row can come together, one after the other, wherever it begins."""
    for start in range(len(held)):
        for left in combinations(range(1, len(held)), start):
            order, low, high = [held[start]], start, start
            for turn in range(1, len(held)):
                low, high = (low - 1, high) if turn in left else (low, high + 1)
                order.append(held[low] if turn in left else held[high])
            yield tuple(order)


def _rows_that_stay(sources: Sequence[Replica], replicas: Sequence[Replica]) -> int:
    """Rows that are computed where they lie."""
    there = row_ranges(tuple(sources))
    here = row_ranges(tuple(replicas))
    return sum(max(0, min(b, e) - max(a, c)) for d, a, b in there for x, c, e in here if d == x)
