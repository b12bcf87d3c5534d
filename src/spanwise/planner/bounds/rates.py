"""The least seconds that each layer can take on each device, whatever the plan."""

from __future__ import annotations

import numpy as np

from spanwise.core.model import ModelGraph
from spanwise.core.profile import LayerTimes, TimeTable, halves_of
from spanwise.cost.halves import most_at_once
from spanwise.planner.facts.tables import Floats
from spanwise.planner.problem import Problem

IMPOSSIBLE_S = 1e30  # in place of infinity: a layer that a device may not compute, or cannot hold


def least_seconds(problem: Problem) -> Floats:
    """``[device, layer]`` seconds for all rows of a batch, with the parameters' update.

    Each at the rows per micro-batch where a row takes least, of all from 1 to the batch; the optimizer step
    of a layer counts with the part of the rows, as whoever has any of them takes all of it. A parameter of
    several layers counts in the first. Devices that share a machine are as fast as alone on it.

    ``IMPOSSIBLE_S``: the parameters of the layer alone, with gradients and optimizer state, are above the
    budget; or private data or labels may not come to this device.
    """
    graph, batch = problem.graph, problem.job.batch
    per_row = {id(t): _least_row_s(t, graph, batch) for t in problem.profile.tables}
    alone = {entry.device: entry.alone for entry in problem.profile.devices}
    fresh = _first_uses(problem)
    own = np.array([layer.parameter_bytes for layer in graph.layers], dtype=np.float64)
    out = np.zeros((len(problem.cluster.devices), len(graph)))
    for d, device in enumerate(problem.cluster.devices):
        table, factor = problem.profile.table(device.id)
        seconds = batch * per_row[id(table)] + table.update_s_per_byte * fresh
        out[d] = factor * alone[device.id] * seconds
        out[d, own * (2 + problem.copies) > device.memory_bytes] = IMPOSSIBLE_S
        if problem.first_is_fixed and device.id not in problem.sources:
            out[d, 0] = IMPOSSIBLE_S
        if problem.last_is_fixed and device.id not in problem.sources:
            out[d, -1] = IMPOSSIBLE_S
    return out


def _first_uses(problem: Problem) -> Floats:
    """``[layer]`` bytes of the parameters that no earlier layer uses."""
    seen: set[str] = set()
    out: list[int] = []
    for layer in problem.graph.layers:
        new = {p.name: p.bytes for p in layer.parameters if p.name not in seen}
        seen |= new.keys()
        out.append(sum(new.values()))
    return np.array(out, dtype=np.float64)


def _least_row_s(table: TimeTable, graph: ModelGraph, batch: int) -> Floats:
    """``[layer]`` least seconds a row, forward and backward together, over all rows from 1 to ``batch``.

    Where weight halves of several micro-batches are done at once, they have more rows than the rest.
    """
    at = np.arange(1, batch + 1, dtype=np.float64)
    return np.array(
        [
            float(np.min(_both_s(table.rows, times, at, most_at_once(layer, 1)) / at))
            for times, layer in zip(table.layers, graph.layers, strict=True)
        ]
    )


def _both_s(xs: tuple[int, ...], times: LayerTimes, at: Floats, together: int) -> Floats:
    """Forward and backward, the latter whole or in halves, whichever takes less.

    Weight halves of several micro-batches of ``at`` rows have at most ``together`` rows at once.
    """
    into_s, weight_s = halves_of(times)
    weight = _seconds(xs, weight_s, at)
    if together > 1:
        weight = np.minimum(weight, at * np.min((weight / at)[:together]))
    backward = np.minimum(_seconds(xs, times.backward_s, at), _seconds(xs, into_s, at) + weight)
    return _seconds(xs, times.forward_s, at) + backward


def _seconds(xs: tuple[int, ...], ys: tuple[float, ...], at: Floats) -> Floats:
    """As ``TimeTable.forward`` at many row counts, as simulated: with its falls, unlike ``tables.py``."""
    x, y = np.array(xs, dtype=np.float64), np.array(ys)
    if len(xs) == 1:
        return y[0] * at / x[0]
    piece = np.minimum(np.maximum(np.searchsorted(x, at), 1), len(xs) - 1)
    slope = (y[piece] - y[piece - 1]) / (x[piece] - x[piece - 1])
    return np.maximum(0.0, y[piece - 1] + slope * (at - x[piece - 1]))
