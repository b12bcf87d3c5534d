"""What must cross the border of a block of devices, and how fast it can at most: for the lower bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from spanwise.core.cluster import Route
from spanwise.planner.lanes import Group
from spanwise.planner.problem import Problem

MOST_SINGLES = 16  # devices; beyond it, for time, no block of one device is looked at
MOST_DEVICES = 200  # beyond it no links are looked at: there are too many pairs
MOST_SITES = 5  # whose unions are looked at


@dataclass(frozen=True, slots=True)
class Block:
    """Devices, and what their border does. Seconds are infinite where no link leads.

    Attributes:
        name: for people.
        devices: by index in file order.
        row_s: seconds, in and out capacity together, if all rows crossed once each way where it costs least.
        raw_in_s, raw_out_s: if the raw data of all rows came in, went out; 0 if any device has the data.
        sum_s: if the gradients of all parameters came in and went out.
        least_here, most_here: part of the rows that start here, over all micro-batch sizes.
    """

    name: str
    devices: Group
    row_s: float
    raw_in_s: float
    raw_out_s: float
    sum_s: float
    least_here: float
    most_here: float

    def freed(self) -> Block:
        """The same with a border that costs nothing."""
        return replace(self, row_s=0.0, raw_in_s=0.0, raw_out_s=0.0, sum_s=0.0)


def partitions(problem: Problem) -> Iterator[tuple[str, tuple[tuple[str, Group], ...]]]:
    """Ways to see the cluster as named blocks: single devices, sites, some sites and the others."""
    devices = problem.cluster.devices
    if not 2 <= len(devices) <= MOST_DEVICES:
        return
    if len(devices) <= MOST_SINGLES:
        yield "links of devices", tuple((d.id, (i,)) for i, d in enumerate(devices))
    sites = {
        s: tuple(i for i, d in enumerate(devices) if d.site == s) for s in {d.site: None for d in devices}
    }
    if len(sites) < 2:
        return
    yield "links between sites", tuple(sites.items())
    if 2 < len(sites) <= MOST_SITES:
        names = tuple(sites)
        for count in range(1, len(names) // 2 + 1):
            for some in combinations(names, count):
                parts = (some, tuple(n for n in names if n not in some))
                yield (
                    "links between sites",
                    tuple(("+".join(p), sum((sites[n] for n in p), ())) for p in parts),
                )


def blocks_of(problem: Problem, groups: tuple[tuple[str, Group], ...]) -> list[Block]:
    """The blocks of a partition with their borders."""
    graph, tables, batch = problem.graph, problem.tables, problem.job.batch
    crossing = min(
        (float(tables.into[i] + tables.back[i]) for i in range(1, len(graph))), default=float("inf")
    )
    raw = batch * graph.input_row_bytes if problem.shares else 0
    out: list[Block] = []
    for name, devices in groups:
        rest = tuple(d for d in range(len(problem.cluster.devices)) if d not in devices)
        c_out, c_in = _most_rate(problem, devices, rest), _most_rate(problem, rest, devices)
        least, most = _rows_here(problem, devices)
        out.append(
            Block(
                name=name,
                devices=devices,
                row_s=_seconds(batch * crossing, c_in + c_out),
                raw_in_s=_seconds(raw, c_in),
                raw_out_s=_seconds(raw, c_out),
                sum_s=_seconds(graph.parameter_bytes, min(c_in, c_out)),
                least_here=least,
                most_here=most,
            )
        )
    return out


def _seconds(nbytes: float, bytes_per_s: float) -> float:
    if nbytes <= 0:
        return 0.0
    return nbytes / bytes_per_s if bytes_per_s > 0 else float("inf")


def _rows_here(problem: Problem, devices: Group) -> tuple[float, float]:
    """Least and most part of the rows that start in a block, as whole rows of every micro-batch size."""
    shares, batch = problem.shares, problem.job.batch
    if not shares:
        return 0.0, 1.0
    ids = {problem.cluster.ids[d] for d in devices}
    parts = [
        sum(r.rows for r in problem.source_rows(rows) if r.device in ids) / rows
        for rows in range(len(shares), batch + 1)
        if batch % rows == 0
    ]
    return min(parts, default=0.0), max(parts, default=1.0)


def _most_rate(problem: Problem, senders: Group, receivers: Group) -> float:
    """Bytes per second that can go from some devices to others at most; 0 without a link.

    The capacities of any set of resources of which every route uses one add up to such a limit. A small
    set is found greedily: next comes the resource with least capacity for each route that it adds.
    """
    routes = [problem.links.routes[a][b] for a in senders for b in receivers]
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
