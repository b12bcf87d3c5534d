"""When single messages arrive that start at different times and share links."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from spanwise.core.cluster import Cluster
from spanwise.simulator.network import Network


@dataclass(frozen=True, slots=True)
class Upload:
    """So many bytes that a device sends at a time."""

    device: str
    at_s: float
    nbytes: int


def arrivals(cluster: Cluster, uploads: Sequence[Upload], to: str) -> tuple[float, ...]:
    """Seconds at which each upload has arrived; links are shared max-min fairly, latency comes last.

    Raises:
        InputError: no link leads from one of the devices to ``to``.
    """
    routes = [cluster.route(upload.device, to) for upload in uploads]
    rates = {name: rate for route in routes for name, rate in route.resources}
    places = {name: index for index, name in enumerate(rates)}
    events: list[tuple[float, int, Callable[[float], None]]] = []
    ends = [0.0] * len(uploads)

    numbers = count()

    def at(when: float, call: Callable[[float], None]) -> None:
        heapq.heappush(events, (when, next(numbers), call))

    network = Network(list(rates.values()), at)
    for index, (upload, route) in enumerate(zip(uploads, routes, strict=True)):
        resources = tuple(places[name] for name, _ in route.resources)

        def finish(now: float, index: int = index) -> None:
            ends[index] = now + routes[index].latency_s

        def start(
            now: float,
            resources: tuple[int, ...] = resources,
            nbytes: int = upload.nbytes,
            finish: Callable[[float], None] = finish,
        ) -> None:
            network.start(now, resources, nbytes, finish)

        at(upload.at_s, start)
    while events:
        now, _, call = heapq.heappop(events)
        call(now)
    return tuple(ends)
