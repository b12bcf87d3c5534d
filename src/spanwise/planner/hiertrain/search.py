"""Which machine plays which role and where prefixes end: best first by a bound in closed form.

Rows that a machine of t seconds a row and one of u seconds a row share take ``t u / (t + u)`` seconds a row,
and what the finisher does to all of them afterwards comes on top. So over any rows

    T >= B r_k + B D(m_k, N) + X + U,    r_j = 1 / (1 / (r_j-1 + D(m_j-1, m_j)) + 1 / t_j),
    r_1 = 1 / (1 / (in_o + D(0, m_1)) + 1 / t_1)

with D = F_o + G_o and t_j = in_j + (F_j + G_j)(0, m_j) + both messages: a ladder of resistors. It is weak
duality: forward and backward maxima are weighed alike, with the prices at which all machines cost the same.
The bound of the busiest machine, which M > 1 micro-batches add M - 1 times, is of the same kind: the finisher
is busy B D(0, N) / (1 + sum of D(0, m_j) / (F_j + G_j)(0, m_j)) if all others are as long.

Layouts are looked at from the least bound on, and the search ends where the bound reaches what was found:
exact. Bound and search are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, pairwise, permutations

import numpy as np

from spanwise.planner.facts.tables import Floats, Ints
from spanwise.planner.hiertrain.exchange import ExchangeCost, exchange_cost
from spanwise.planner.hiertrain.layout import Instance, Layout, Roles, Terms, runs_ahead
from spanwise.planner.hiertrain.model import Form, terms
from spanwise.planner.hiertrain.rows import Room, Rows, best_rows

TINY = 1e-300
SLACK = 1e-12  # rounding of the bound
Rooms = Callable[[Layout, int], "Room | None"]  # by layout and micro-batches; none = nothing fits
RowsRule = Callable[[Terms, int, Room], "Rows | None"]  # how all rows are shared out; none = they do not fit


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout with rows of a micro-batch, the finisher's first, and its step time by formula."""

    price_s: float
    layout: Layout
    rows: tuple[int, ...]
    micro_batches: int


@dataclass(frozen=True, slots=True)
class Numbers:
    """An instance as arrays ``[machine, layer]``: forward plus backward, a row and once a micro-batch."""

    instance: Instance
    both: Floats
    once: Floats
    out: Floats
    back: Floats

    @classmethod
    def of(cls, instance: Instance) -> Numbers:
        """Adds forward and backward up."""
        machines = instance.machines
        return cls(
            instance=instance,
            both=np.array([m.forward_s for m in machines]) + np.array([m.backward_s for m in machines]),
            once=np.array([m.forward_once_s for m in machines])
            + np.array([m.backward_once_s for m in machines]),
            out=np.array(instance.out_bytes),
            back=np.array(instance.back_bytes),
        )


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of layouts with the same roles: arrays ``[layout]``.

    Attributes:
        cuts: ``[layout, worker]``.
        row_s: seconds a row of a micro-batch on its way through all machines.
        once_s: seconds a micro-batch besides.
        busy_s, tail_s: seconds a row that the busiest machine is busy, and the finisher behind the last cut.
        end_s: exchange of gradients and update.
    """

    roles: Roles
    cuts: Ints
    row_s: Floats
    once_s: Floats
    busy_s: Floats
    tail_s: Floats
    end_s: Floats

    def seconds(self, rows: int, micro_batches: int) -> Floats:
        """No rows give a shorter step; ``rows`` of a micro-batch."""
        busiest = np.maximum(rows * self.busy_s, rows * self.tail_s + self.once_s)
        return rows * self.row_s + self.once_s + (micro_batches - 1) * busiest + self.end_s


def bounds(numbers: Numbers, roles: Roles, cuts: Ints) -> Bounds | None:
    """The bound of all these cuts ``[layout, worker]``; none where a link is missing."""
    instance, o = numbers.instance, roles.finisher
    exchange = exchange_cost(instance, roles)
    starters = (*((o,) if roles.starts else ()), *roles.workers)
    fed = all(load < np.inf for w in starters for _, load in instance.machines[w].input_loads)
    if exchange is None or not fed or not all(instance.linked(o, w) for w in roles.workers):
        return None
    whole = np.full((len(cuts), 1), instance.layers)
    first, last = (np.concatenate([cuts, whole], axis=1)[:, 0], np.concatenate([whole, cuts], axis=1)[:, -1])
    work = numbers.both[o]
    shared = np.ones(len(cuts))
    ahead = runs_ahead(instance, roles)
    raw_s = [0.0 if ahead else machine.input_s for machine in instance.machines]
    row_s = raw_s[o] + work[first] if roles.starts else np.full(len(cuts), np.inf)
    sizes: list[Floats] = []
    for j, worker in enumerate(roles.workers):
        cut, before = cuts[:, j], cuts[:, j - 1] if j else np.zeros(len(cuts), dtype=np.int64)
        sizes.append(instance.parameters[before, cut])
        there, back = instance.link_s(worker, o), instance.link_s(o, worker)
        alone = numbers.both[worker, cut]
        own = raw_s[worker] + alone + there * numbers.out[cut] + back * numbers.back[cut]
        if j:
            row_s = row_s + work[cut] - work[before]
        row_s = own if j == 0 and not roles.starts else row_s * own / np.maximum(row_s + own, TINY)
        shared += work[cut] / np.maximum(alone, TINY)
    tail = work[-1] - work[last]
    return Bounds(
        roles=roles,
        cuts=cuts,
        row_s=row_s + tail,
        once_s=numbers.once[o, -1] - numbers.once[o, last],
        busy_s=work[-1] / shared,
        tail_s=tail,
        end_s=_end_s(numbers, roles, cuts, exchange, sizes),
    )


def _end_s(numbers: Numbers, roles: Roles, cuts: Ints, cost: ExchangeCost, sizes: list[Floats]) -> Floats:
    """Exchange and update, as in the formula."""
    instance = numbers.instance
    first = cuts[:, 0] if len(roles.workers) and not roles.starts else np.zeros(len(cuts), dtype=np.int64)
    held = instance.parameters[first, instance.layers]
    update = instance.machines[roles.finisher].update_s_per_byte * held
    busiest, latency = np.zeros(len(cuts)), np.zeros(len(cuts))
    for load in cost.loads.values():
        busiest = np.maximum(busiest, sum((c * s for c, s in zip(load, sizes, strict=True)), start=0.0))
    for j, worker in enumerate(roles.workers):
        latency = np.maximum(latency, np.where(sizes[j] > 0, cost.latencies_s[j], 0.0))
        own = instance.machines[worker].update_s_per_byte * instance.parameters[0, cuts[:, j]]
        update = np.maximum(update, own)
    return busiest + latency + update


def all_cuts_of(roles: Roles, grid: Sequence[int], layers: int, *, ordered: bool = False) -> Ints:
    """Every choice of cuts from the grid, rising, ``[layout, worker]``.

    Of workers with the same cut only one order, unless ``ordered``; a finisher that starts no rows must have
    a layer.
    """
    found = list(combinations_with_replacement(sorted(grid), len(roles.workers)))
    cuts = np.reshape(np.array(found, dtype=np.int64), (len(found), len(roles.workers)))
    return allowed_cuts(roles, cuts, layers, ordered=ordered)


def allowed_cuts(roles: Roles, cuts: Ints, layers: int, *, ordered: bool = False) -> Ints:
    """Those of ``cuts`` that are a layout, and not another one written differently."""
    kept = np.full(len(cuts), True)
    for j, (worker, other) in enumerate(pairwise(roles.workers)):
        kept &= cuts[:, j] < cuts[:, j + 1] + (ordered or worker < other)
    if not roles.starts:
        kept &= cuts[:, -1] < layers
    return cuts[kept]


def roles_of(machines: Iterable[int], helpers: int, *, starts: bool = True) -> Iterator[Roles]:
    """All orders of ``helpers`` workers and a finisher."""
    for order in permutations(machines, helpers + 1):
        yield Roles(order[0], order[1:], starts)


@dataclass(slots=True)
class Search:
    """The best layouts among those whose bounds are given.

    ``rule`` gives a layout its rows, and the step time by which it is compared: at least that of the best
    real rows. ``solved`` counts the layouts whose rows were worked out.
    """

    instance: Instance
    rooms: Rooms
    form: Form = "event"
    rule: RowsRule = best_rows
    solved: int = 0
    known: dict[tuple[Layout, int], Candidate | None] = field(
        default_factory=dict[tuple[Layout, int], "Candidate | None"]
    )

    def best(
        self, families: Sequence[Bounds], micro_batches: int = 1, *, keep: int = 1, most: int | None = None
    ) -> list[Candidate]:
        """The ``keep`` shortest steps, shortest first; exact unless more than ``most`` must be looked at."""
        if not families:
            return []
        rows = self.instance.rows // micro_batches
        seconds: Floats = np.concatenate([family.seconds(rows, micro_batches) for family in families])
        ends = np.cumsum([len(family.cuts) for family in families])
        rising: list[int] = np.argsort(seconds, kind="stable").tolist()
        found: list[Candidate] = []
        for at in rising[:most]:
            least = float(seconds[at])
            if least == np.inf or (len(found) == keep and least * (1 - SLACK) >= found[-1].price_s):
                break
            number = int(np.searchsorted(ends, at, side="right"))
            family = families[number]
            cuts: list[int] = family.cuts[at - ends[number]].tolist()  # counted from the family's end
            candidate = self.solve(Layout(family.roles, tuple(cuts)), micro_batches)
            if candidate is not None:
                found = sorted([*found, candidate], key=lambda c: c.price_s)[:keep]
        return found

    def solve(self, layout: Layout, micro_batches: int) -> Candidate | None:
        """A layout with its best rows; none if memory has no room."""
        key = (layout, micro_batches)
        if key not in self.known:
            self.solved += 1
            self.known[key] = self._solve(layout, micro_batches)
        return self.known[key]

    def _solve(self, layout: Layout, micro_batches: int) -> Candidate | None:
        room = self.rooms(layout, micro_batches)
        if room is None:
            return None
        formula = terms(self.instance, layout, form=self.form, micro_batches=micro_batches)
        found = self.rule(formula, self.instance.rows // micro_batches, room)
        return found and Candidate(found.seconds, layout, found.rows, micro_batches)
