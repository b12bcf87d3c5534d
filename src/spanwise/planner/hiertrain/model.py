"""HierTrain in plain numbers: the step time of a layout as a sum of maxima of lines in its rows.

Idea: Liu, Chen, Zhou, Ling, "HierTrain", arXiv 2003.09876, 2020 (IEEE Open Journal of the Communications
Society, vol. 1), of which only the abstract was available to us; the formulas are ours. A *finisher* o may
compute all N layers, worker j = 1..k only the first ``m_j``, ``m_1 <= ... <= m_k``. Each starts ``b`` rows of
the batch; what worker j started, o finishes from ``m_j`` on, together with all rows that it has by then:
``P_j = b_o + b_1 + ... + b_j``. With k = 2 the workers are the paper's s (short) and l (long). With F, G the
forward and backward seconds a row, c the seconds a row at a link, ``in`` those of a raw row on its way:

    event     r_o: b_o (in_o + F_o(0, m_1)) + sum over i >= 1 of P_i F_o(m_i, m_i+1)            and
              r_j: b_j (in_j + F_j(0, m_j) + c_j) + sum over i >= j of P_i F_o(m_i, m_i+1)
              T = max of these + max of the same backward + B (F_o + G_o)(m_k, N) + X + U
    barrier   everybody waits for the slowest at every cut, forward and backward: a maximum for each

X is the exchange of the gradients of the prefixes, U the longest update. Nobody waits for another before its
rows meet, so the event form is what happens; the barrier form is what reports of the paper show.

Ours besides: times may have a part that does not grow with rows, and messages a latency. What shares a
capacity waits for each other, above all activations of the device with the data for the raw rows that it
sends the same way. Where no machine with data computes, raw rows of the next step travel meanwhile: instead
of ``in`` there is a floor, the seconds that any capacity is busy. And a batch may be cut into M
micro-batches, which adds (M - 1) times the busiest machine or link.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from spanwise.planner.hiertrain.exchange import between_cuts, exchange_cost, exchange_s, update_s
from spanwise.planner.hiertrain.layout import (
    Group,
    Instance,
    Layout,
    Line,
    Roles,
    Terms,
    runs_ahead,
    starters,
)

Form = Literal["event", "barrier"]


def step_time_s(
    instance: Instance,
    layout: Layout,
    rows: tuple[int, ...],
    *,
    form: Form = "event",
    micro_batches: int = 1,
) -> float:
    """Seconds of a step; ``rows`` are those of a micro-batch, of the finisher first, 0 if it starts none."""
    return terms(instance, layout, form=form, micro_batches=micro_batches).seconds(rows)


def terms(instance: Instance, layout: Layout, *, form: Form = "event", micro_batches: int = 1) -> Terms:
    """The step time of a layout as lines in the rows of a micro-batch.

    Needs links both ways between the finisher and every worker. Only the event form knows more than one
    micro-batch.
    """
    o, last = instance.machines[layout.roles.finisher], _edges(instance, layout)[-2]
    each = instance.rows // micro_batches
    tail = each * (_part(o.forward_s, last) + _part(o.backward_s, last))
    once = _part(o.forward_once_s, last) + _part(o.backward_once_s, last)
    groups = _event(instance, layout) if form == "event" else _barrier(instance, layout)
    if micro_batches > 1:
        groups = (*groups, _busiest(instance, layout, micro_batches - 1, tail + once))
    constant_s = tail + once + exchange_s(instance, layout) + update_s(instance, layout)
    return Terms(constant_s, groups, _floor(instance, layout, micro_batches))


def _edges(instance: Instance, layout: Layout) -> tuple[int, ...]:
    """Borders of the finisher's work: 0, the cuts, N. Without workers its own rows go to the last layer."""
    return (0, *(layout.cuts or (instance.layers,)), instance.layers)


def _part(sums: tuple[float, ...], start: int, stop: int = -1) -> float:
    """Of layers ``[start, stop)``, to the last unless told otherwise."""
    return sums[stop] - sums[start]


def _event(instance: Instance, layout: Layout) -> tuple[Group, Group]:
    roles, edges = layout.roles, _edges(instance, layout)
    o, raw = instance.machines[roles.finisher], _raw(instance, roles)
    forward: list[Line] = []
    backward: list[Line] = []
    middle_f = [0.0] * (len(roles.workers) + 2)
    middle_b = list(middle_f)
    for j in range(len(roles.workers), -1, -1):
        if 0 < j < len(roles.workers):  # what the finisher does between this cut and the next
            start, stop = edges[j], edges[j + 1]
            for middle, sums, once in (
                (middle_f, o.forward_s, o.forward_once_s),
                (middle_b, o.backward_s, o.backward_once_s),
            ):
                middle[0] += _part(once, start, stop)
                for i in range(j + 1):
                    middle[1 + i] += _part(sums, start, stop)
        if j == 0 and not roles.starts:
            continue
        machine = instance.machines[roles.workers[j - 1]] if j else o
        cut = edges[max(j, 1)]
        out, back = _messages(instance, roles, j, cut)
        line_f, line_b = [a + b for a, b in zip(middle_f, raw[j], strict=True)], list(middle_b)
        line_f[0] += machine.forward_once_s[cut] + out[0]
        line_b[0] += machine.backward_once_s[cut] + back[0]
        line_f[1 + j] += machine.forward_s[cut] + out[1]
        line_b[1 + j] += machine.backward_s[cut] + back[1]
        for crowd in _crowds(instance, layout, j, range(1, j)):
            queued = [a + b for a, b in zip(middle_f, crowd, strict=True)]
            queued[0] += out[0]
            forward.append(tuple(queued))
        for crowd in _crowds(instance, layout, j, range(j + 1, len(roles.workers) + 1), back=True):
            crowd[0] += machine.backward_once_s[cut] + back[0]
            crowd[1 + j] += machine.backward_s[cut]
            backward.append(tuple(crowd))
        forward.append(tuple(line_f))
        backward.append(tuple(line_b))
    return tuple(forward), tuple(backward)


def _barrier(instance: Instance, layout: Layout) -> tuple[Group, ...]:
    roles, edges = layout.roles, _edges(instance, layout)
    count, raw = len(roles.workers), _raw(instance, roles)
    out: list[Group] = []
    for i in range(1, max(count, 1) + 1):
        start, stop = edges[i - 1], edges[i]
        forward: list[Line] = []
        backward: list[Line] = []
        for j in (0, *range(i, count + 1)):
            own = range(i) if j == 0 else (j,)  # whose rows
            if i == 1 and j == 0 and not roles.starts:
                continue
            machine = instance.machines[roles.workers[j - 1] if j else roles.finisher]
            there, here = _messages(instance, roles, j if i == j else 0, stop)
            line_f = list(raw[j]) if i == 1 else [0.0] * (count + 2)
            line_b = [0.0] * (count + 2)
            line_f[0] += _part(machine.forward_once_s, start, stop) + there[0]
            line_b[0] += _part(machine.backward_once_s, start, stop) + here[0]
            for p in own:
                line_f[1 + p] += _part(machine.forward_s, start, stop) + there[1]
                line_b[1 + p] += _part(machine.backward_s, start, stop) + here[1]
            for crowd in _crowds(instance, layout, j, ()) if i == j == 1 else ():
                crowd[0] += there[0]
                forward.append(tuple(crowd))
            forward.append(tuple(line_f))
            backward.append(tuple(line_b))
        out += [tuple(forward), tuple(backward)]
    return tuple(out)


def _busiest(instance: Instance, layout: Layout, times: int, tail_s: float) -> Group:
    """``times`` the seconds a micro-batch that each machine and each link is busy."""
    roles, edges = layout.roles, _edges(instance, layout)
    o, count = instance.machines[roles.finisher], len(roles.workers)
    own = [tail_s] + [0.0] * (count + 1)
    for i in range(0 if roles.starts else 1, max(count, 1)):
        start, stop = edges[i], edges[i + 1]
        own[0] += _part(o.forward_once_s, start, stop) + _part(o.backward_once_s, start, stop)
        for p in range(i + 1):
            own[1 + p] += _part(o.forward_s, start, stop) + _part(o.backward_s, start, stop)
    lines = [own, *_loads(instance, layout).values()]
    for j, worker in enumerate(roles.workers, 1):
        machine, cut = instance.machines[worker], layout.cuts[j - 1]
        computes = [0.0] * (count + 2)
        computes[0] = machine.forward_once_s[cut] + machine.backward_once_s[cut]
        computes[1 + j] = machine.forward_s[cut] + machine.backward_s[cut]
        lines.append(computes)
    return tuple(tuple(times * c for c in line) for line in lines)


def _floor(instance: Instance, layout: Layout, micro_batches: int) -> Group:
    """Seconds a step that every capacity is busy, where raw rows of the next step are among that."""
    if not runs_ahead(instance, layout.roles):
        return ()
    lines = {
        name: [times * micro_batches for times in load] for name, load in _loads(instance, layout).items()
    }
    cost = exchange_cost(instance, layout.roles)
    for name, seconds in cost.busy_s(between_cuts(instance, layout)).items() if cost else ():
        lines.setdefault(name, [0.0] * (len(layout.cuts) + 2))[0] += seconds
    return tuple(map(tuple, lines.values()))


def _loads(instance: Instance, layout: Layout) -> dict[str, list[float]]:
    """For every capacity the line of the seconds that a micro-batch keeps it busy."""
    roles, loads = layout.roles, dict[str, list[float]]()
    blank = [0.0] * (len(roles.workers) + 2)
    for j, machine in starters(roles).items():
        for name, load in instance.machines[machine].input_loads:
            loads.setdefault(name, list(blank))[1 + j] += load
    for j, (worker, cut) in enumerate(zip(roles.workers, layout.cuts, strict=True), 1):
        for way, size in (
            ((worker, roles.finisher), instance.out_bytes[cut]),
            ((roles.finisher, worker), instance.back_bytes[cut]),
        ):
            for name, rate in instance.routes[way].resources:
                loads.setdefault(name, list(blank))[1 + j] += size / rate
    return loads


def _raw(instance: Instance, roles: Roles) -> list[list[float]]:
    """For the finisher and every worker the line until their raw rows have come.

    Rows for others that go over a capacity of one's own way are counted in, as if they came first.
    """
    who = starters(roles)
    out = [[0.0] * (len(roles.workers) + 2) for _ in range(len(roles.workers) + 1)]
    for j, machine in () if runs_ahead(instance, roles) else who.items():
        own = dict(instance.machines[machine].input_loads)
        out[j][0] = instance.machines[machine].input_latency_s
        for i, other in who.items():
            loads = instance.machines[other].input_loads
            out[j][1 + i] = max((load for name, load in loads if name in own), default=0.0)
    return out


def _crowds(
    instance: Instance, layout: Layout, j: int, others: Iterable[int], *, back: bool = False
) -> list[list[float]]:
    """Lines of all that must pass a capacity on worker j's way to the finisher, where it has that not alone.

    That are the activations of ``others`` and the raw rows of this step, which the device with the data sends
    first; on the way ``back`` the gradients of others. The finisher's own rows (j = 0) go nowhere.
    """
    roles, out = layout.roles, list[list[float]]()
    if j == 0 or layout.cuts[j - 1] == instance.layers:
        return out
    sizes = instance.back_bytes if back else instance.out_bytes
    ways = [(roles.finisher, w) if back else (w, roles.finisher) for w in roles.workers]
    raw = () if back or runs_ahead(instance, roles) else starters(roles).items()
    for name, rate in instance.routes[ways[j - 1]].resources:
        line = [0.0] * (len(roles.workers) + 2)
        for i, machine in raw:
            line[1 + i] += dict(instance.machines[machine].input_loads).get(name, 0.0)
        for i in others:
            if name in dict(instance.routes[ways[i - 1]].resources):
                line[1 + i] += sizes[layout.cuts[i - 1]] / rate
        if any(line):
            line[1 + j] += sizes[layout.cuts[j - 1]] / rate
            out.append(line)
    return out


def _messages(instance: Instance, roles: Roles, j: int, cut: int) -> tuple[tuple[float, float], ...]:
    """(latency, seconds a row) of worker j's activations on their way to the finisher, and of gradients back.

    Nothing travels for the finisher's own rows (j = 0) and behind the last layer.
    """
    if j == 0 or cut == instance.layers:
        return (0.0, 0.0), (0.0, 0.0)
    there = instance.routes[roles.workers[j - 1], roles.finisher]
    back = instance.routes[roles.finisher, roles.workers[j - 1]]
    return (
        (there.latency_s, instance.out_bytes[cut] / there.bandwidth_bytes_per_s),
        (back.latency_s, instance.back_bytes[cut] / back.bandwidth_bytes_per_s),
    )
