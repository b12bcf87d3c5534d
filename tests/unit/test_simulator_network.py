"""Max-min fair sharing: the definition by brute force, hand cases, and flows over time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest

from spanwise.simulator import max_min_rates
from spanwise.simulator.network import Network


def check_max_min(
    flows: list[tuple[int, ...]], capacities: list[float], rates: list[float], tolerance: float = 1e-9
) -> None:
    """Feasible, and every flow has a saturated resource where no other is faster: the definition."""
    load = [sum(r for flow, r in zip(flows, rates, strict=True) if i in flow) for i in range(len(capacities))]
    for used, capacity in zip(load, capacities, strict=True):
        assert used <= capacity * (1 + tolerance)
    for flow, rate in zip(flows, rates, strict=True):
        assert rate > 0
        assert any(
            load[i] >= capacities[i] * (1 - tolerance)
            and all(r <= rate * (1 + tolerance) for f, r in zip(flows, rates, strict=True) if i in f)
            for i in flow
        )


def test_no_flows() -> None:
    assert max_min_rates([], [1.0]) == []


@pytest.mark.parametrize(
    ("flows", "capacities", "expected"),
    [
        ([(0,)], [8.0], [8.0]),
        ([(0, 1, 2)], [8.0, 3.0, 5.0], [3.0]),
        ([(0,), (0,)], [8.0, 1.0], [4.0, 4.0]),
        # One long flow over both, a short one on each: the narrow resource decides for the long one.
        ([(0, 1), (0,), (1,)], [10.0, 4.0], [2.0, 8.0, 2.0]),
        # Three levels: 1 on resource 2; (7-1)/2 = 3 on resource 0; 20-3 = 17 on resource 1.
        ([(0, 2), (0,), (0, 1), (1,)], [7.0, 20.0, 1.0], [1.0, 3.0, 3.0, 17.0]),
        # A private cap frees capacity for the others: 2, then (12-2)/2.
        ([(0, 1), (0,), (0,)], [12.0, 2.0], [2.0, 5.0, 5.0]),
    ],
)
def test_hand_cases(flows: list[tuple[int, ...]], capacities: list[float], expected: list[float]) -> None:
    rates = max_min_rates(flows, capacities)
    assert rates == pytest.approx(expected)
    check_max_min(flows, capacities, rates)


def test_random_cases_meet_the_definition() -> None:
    r = random.Random(0)
    for _ in range(400):
        count = r.randint(1, 6)
        capacities = [r.choice([1.0, 2.0, 5.0, r.lognormvariate(0, 3)]) for _ in range(count)]
        flows = [tuple(r.sample(range(count), r.randint(1, count))) for _ in range(r.randint(1, 9))]
        check_max_min(flows, capacities, max_min_rates(flows, capacities))


def test_order_of_flows_does_not_matter() -> None:
    r = random.Random(1)
    flows = [tuple(r.sample(range(5), r.randint(1, 3))) for _ in range(8)]
    capacities = [r.uniform(1, 9) for _ in range(5)]
    rates = dict(zip(range(8), max_min_rates(flows, capacities), strict=True))
    order = r.sample(range(8), 8)
    again = max_min_rates([flows[i] for i in order], capacities)
    assert again == pytest.approx([rates[i] for i in order])


def test_the_definition_rejects_equal_shares() -> None:
    """Negative control: feasible but not max-min fair."""
    with pytest.raises(AssertionError):
        check_max_min([(0, 1), (0,), (1,)], [10.0, 4.0], [2.0, 2.0, 2.0])
    with pytest.raises(AssertionError):
        check_max_min([(0,), (0,)], [4.0], [3.0, 3.0])


class Clock:
    """A minimal event loop for the network alone."""

    def __init__(self, capacities: list[float]) -> None:
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.count = 0
        self.ends: dict[str, float] = {}
        self.network = Network(capacities, self.at)

    def at(self, when: float, call: Callable[[float], None]) -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, call))

    def send(self, name: str, start_s: float, resources: tuple[int, ...], nbytes: float) -> None:
        self.at(
            start_s,
            lambda t: self.network.start(t, resources, nbytes, lambda end: self.ends.update({name: end})),
        )

    def run(self) -> dict[str, float]:
        while self.events:
            now, _, call = heapq.heappop(self.events)
            call(now)
        return self.ends


def test_rates_change_when_flows_come_and_go() -> None:
    clock = Clock([10.0])
    clock.send("long", 0.0, (0,), 100.0)
    clock.send("short", 2.0, (0,), 20.0)
    # 20 alone until 2 s, then both at 5/s: short ends at 6 s, long has 60 left and goes on at 10/s.
    assert clock.run() == pytest.approx({"short": 6.0, "long": 12.0})


def test_a_wider_second_hop_does_not_matter() -> None:
    clock = Clock([4.0, 100.0, 6.0])
    clock.send("a", 0.0, (0, 1), 40.0)
    clock.send("b", 0.0, (2, 1), 60.0)
    assert clock.run() == pytest.approx({"a": 10.0, "b": 10.0})


def test_freed_capacity_reaches_flows_two_hops_away() -> None:
    # b shares resource 0 with a and resource 1 with c; when a ends, b rises and c falls.
    clock = Clock([4.0, 6.0])
    clock.send("a", 0.0, (0,), 4.0)
    clock.send("b", 0.0, (0, 1), 100.0)
    clock.send("c", 0.0, (1,), 100.0)
    # Until 2 s: a 2, b 2, c 4. Then b 3, c 3: c has 92 left until 2 + 92/3; b has 96 and then rises to 4.
    c_end = 2 + 92 / 3
    b_left = 96 - 92
    assert clock.run() == pytest.approx({"a": 2.0, "c": c_end, "b": c_end + b_left / 4})


def test_zero_bytes_and_no_resources_take_no_time() -> None:
    clock = Clock([1.0])
    clock.send("empty", 3.0, (0,), 0.0)
    clock.send("same device", 4.0, (), 100.0)
    assert clock.run() == {"empty": 3.0, "same device": 4.0}


def test_bytes_are_conserved() -> None:
    """One bottleneck that is never idle: the last flow ends when all bytes have passed."""
    r = random.Random(2)
    for _ in range(20):
        clock = Clock([7.0])
        sizes = [r.uniform(1, 50) for _ in range(10)]
        for i, size in enumerate(sizes):
            clock.send(str(i), r.uniform(0, sizes[0] / 7) if i else 0.0, (0,), size)
        assert max(clock.run().values()) == pytest.approx(sum(sizes) / 7)
