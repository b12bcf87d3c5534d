"""From a problem to HierTrain's numbers: which devices, and what they and their links take."""

from __future__ import annotations

import numpy as np

from spanwise.core.cluster import Route
from spanwise.planner.facts.kinds import mix_of
from spanwise.planner.facts.tables import Floats
from spanwise.planner.hiertrain.layout import Instance, Machine
from spanwise.planner.problem import Problem

FEW_ROWS = 8  # times are read at the batch and at this part of it: between the two they are taken as a line


def promising(problem: Problem, most: int, *, alike: int = 3) -> tuple[int, ...]:
    """At most ``most`` devices in file order: those with the data, then the fastest, ``alike`` of a kind.

    Where data devices must start their own rows they are all in. Those that the data does not reach are not.
    """
    links, tables = problem.links, problem.tables
    held = tuple(problem.index[device] for device in problem.sources)
    seconds = tables.both[:, -1, -1]
    rising = [int(d) for d in np.argsort(seconds, kind="stable")]
    data = [d for d in rising if d in held]
    kept = data if problem.first_is_fixed else data[: max(1, most // 2)]
    for device in rising:
        if len(kept) >= most:
            break
        reached = all(links.route(a, device) is not None for a in held) if held else True
        same = dict(mix_of(problem.kinds, tuple(kept))).get(problem.kinds[device], 0)
        if device not in kept and device not in held and reached and same < alike:
            kept = [*kept, device]
    return tuple(sorted(kept))


def instance_of(problem: Problem, devices: tuple[int, ...]) -> Instance:
    """Machine i is ``devices[i]``."""
    tables, links = problem.tables, problem.links
    pairs = [(a, b) for a in range(len(devices)) for b in range(len(devices)) if a != b]
    routes = {pair: links.route(devices[pair[0]], devices[pair[1]]) for pair in pairs}
    return Instance(
        rows=problem.job.batch,
        machines=tuple(_machine(problem, device) for device in devices),
        out_bytes=tuple(tables.into.tolist()),
        back_bytes=tuple(tables.back.tolist()),
        parameters=tables.parameters,
        routes={pair: route for pair, route in routes.items() if route is not None},
        sources=tuple(
            i for i, device in enumerate(devices) if problem.cluster.ids[device] in problem.sources
        ),
    )


def _machine(problem: Problem, device: int) -> Machine:
    forward_s, forward_once_s = _line(problem.tables.forward[device])
    backward_s, backward_once_s = _line(problem.tables.backward[device])
    loads, latency_s = _raw(problem, device)
    return Machine(
        forward_s=forward_s,
        backward_s=backward_s,
        forward_once_s=forward_once_s,
        backward_once_s=backward_once_s,
        update_s_per_byte=float(problem.tables.update_s_per_byte[device]),
        input_loads=loads,
        input_latency_s=latency_s,
    )


def _line(seconds: Floats) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``[layer, rows]`` sums as seconds a row and seconds once, sums again; neither is negative."""
    batch = seconds.shape[1] - 1
    few = max(1, batch // FEW_ROWS)
    layers = np.diff(seconds, axis=0)
    per_row = layers[:, batch] / batch
    if few < batch:
        slope = (layers[:, batch] - layers[:, few]) / (batch - few)
        per_row = np.minimum(np.maximum(slope, 0.0), per_row)
    once = layers[:, batch] - batch * per_row
    return _sums(per_row), _sums(np.maximum(once, 0.0))


def _sums(values: Floats) -> tuple[float, ...]:
    return (0.0, *np.cumsum(values).tolist())


def _raw(problem: Problem, device: int) -> tuple[tuple[tuple[str, float], ...], float]:
    """Capacities on the way of raw rows with seconds a row, and the latency of the farthest.

    Each row comes from a data device as often as that has a share. Where rows must stay none travels.
    """
    loads: dict[str, float] = {}
    latency_s = 0.0
    if problem.first_is_fixed:
        return (), 0.0
    total = sum(share.share for share in problem.shares)
    for share in problem.shares:
        source = problem.index[share.device]
        if source == device:
            continue
        route = problem.links.route(source, device) or Route(0.0, 0.0, (("no link", 0.0),))
        latency_s = max(latency_s, route.latency_s)
        size = share.share / total * problem.graph.input_row_bytes
        for name, rate in route.resources:
            loads[name] = loads.get(name, 0.0) + (size / rate if rate else float("inf"))
    return tuple(loads.items()), latency_s
