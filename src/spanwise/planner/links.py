"""What moving bytes between groups of devices costs: pieces of rows, shared capacities, rings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

import numpy as np
from numpy.typing import NDArray

from spanwise.core.cluster import Cluster, Route
from spanwise.core.profile import LinkTimes
from spanwise.core.routes import Routes
from spanwise.cost import ring_edge_bytes, ring_rounds

Floats = NDArray[np.float64]
NO_LINK_S = 1e30
Shares = tuple[tuple[int, float], ...]  # (device, rows or fraction of rows), rows consecutive in this order


@dataclass(frozen=True, slots=True)
class Lane:
    """All messages from one group to the next, as one.

    Attributes:
        s_per_byte: seconds per byte of the whole micro-batch on the busiest capacity on the way.
        latency_s: of the farthest message.
        senders: devices that send anything.
        messages_out, messages_in: most messages that one device of either group sends or receives.
        loads: seconds per byte of the whole micro-batch that each capacity is busy.
    """

    s_per_byte: float = 0.0
    latency_s: float = 0.0
    messages_out: int = 0
    messages_in: int = 0
    loads: tuple[tuple[str, float], ...] = ()
    senders: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Links:
    """Routes between all pairs of devices, by index in file order; ``None`` where no link leads."""

    routes: tuple[tuple[Route | None, ...], ...]
    site_order: tuple[int, ...]

    @classmethod
    def of(cls, cluster: Cluster, measured: Sequence[LinkTimes] = ()) -> Links:
        """Looks every pair up once.

        Measured links replace the numbers of the cluster file, but keep what the file says is shared, as the
        simulator has it (``simulator/setup.py``).
        """
        ids = cluster.ids
        routes = Routes(cluster, measured)
        sites = {site: i for i, site in enumerate(dict.fromkeys(d.site for d in cluster.devices))}

        def route(a: str, b: str) -> Route | None:
            return routes.route(a, b) if cluster.connected(a, b) else None

        return cls(
            tuple(tuple(route(a, b) for b in ids) for a in ids),
            tuple(sites[device.site] for device in cluster.devices),
        )

    def joined(self, group: tuple[int, ...], other: tuple[int, ...]) -> bool:
        """Whether every device of one group reaches every device of the other, both ways."""
        return all(
            self.routes[a][b] is not None and self.routes[b][a] is not None for a in group for b in other
        )

    def reach(self, group: tuple[int, ...], other: tuple[int, ...]) -> bool:
        """Whether every device of ``group`` reaches every device of ``other``."""
        return all(self.routes[a][b] is not None for a in group for b in other)

    def in_order(self, group: tuple[int, ...]) -> tuple[int, ...]:
        """Devices of one site next to each other, so that a ring crosses between sites least often."""
        return tuple(sorted(group, key=lambda d: (self.site_order[d], d)))

    def lane(self, senders: Shares, receivers: Shares) -> Lane | None:
        """Cost of moving a micro-batch whose rows are held as given; None if a link is missing.

        Rows that stay on their device cost nothing. Messages that share a capacity add up on it, others go
        side by side.
        """
        loads: dict[str, float] = {}
        latency = 0.0
        out, into = dict.fromkeys(dict(senders), 0), dict.fromkeys(dict(receivers), 0)
        total = sum(share for _, share in receivers)
        for a, b, share in _pieces(senders, receivers):
            if a == b:
                continue
            route = self.routes[a][b]
            if route is None:
                return None
            out[a] += 1
            into[b] += 1
            latency = max(latency, route.latency_s)
            for name, rate in route.resources:
                loads[name] = loads.get(name, 0.0) + share / total / rate
        return Lane(
            s_per_byte=max(loads.values(), default=0.0),
            latency_s=latency,
            messages_out=max(out.values()),
            messages_in=max(into.values()),
            loads=tuple(loads.items()),
            senders=tuple(device for device, count in out.items() if count),
        )

    def ring(self, ring: tuple[int, ...]) -> tuple[float, float]:
        """(seconds per byte of the buffer, fixed seconds) of an all-reduce; ``NO_LINK_S`` without a link."""
        n = len(ring)
        if n < 2:
            return 0.0, 0.0
        edges = [self.routes[a][b] for a, b in pairwise((*ring, ring[0]))]
        found = [route for route in edges if route is not None]
        if len(found) < len(edges):
            return 0.0, NO_LINK_S
        rate = min(route.bandwidth_bytes_per_s for route in found)
        return ring_edge_bytes(n, 1.0) / rate, ring_rounds(n) * max(route.latency_s for route in found)

    def aligned(self, group: Shares, sources: Shares) -> Shares:
        """The replica order of a first stage that leaves most rows on the data devices that hold them."""
        held = {device for device, _ in sources}
        start = self.in_order(tuple(device for device, _ in group))
        rows = dict(group)
        if not held.intersection(start) or len(group) == 1:
            return tuple((d, rows[d]) for d in start)
        orders = permutations(start) if len(start) <= 6 else _sources_placed(start, [d for d, _ in sources])
        scale = sum(share for _, share in sources) / sum(rows.values())

        def stays(order: tuple[int, ...]) -> float:
            mine = tuple((d, rows[d] * scale) for d in order)
            return sum(share for a, b, share in _pieces(sources, mine) if a == b)

        best = max(orders, key=lambda order: round(stays(order), 6))
        return tuple((d, rows[d]) for d in best)


def _sources_placed(start: tuple[int, ...], sources: list[int]) -> list[tuple[int, ...]]:
    """Orders of a large group to choose from: the data devices in their own order, in front or behind."""
    mine = tuple(d for d in sources if d in start)
    rest = tuple(d for d in start if d not in mine)
    return [start, mine + rest, rest + mine]


def _pieces(senders: Shares, receivers: Shares) -> list[tuple[int, int, float]]:
    """(sender, receiver, rows) wherever the rows of both meet."""
    out: list[tuple[int, int, float]] = []
    begin = 0.0
    for a, share in senders:
        end, first = begin + share, 0.0
        for b, other in receivers:
            last = first + other
            meet = min(end, last) - max(begin, first)
            if meet > 1e-9:
                out.append((a, b, meet))
            first = last
        begin = end
    return out
