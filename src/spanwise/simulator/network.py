"""Flow-level network: messages share capacities max-min fairly; latency comes after transmission."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

Finish = Callable[[float], None]
At = Callable[[float, Finish], None]


def max_min_rates(flows: Sequence[tuple[int, ...]], capacities: Sequence[float]) -> list[float]:
    """Max-min fair rates by progressive filling. Bertsekas and Gallager, Data Networks, 1992, section 6.5.2.

    Args:
        flows: for each flow the indices of the capacities that it uses, at least one.
        capacities: bytes per second.

    Returns:
        Bytes per second of each flow: none can be raised without lowering one that is not faster.
    """
    rates = [0.0] * len(flows)
    left: dict[int, float] = {}
    users: dict[int, list[int]] = {}
    for index, resources in enumerate(flows):
        for resource in resources:
            left[resource] = capacities[resource]
            users.setdefault(resource, []).append(index)
    open_flows = set(range(len(flows)))
    counts = {resource: len(found) for resource, found in users.items()}
    while open_flows:
        tight = min((r for r in counts if counts[r]), key=lambda r: left[r] / counts[r])
        rate = left[tight] / counts[tight]
        for index in users[tight]:
            if index not in open_flows:
                continue
            open_flows.discard(index)
            rates[index] = rate
            for resource in flows[index]:
                left[resource] = max(0.0, left[resource] - rate)
                counts[resource] -= 1
    return rates


@dataclass(slots=True, eq=False)
class Flow:
    """Bytes under way over some capacities."""

    resources: tuple[int, ...]
    left: float
    finish: Finish
    rate: float = 0.0
    since: float = 0.0
    version: int = 0
    open: bool = True


@dataclass(slots=True)
class Network:
    """Active flows. ``at`` schedules a call in virtual time."""

    capacities: list[float]
    at: At
    users: list[dict[Flow, None]] = field(init=False)  # dicts keep their order: same run, same order
    _known: dict[tuple[tuple[int, ...], ...], list[float]] = field(init=False)
    _alone: dict[tuple[int, ...], float] = field(init=False)

    def __post_init__(self) -> None:
        self.users = [{} for _ in self.capacities]
        self._known, self._alone = {}, {}

    def start(self, now: float, resources: tuple[int, ...], nbytes: float, finish: Finish) -> None:
        """Begins to transmit; ``finish(t)`` is called when the last byte has left."""
        if nbytes <= 0 or not resources:
            self.at(now, finish)
            return
        flow = Flow(resources, nbytes, finish, since=now)
        alone = True
        for resource in resources:
            users = self.users[resource]
            alone = alone and not users
            users[flow] = None
        if not alone:
            self._share(now, resources)
            return
        rate = self._alone.get(resources)
        if rate is None:
            rate = self._alone[resources] = min(self.capacities[r] for r in resources)
        self._set_rate(flow, now, rate)

    def _set_rate(self, flow: Flow, now: float, rate: float) -> None:
        flow.left -= flow.rate * (now - flow.since)
        flow.rate, flow.since = rate, now
        flow.version += 1
        end = now + max(flow.left, 0.0) / rate if rate > 0 else float("inf")
        if end < float("inf"):
            self.at(end, partial(self._end, flow, flow.version))

    def _end(self, flow: Flow, version: int, now: float) -> None:
        if not flow.open or flow.version != version:
            return
        flow.open = False
        shared = False
        for resource in flow.resources:
            users = self.users[resource]
            del users[flow]
            shared = shared or bool(users)
        if shared:
            self._share(now, flow.resources)
        flow.finish(now)

    def _share(self, now: float, resources: tuple[int, ...]) -> None:
        """New rates for all flows that these capacities connect."""
        found: dict[Flow, None] = {}
        seen = set(resources)
        front = list(resources)
        while front:
            for flow in self.users[front.pop()]:
                if flow not in found:
                    found[flow] = None
                    for resource in flow.resources:
                        if resource not in seen:
                            seen.add(resource)
                            front.append(resource)
        for flow, rate in zip(found, self._rates(tuple(f.resources for f in found)), strict=True):
            if abs(rate - flow.rate) > 1e-12 * rate:
                self._set_rate(flow, now, rate)

    def _rates(self, flows: tuple[tuple[int, ...], ...]) -> list[float]:
        """Worked out once: micro-batches bring the same few sets of messages again and again."""
        rates = self._known.get(flows)
        if rates is None:
            rates = self._known[flows] = max_min_rates(flows, self.capacities)
        return rates
