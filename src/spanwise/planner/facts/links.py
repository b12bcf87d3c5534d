"""What moving bytes between groups of devices costs: pieces of rows, shared capacities, rings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, permutations

import numpy as np
from numpy.typing import NDArray

from spanwise.core.cluster import Cluster, Route
from spanwise.core.precision import VALUE_BYTES
from spanwise.core.profile import LinkTimes
from spanwise.core.routes import Routes
from spanwise.cost.training import ring_edge_bytes, ring_rounds
from spanwise.planner.facts.kinds import Kinds, by_kind, link_kinds

Floats = NDArray[np.float64]
NO_LINK_S = 1e30
_FLOAT_BYTES = 4
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


@dataclass
class Links:
    """Routes between pairs of devices, by index in file order, looked up when first asked for.

    Links of a large cluster are given by pairs of sites: to list them by pairs of devices would be millions.

    Attributes:
        kinds: of every device; those of one kind have equal links.
        site_order: of every device, in which order its site is first named.
    """

    kinds: Kinds
    site_order: tuple[int, ...]
    _cluster: Cluster
    _found: Routes
    _ids: tuple[str, ...]
    _routes: dict[tuple[int, int], Route | None] = field(
        default_factory=dict[tuple[int, int], "Route | None"]
    )
    _linked_kinds: dict[tuple[int, int], bool] = field(default_factory=dict[tuple[int, int], bool])
    _linked_ids: dict[tuple[str, str], bool] = field(default_factory=dict[tuple[str, str], bool])
    _lanes: dict[tuple[Shares, Shares, bool], Lane | None] = field(
        default_factory=dict[tuple[Shares, Shares, bool], "Lane | None"]
    )

    @classmethod
    def of(cls, cluster: Cluster, measured: Sequence[LinkTimes] = ()) -> Links:
        """Measured links replace the numbers of the cluster file, but keep what the file says is shared.

        So has the simulator (``simulator/setup.py``).
        """
        sites = {site: i for i, site in enumerate(dict.fromkeys(d.site for d in cluster.devices))}
        return cls(
            kinds=link_kinds(cluster, measured),
            site_order=tuple(sites[device.site] for device in cluster.devices),
            _cluster=cluster,
            _found=Routes(cluster, measured),
            _ids=cluster.ids,
        )

    def __len__(self) -> int:
        return len(self._ids)

    def route(self, source: int, target: int) -> Route | None:
        """The way from one device to another; none where no link leads."""
        key = (source, target)
        if key not in self._routes:
            a, b = self._ids[source], self._ids[target]
            self._routes[key] = self._found.route(a, b) if self._cluster.connected(a, b) else None
        return self._routes[key]

    def connected(self, source: str, target: str) -> bool:
        """Whether some link leads from one device to another, by id; ``InputError`` if one is unknown."""
        key = (source, target)
        if key not in self._linked_ids:
            self._linked_ids[key] = self._cluster.connected(source, target)
        return self._linked_ids[key]

    def joined(self, group: tuple[int, ...], other: tuple[int, ...]) -> bool:
        """Whether every device of one group reaches every device of the other, both ways."""
        return self.reach(group, other) and self.reach(other, group)

    def reach(self, group: tuple[int, ...], other: tuple[int, ...]) -> bool:
        """Whether every device of ``group`` reaches every device of ``other``."""
        ends = {self.kinds[d] for d in other}
        for kind in {self.kinds[d] for d in group}:
            for end in ends:
                if not self._linked(kind, end) and any(
                    a != b and self.kinds[a] == kind and self.kinds[b] == end for a in group for b in other
                ):
                    return False
        return True

    def _linked(self, kind: int, end: int) -> bool:
        """Whether devices of one kind reach others of another; two devices tell for all."""
        if (kind, end) not in self._linked_kinds:
            pair = next(((a, b) for a in self._few[kind] for b in self._few[end] if a != b), None)
            self._linked_kinds[kind, end] = pair is None or self.route(*pair) is not None
        return self._linked_kinds[kind, end]

    @cached_property
    def _few(self) -> dict[int, tuple[int, ...]]:
        """The first two devices of every kind."""
        return {self.kinds[own[0]]: own[:2] for own in by_kind(self.kinds, range(len(self.kinds)))}

    @cached_property
    def reduces(self) -> bool:
        """Whether any link is one of reduced precision."""
        return any(link.precision != "full" for link in self._cluster.links)

    def shrink(self, source: int, target: int) -> float:
        """Bytes that cross a link over those of float32 values."""
        precision = self._cluster.precision(self._ids[source], self._ids[target])
        return VALUE_BYTES[precision] / _FLOAT_BYTES if precision != "full" else 1.0

    def in_order(self, group: tuple[int, ...]) -> tuple[int, ...]:
        """Devices of one site next to each other, so that a ring crosses between sites least often."""
        return tuple(sorted(group, key=lambda d: (self.site_order[d], d)))

    def lane(self, senders: Shares, receivers: Shares, *, cut: bool = False) -> Lane | None:
        """Cost of moving a micro-batch whose rows are held as given; None if a link is missing.

        Rows that stay on their device cost nothing. Messages that share a capacity add up on it, others go
        side by side. Over a ``cut`` go activations or gradients, which links of reduced precision shrink.
        """
        key = (senders, receivers, cut)
        if key not in self._lanes:
            self._lanes[key] = self._lane(senders, receivers, cut)
        return self._lanes[key]

    def _lane(self, senders: Shares, receivers: Shares, cut: bool) -> Lane | None:
        loads: dict[str, float] = {}
        latency = 0.0
        out, into = dict.fromkeys(dict(senders), 0), dict.fromkeys(dict(receivers), 0)
        total = sum(share for _, share in receivers)
        known = self._routes
        for a, b, share in _pieces(senders, receivers):
            if a == b:
                continue
            route = known[a, b] if (a, b) in known else self.route(a, b)
            if route is None:
                return None
            out[a] += 1
            into[b] += 1
            if route.latency_s > latency:
                latency = route.latency_s
            part = share / total * self.shrink(a, b) if cut and self.reduces else share / total
            for name, rate in route.resources:
                loads[name] = loads.get(name, 0.0) + part / rate
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
        edges = [self.route(a, b) for a, b in pairwise((*ring, ring[0]))]
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
        if not held.intersection(start) or len(group) == 1 or len(sources) == 1:  # then no order matters
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
    i = j = 0
    at = end = last = 0.0
    a = b = -1
    while True:
        if end <= at + 1e-9:
            if i == len(senders):
                return out
            a, share = senders[i]
            end, i = end + share, i + 1
        elif last <= at + 1e-9:
            if j == len(receivers):
                return out
            b, share = receivers[j]
            last, j = last + share, j + 1
        else:
            to = end if end < last else last
            out.append((a, b, to - at))
            at = to
