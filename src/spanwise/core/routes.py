"""Routes of a cluster, with the numbers that were measured in place of those of the file."""

from __future__ import annotations

from collections.abc import Iterable

from spanwise.core.cluster import Cluster, Route
from spanwise.core.profile import LinkTimes


class Routes:
    """How messages go between devices.

    Pairs are measured one at a time, so which messages share something is known from the cluster file only. A
    shared capacity carries what the fastest pair measured over it; what the file says counts where it was not
    the narrowest on a way, as then the measurement could not fill it. A measured pair's own rate is one
    capacity more.
    """

    def __init__(self, cluster: Cluster, measured: Iterable[LinkTimes]) -> None:
        self._cluster = cluster
        self._measured = {(link.source, link.target): link for link in measured}
        self._widest: dict[str, float] = {}
        for link in self._measured.values():
            if not self._listed(link.source, link.target):
                continue
            route = cluster.route(link.source, link.target)
            for name, rate in route.resources:
                least = rate if rate > route.bandwidth_bytes_per_s else 0.0
                carried = max(self._widest.get(name, 0.0), least, link.bandwidth_bytes_per_s)
                self._widest[name] = carried

    def route(self, source: str, target: str) -> Route:
        """The way from one device to another; ``InputError`` if no link was listed or measured."""
        link = self._measured.get((source, target))
        if link is None:
            found = self._cluster.route(source, target)
            shared, latency_s = found.resources, found.latency_s
        else:
            listed = self._listed(source, target)
            shared = self._cluster.route(source, target).resources if listed else ()
            latency_s = link.latency_s
        resources = tuple((name, self._widest.get(name, rate)) for name, rate in shared)
        if link is not None:
            resources = ((f"measured:{source}>{target}", link.bandwidth_bytes_per_s), *resources)
        return Route(min((rate for _, rate in resources), default=float("inf")), latency_s, resources)

    def _listed(self, source: str, target: str) -> bool:
        return {source, target} <= set(self._cluster.ids) and self._cluster.connected(source, target)
