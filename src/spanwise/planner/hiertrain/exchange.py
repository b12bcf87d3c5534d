"""What the gradients of prefixes and the update cost HierTrain, behind forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from spanwise.cost.training import ring_edge_bytes, ring_rounds
from spanwise.planner.hiertrain.layout import Instance, Layout, Roles


@dataclass(frozen=True, slots=True)
class ExchangeCost:
    """What the exchange takes whatever the cuts.

    It takes as long as the busiest capacity, and the greatest latency besides.

    Attributes:
        loads: by capacity, seconds a byte of the parameters between every two cuts.
        latencies_s: between every two cuts.
    """

    loads: Mapping[str, Sequence[float]]
    latencies_s: tuple[float, ...]

    def busy_s(self, sizes: Sequence[float]) -> dict[str, float]:
        """Seconds that each capacity is busy; ``sizes`` in bytes between every two cuts."""
        return {
            name: sum(c * s for c, s in zip(load, sizes, strict=True)) for name, load in self.loads.items()
        }


def exchange_cost(instance: Instance, roles: Roles) -> ExchangeCost | None:
    """What the gradients of prefixes cost whatever the cuts; None where a link is missing.

    Segment i lies between cuts i and i + 1, counted from 0; its holders are the workers from i on and the
    finisher, before the first cut only if it starts rows.
    """
    found: dict[str, list[float]] = {}
    latencies = [0.0] * len(roles.workers)
    for i in range(len(roles.workers)):
        held = ((roles.finisher,) if i or roles.starts else ()) + roles.workers[i:]
        if len(held) < 2:
            continue
        server = roles.finisher if roles.finisher in held else held[-1]
        to_server = [(worker, server) for worker in held if worker != server]
        ways = pairwise((*held, held[0])) if instance.exchange == "ring" else to_server
        times = ring_edge_bytes(len(held), 1.0) if instance.exchange == "ring" else 2.0
        rounds = ring_rounds(len(held)) if instance.exchange == "ring" else 2
        for way in ways:
            route = instance.routes.get(way)
            if route is None:
                return None
            for name, rate in route.resources:
                found.setdefault(name, [0.0] * len(roles.workers))[i] += times / rate
            latencies[i] = max(latencies[i], rounds * route.latency_s)
    return ExchangeCost(found, tuple(latencies))


def exchange_s(instance: Instance, layout: Layout) -> float:
    """X; infinite where a link is missing."""
    cost = exchange_cost(instance, layout.roles)
    if cost is None:
        return float("inf")
    sizes = between_cuts(instance, layout)
    busiest = max(cost.busy_s(sizes).values(), default=0.0)
    return busiest + max((t for t, s in zip(cost.latencies_s, sizes, strict=True) if s), default=0.0)


def between_cuts(instance: Instance, layout: Layout) -> list[float]:
    """Bytes of parameters."""
    return [float(instance.parameters[a, b]) for a, b in pairwise((0, *layout.cuts))]


def update_s(instance: Instance, layout: Layout) -> float:
    """U: the longest update of what each machine holds."""
    roles, first = layout.roles, layout.cuts[0] if layout.cuts and not layout.roles.starts else 0
    held = [(roles.finisher, float(instance.parameters[first, instance.layers]))]
    held += [(w, float(instance.parameters[0, m])) for w, m in zip(roles.workers, layout.cuts, strict=True)]
    return max(instance.machines[machine].update_s_per_byte * size for machine, size in held)
