"""Random instances for HierTrain's planner, and its formulas once more for exhaustive search."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement, pairwise, permutations

import numpy as np
import pytest

from planner_cases import make_graph, make_job
from spanwise.core.cluster import Cluster, Route
from spanwise.core.profile import DeviceTimes, LayerTimes, Profile, TimeTable
from spanwise.planner import Problem
from spanwise.planner.hiertrain.layout import Instance, Layout, Machine, Roles, Terms
from spanwise.planner.hiertrain.model import Form
from spanwise.planner.hiertrain.rows import Room
from spanwise.planner.hiertrain.search import Bounds, Numbers, Rooms, all_cuts_of, bounds, roles_of

IDS = ("end", "edge", "cloud")


def random_instance(
    seed: int, layers: int, rows: int, *, machines: int = 3, server: bool = False
) -> Instance:
    """Device : edge : cloud about 1 : 2-10 : 5-40, own link per pair, the data on the first machine."""
    r = random.Random(seed)
    speeds = [1.0, r.uniform(2, 10), *(r.uniform(5, 40) for _ in range(machines - 2))]
    work = [r.lognormvariate(0, 0.7) for _ in range(layers)]
    sizes = [r.lognormvariate(0, 1) * 2e5 for _ in range(layers)]
    out = [0.0, *(r.lognormvariate(0, 0.7) * 3e4 for _ in range(layers - 1)), 0.0]
    routes: dict[tuple[int, int], Route] = {}
    for a, b in permutations(range(machines), 2):
        rate = r.choice([3e5, 1e6, 4e6, 2e7])
        routes[a, b] = Route(rate, 0.0, ((f"{a}>{b}", rate),))

    def sums(values: list[float]) -> tuple[float, ...]:
        return (0.0, *np.cumsum(values).tolist())

    def machine(number: int, speed: float) -> Machine:
        per_layer = [x * r.lognormvariate(0, 0.2) * 2e-2 / speed for x in work]
        loads = () if number == 0 else ((f"0>{number}", 1.5e4 / routes[0, number].bandwidth_bytes_per_s),)
        zero = (0.0,) * (layers + 1)
        return Machine(
            sums(per_layer), sums([2 * x for x in per_layer]), zero, zero, r.choice([0.0, 1e-8]), loads
        )  # fmt: skip

    total = np.array(sums(sizes))
    return Instance(
        rows=rows,
        machines=tuple(machine(i, speed) for i, speed in enumerate(speeds)),
        out_bytes=tuple(out),
        back_bytes=tuple(out),
        parameters=np.maximum(total[None, :] - total[:, None], 0.0),
        routes=routes,
        exchange="server" if server else "ring",
    )


class Formulas:
    """Sections 3.1 and 3.2 of the method, with o holding a layer only if it computes rows there."""

    def __init__(self, inst: Instance, o: int, s: int, l: int, ms: int, ml: int) -> None:  # noqa: E741
        self.inst, self.o, self.s, self.l, self.ms, self.ml = inst, o, s, l, ms, ml

    def forward(self, w: int, a: int, b: int) -> float:
        return self.inst.machines[w].forward_s[b] - self.inst.machines[w].forward_s[a]

    def backward(self, w: int, a: int, b: int) -> float:
        return self.inst.machines[w].backward_s[b] - self.inst.machines[w].backward_s[a]

    def per_byte(self, a: int, b: int) -> float:
        return 1 / self.inst.routes[a, b].bandwidth_bytes_per_s

    def event(self, bo: int, bs: int, bl: int) -> float:
        o, s, l, ms, ml, n = self.o, self.s, self.l, self.ms, self.ml, self.inst.layers  # noqa: E741
        f, g, link, out = self.forward, self.backward, self.per_byte, self.inst.out_bytes
        raw = [m.input_s for m in self.inst.machines]
        st2 = max(bo * (raw[o] + f(o, 0, ms)), bs * (raw[s] + f(s, 0, ms) + out[ms] * link(s, o)))
        st2 = max(st2, self.queued(s, ms, bo, bs))
        st3 = max(
            st2 + (bo + bs) * f(o, ms, ml), bl * (raw[l] + f(l, 0, ml) + out[ml] * link(l, o))
        )  # fmt: skip
        st3 = max(st3, self.queued(l, ml, bo, bl))
        h = st3 + (bo + bs + bl) * (f(o, ml, n) + g(o, ml, n))
        r2 = h + (bo + bs) * g(o, ms, ml)
        r_o, r_s = r2 + bo * g(o, 0, ms), r2 + bs * (out[ms] * link(o, s) + g(s, 0, ms))
        r_l = h + bl * (out[ml] * link(o, l) + g(l, 0, ml))
        return max(r_o, r_s, r_l) + self.end(bo, bs, bl)

    def barrier(self, bo: int, bs: int, bl: int) -> float:
        o, s, l, ms, ml, n = self.o, self.s, self.l, self.ms, self.ml, self.inst.layers  # noqa: E741
        f, g, link, out = self.forward, self.backward, self.per_byte, self.inst.out_bytes
        raw = [m.input_s for m in self.inst.machines]
        f1 = max(
            bo * (raw[o] + f(o, 0, ms)),
            bs * (raw[s] + f(s, 0, ms) + out[ms] * link(s, o)),
            bl * (raw[l] + f(l, 0, ms)),
            self.queued(s, ms, bo, bs) if bs else self.queued(l, ml, bo, bl) if ms == ml else 0.0,
        )
        f2 = max((bo + bs) * f(o, ms, ml), bl * (f(l, ms, ml) + out[ml] * link(l, o)))
        both3 = (bo + bs + bl) * (f(o, ml, n) + g(o, ml, n))
        b2 = max((bo + bs) * g(o, ms, ml), bl * (out[ml] * link(o, l) + g(l, ms, ml)))
        b1 = max(bo * g(o, 0, ms), bs * (out[ms] * link(o, s) + g(s, 0, ms)), bl * g(l, 0, ms))
        return f1 + f2 + both3 + b2 + b1 + self.end(bo, bs, bl)

    def queued(self, w: int, m: int, bo: int, rows: int) -> float:
        """Activations of the machine with the data (0) wait for the raw rows on the same link."""
        if w != 0 or not rows or m == self.inst.layers:
            return 0.0
        raw = self.inst.machines[self.o].input_s
        return bo * raw + rows * self.inst.out_bytes[m] * self.per_byte(w, self.o)

    def held(self, bo: int, bs: int, bl: int) -> dict[int, tuple[int, int]]:
        """From which layer to which each machine holds parameters."""
        first = 0 if bo else self.ms if bs else self.ml
        out = {self.o: (first, self.inst.layers)}
        if bs:
            out[self.s] = (0, self.ms)
        if bl:
            out[self.l] = (0, self.ml)
        return out

    def end(self, bo: int, bs: int, bl: int) -> float:
        held = self.held(bo, bs, bl)
        update = max(
            self.inst.machines[w].update_s_per_byte * float(self.inst.parameters[a, b])
            for w, (a, b) in held.items()
        )
        loads: dict[tuple[int, int], float] = {}
        for a, b in pairwise(sorted({0, self.ms, self.ml, self.inst.layers})):
            ring = [w for w in (self.o, self.s, self.l) if w in held and held[w][0] <= a and b <= held[w][1]]
            size, n = float(self.inst.parameters[a, b]), len(ring)
            if n < 2:
                continue
            if self.inst.exchange == "ring":
                edges = [(x, y, 2 * (n - 1) / n) for x, y in zip(ring, ring[1:] + ring[:1], strict=True)]
            else:
                server = self.o if self.o in ring else self.l
                edges = [(x, server, 2.0) for x in ring if x != server]
            for x, y, times in edges:
                loads[x, y] = loads.get((x, y), 0.0) + times * size * self.per_byte(x, y)
        return update + max(loads.values(), default=0.0)


def exhaustive(inst: Instance, form: Form) -> float:
    """Over all orders, cuts and integer rows of three machines, those without rows included."""
    best = float("inf")
    for o, s, l in permutations(range(3)):  # noqa: E741
        for ms, ml in combinations_with_replacement(range(inst.layers + 1), 2):
            formulas = Formulas(inst, o, s, l, ms, ml)
            price: Callable[[int, int, int], float] = getattr(formulas, form)
            for bs in range(inst.rows + 1 if ms else 1):
                for bl in range(inst.rows - bs + 1 if ml else 1):
                    best = min(best, price(inst.rows - bs - bl, bs, bl))
    return best


def ample(machines: int, total: int, *, starts: bool = True) -> Room:
    """At least one row each, none of the finisher if it does not start any; memory without end."""
    return Room(
        lower=(1 if starts else 0,) + (1,) * (machines - 1),
        upper=(total if starts else 0,) + (total,) * (machines - 1),
        weights=(0.0,) * machines,
    )


def no_limit(inst: Instance) -> Rooms:
    """Every machine has memory for all rows."""

    def room(layout: Layout, micro_batches: int) -> Room:
        roles = layout.roles
        return ample(1 + len(roles.workers), inst.rows // micro_batches, starts=roles.starts)

    return room


def families(inst: Instance, most_helpers: int = 2) -> list[Bounds]:
    """All layouts of an instance by roles."""
    numbers = Numbers.of(inst)
    out: list[Bounds] = []
    for helpers in range(min(most_helpers, len(inst.machines) - 1) + 1):
        for starts in (True, False) if helpers else (True,):
            for roles in roles_of(range(len(inst.machines)), helpers, starts=starts):
                cuts = all_cuts_of(roles, range(1, inst.layers + 1), inst.layers)
                found = bounds(numbers, roles, cuts) if len(cuts) else None
                if found is not None:
                    out.append(found)
    return out


def layouts(inst: Instance, most_helpers: int = 2) -> Iterator[Layout]:
    """The same one by one."""
    for family in families(inst, most_helpers):
        for cuts in family.cuts:
            yield Layout(family.roles, tuple(int(m) for m in cuts))


def programme_s(formula: Terms, total: int, room: Room, *, whole: bool = True) -> float:
    """The least step time by HiGHS: rows whole or real, one real variable for every maximum."""
    optimize = pytest.importorskip("scipy.optimize")
    count, tops = len(room.lower), len(formula.groups)
    rows: list[list[float]] = [[1.0] * count + [0.0] * tops, [*room.weights] + [0.0] * tops]
    least, most = [float(total), -np.inf], [float(total), room.most]
    for number, group in enumerate(formula.groups):
        for line in group:
            top = [0.0] * tops
            top[number] = 1.0
            rows.append([-c for c in line[1:]] + top)
            least.append(line[0])
            most.append(np.inf)
    found = optimize.milp(
        np.array([0.0] * count + [1.0] * tops),
        constraints=optimize.LinearConstraint(np.array(rows), np.array(least), np.array(most)),
        integrality=np.array([int(whole)] * count + [0] * tops),
        bounds=optimize.Bounds([*room.lower, *[0.0] * tops], [*room.upper, *[np.inf] * tops]),
        options={"mip_rel_gap": 0.0},
    )
    assert found.success
    return formula.constant_s + float(found.fun)


def three_problem(
    seed: int,
    *,
    layers: int = 5,
    batch: int = 16,
    launch_s: float = 0.0,
    updates: tuple[str, ...] = IDS,
    **job: object,
) -> Problem:
    """Three machines with layer times of their own, a link of its own for each pair and way, no latency.

    Labels weigh nothing; messages cost no compute; only devices in ``updates`` take time for the update. The
    data is on a random device.
    """
    r = random.Random(seed)
    graph = make_graph(layers, seed).model_copy(update={"labels": ()})
    ids = IDS
    links = [
        {"from": a, "to": b, "bandwidth": r.choice(["5 Mbit/s", "20 Mbit/s", "100 Mbit/s"])}
        for a, b in permutations(ids, 2)
    ]
    devices = [{"id": name, "tier": name} for name in ids]
    cluster = Cluster.parse({"devices": devices, "links": links, "data": [r.choice(ids)]})
    rows = (1, 4, 16, 128)
    tables: list[TimeTable] = []
    for name, speed in zip(ids, (1.0, r.uniform(2, 10), r.uniform(5, 40)), strict=True):
        each = [x.forward_flops / 4e8 / speed * r.lognormvariate(0, 0.2) for x in graph.layers]
        timed = tuple(
            LayerTimes(
                forward_s=tuple(launch_s + s * y for y in rows),
                backward_s=tuple(launch_s + 2 * s * y for y in rows),
            )
            for s in each
        )
        tables.append(TimeTable(rows=rows, layers=timed, update_s_per_byte=1e-8 * (name in updates)))
    times = tuple(DeviceTimes(device=d, table=i) for i, d in enumerate(ids))
    profile = Profile(graph_digest=graph.digest, tables=tuple(tables), devices=times)
    return Problem(graph, profile, cluster, make_job(batch, **job))


def random_layout(seed: int, layers: int, rows: int) -> tuple[Layout, tuple[int, ...]]:
    """Any roles of up to three machines, with rows of a micro-batch."""
    r = random.Random(seed)
    helpers = r.choice([0, 1, 1, 2, 2, 2])
    starts = helpers == 0 or r.random() < 0.7
    order = r.sample(range(3), helpers + 1)
    cuts = sorted(r.randint(1, layers - (not starts)) for _ in range(helpers))
    marks = sorted(r.sample(range(1, rows), helpers - (not starts)))
    sizes = [b - a for a, b in pairwise((0, *marks, rows))]
    return Layout(Roles(order[0], tuple(order[1:]), starts), tuple(cuts)), tuple([0] * (not starts) + sizes)
