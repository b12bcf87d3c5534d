"""What must cross the border of a block of devices, and how fast it can at most: for the lower bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from spanwise.core.cluster import Route
from spanwise.core.precision import VALUE_BYTES, reduces
from spanwise.planner.facts.lanes import Group
from spanwise.planner.facts.tables import Floats
from spanwise.planner.problem import Problem

MOST_BLOCKS = 8  # own choice, for time: with more devices or sites no block is one of them alone
MOST_DEVICES = 200  # beyond it no links are looked at: there are too many pairs
MOST_SITES = 5  # whose unions are looked at
CLOSED_S = 1e20  # seconds a byte in place of infinity


@dataclass(frozen=True, slots=True)
class Borders:
    """Blocks of devices and what their borders do.

    Attributes:
        names: ``[block]``, for people.
        groups: ``[block]``, devices by index in file order.
        out_s, in_s: ``[block]`` seconds a byte outwards and inwards; ``CLOSED_S`` where no link leads.
        forth, back: ``[cut]`` bytes that all rows of a batch send over each inner cut of the model, and back.
        raw, labels: bytes of all rows; 0 where any device has the data.
        starts: ``[block]``, least part of the rows that start there, over all micro-batch sizes.
        sum_s: ``[block]`` seconds if the gradients of all parameters came in and went out.
    """

    names: tuple[str, ...]
    groups: tuple[Group, ...]
    out_s: Floats
    in_s: Floats
    forth: Floats
    back: Floats
    raw: float
    labels: float
    starts: Floats
    sum_s: Floats


def partitions(problem: Problem) -> Iterator[tuple[str, tuple[tuple[str, Group], ...]]]:
    """Ways to see the cluster as named blocks: single devices, sites, some sites and the others."""
    devices = problem.cluster.devices
    if not 2 <= len(devices) <= MOST_DEVICES:
        return
    if len(devices) <= MOST_BLOCKS:
        yield "links of devices", tuple((d.id, (i,)) for i, d in enumerate(devices))
    sites = {
        s: tuple(i for i, d in enumerate(devices) if d.site == s) for s in {d.site: None for d in devices}
    }
    if len(sites) < 2:
        return
    if len(sites) <= MOST_BLOCKS:
        yield "links between sites", tuple(sites.items())
    if 2 < len(sites) <= MOST_SITES:
        names = tuple(sites)
        for count in range(1, len(names) // 2 + 1):
            for some in combinations(names, count):
                parts = (some, tuple(n for n in names if n not in some))
                yield (
                    "links between sites",
                    tuple(("+".join(part), tuple(d for name in part for d in sites[name])) for part in parts),
                )


def borders_of(problem: Problem, groups: tuple[tuple[str, Group], ...]) -> Borders:
    """The borders of all blocks of a partition."""
    graph, tables, batch = problem.graph, problem.tables, problem.job.batch
    everybody = range(len(problem.cluster.devices))
    rests = [tuple(d for d in everybody if d not in devices) for _, devices in groups]
    pairs = [(devices, rest) for (_, devices), rest in zip(groups, rests, strict=True)]
    out_s = np.array([_s_per_byte(_most_rate(problem, a, b)) for a, b in pairs])
    in_s = np.array([_s_per_byte(_most_rate(problem, b, a)) for a, b in pairs])
    moves = bool(problem.shares)
    shrink = _most_shrink(problem)
    return Borders(
        names=tuple(name for name, _ in groups),
        groups=tuple(devices for _, devices in groups),
        out_s=out_s,
        in_s=in_s,
        forth=shrink * batch * tables.into[1 : len(graph)],
        back=shrink * batch * tables.back[1 : len(graph)],
        raw=batch * graph.input_row_bytes if moves else 0.0,
        labels=batch * graph.label_row_bytes if moves else 0.0,
        starts=_starts(problem, groups),
        sum_s=graph.parameter_bytes * np.maximum(out_s, in_s),
    )


def _most_shrink(problem: Problem) -> float:
    """The least part of their bytes with which values of this model cross any link of the cluster."""
    specs = [spec for layer in problem.graph.layers for spec in layer.outputs]
    parts = [
        VALUE_BYTES[link.precision] / spec.item_bytes
        for link in problem.cluster.links
        for spec in specs
        if reduces(spec.dtype, spec.item_bytes, link.precision)
    ]
    return min(parts, default=1.0)


def _s_per_byte(bytes_per_s: float) -> float:
    return min(1 / bytes_per_s, CLOSED_S) if bytes_per_s > 0 else CLOSED_S


def _starts(problem: Problem, groups: tuple[tuple[str, Group], ...]) -> Floats:
    """``[block]`` least part of the rows that start there; the parts may add up to less than 1."""
    shares, batch, ids = problem.shares, problem.job.batch, problem.cluster.ids
    least = np.full(len(groups), 1.0 if shares else 0.0)
    for rows in range(max(len(shares), 1), batch + 1):
        if shares and batch % rows == 0:
            held = {r.device: r.rows / rows for r in problem.source_rows(rows)}
            here = [sum(held.get(ids[d], 0.0) for d in devices) for _, devices in groups]
            least = np.minimum(least, here)
    return least


def _most_rate(problem: Problem, senders: Group, receivers: Group) -> float:
    """Bytes per second that can go from some devices to others at most; 0 without a link.

    The capacities of any set of resources of which every route uses one add up to such a limit. A small
    set is found greedily: next comes the resource with least capacity for each route that it adds.
    """
    routes = [problem.links.route(a, b) for a in senders for b in receivers]
    found: list[Route] = [route for route in routes if route is not None]
    left: dict[str, set[int]] = {}
    rates: dict[str, float] = {}
    for index, route in enumerate(found):
        for name, rate in route.resources:
            left.setdefault(name, set()).add(index)
            rates[name] = rate
    total = 0.0
    while left:
        best = min(left, key=lambda name: (rates[name] / len(left[name]), name))
        covered = left.pop(best)
        total += rates[best]
        left = {name: rest for name, on in left.items() if (rest := on - covered)}
    return total
