"""Steps over a parameter server, simulated action by action, against the formulas that planners cut by."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from segment_cases import FAMILIES, exchange
from server_cases import exchange_graph, exchange_profile, served, server_plan, star
from spanwise.core.timeline import Timeline
from spanwise.lowering import lower
from spanwise.planner.segments.chain import Chain, Cuts, Exchange, step_ns
from spanwise.planner.segments.duplex import DuplexCuts, duplex_step_ns
from spanwise.planner.segments.duplex_search import duplex
from spanwise.planner.segments.rules import SEGMENT_RULES
from spanwise.simulator import simulate

NS = 1e-9


def without_overhead(r: random.Random, layers: int, family: str) -> Exchange:
    """Messages of a nanosecond a byte both ways: overheads are compute here, not time on a link."""
    found = exchange(r, layers, family)
    sizes = tuple(1 + nanoseconds for nanoseconds in found.pull.message_ns)
    pull, push = (Chain(sizes, chain.compute_ns, 0) for chain in (found.pull, found.push))
    return Exchange(pull, push, sizes)


def simulated(
    own: Exchange, cuts: Cuts, *, devices: int = 2, order: tuple[int, ...] | None = None, steps: int = 2,
    **costs: float,
) -> Timeline:  # fmt: skip
    graph = exchange_graph(own)
    names = [f"d{i}" for i in range(devices)]
    plan = server_plan(graph, dict.fromkeys(names, 1), served(names, cuts, order=order))
    profile = exchange_profile([own] * devices, graph, **costs)
    cluster = star(devices)
    return simulate(lower(plan, graph), plan, graph, profile, cluster, steps=steps)


CASES = [(seed, family) for seed in range(6) for family in FAMILIES]


@pytest.mark.parametrize("rule", SEGMENT_RULES)
def test_pulls_after_pushes_take_what_the_formula_says(rule: str) -> None:
    for seed, family in CASES:
        own = without_overhead(random.Random(seed), 1 + seed, family)
        cuts = SEGMENT_RULES[rule](own)
        found = simulated(own, cuts)
        assert found.step_time_s == pytest.approx(step_ns(own, cuts) * NS, rel=1e-9, abs=1e-12)


def test_pulls_as_aggregated_take_what_the_formula_says() -> None:
    for seed, family in CASES:
        own = without_overhead(random.Random(seed), 1 + seed, family)
        plan = duplex([own]).workers[0]
        for planned in (plan, DuplexCuts(plan.cuts, tuple(range(len(plan.cuts.pull))))):
            found = simulated(own, planned.cuts, order=planned.order)
            assert found.step_time_s == pytest.approx(
                duplex_step_ns([own], [planned]) * NS, rel=1e-9, abs=2 * NS
            )


def test_sums_and_updates_take_the_server_s_time_and_messages_both_processors() -> None:
    """One message each way, so that nothing overlaps: every cost comes on top of the formula."""
    own = Exchange(Chain((400,), (30,), 0), Chain((400,), (70,), 0), (400,))
    cuts = Cuts((1,), (1,))
    plain = simulated(own, cuts).step_time_s
    assert plain == pytest.approx(900 * NS)
    for costs, more in (
        ({"update_s_per_byte": 3 * NS}, 1200),
        ({"sum_s_per_byte": 2 * NS}, 2 * 800),  # the gradients of two devices, in turn
        # The second device is served 50 ns after the first, so its push comes when the first one is taken in:
        # on its round lie one push taken in, one pull sent before its own, and its own taken in.
        ({"message_s": 50 * NS}, 3 * 50),
    ):
        found = simulated(own, cuts, **costs)
        assert found.step_time_s == pytest.approx(plain + more * NS)


def test_only_the_server_keeps_the_state_of_the_optimizer() -> None:
    own = Exchange(Chain((400,), (30,), 0), Chain((400,), (70,), 0), (400,))
    graph = exchange_graph(own)
    plan = server_plan(graph, {"d0": 1, "d1": 1}, served(["d0", "d1"], Cuts((1,), (1,))))
    profile, cluster = exchange_profile([own, own], graph), star(2)
    few, many = (
        {
            use.device: (use.peak_memory_bytes, use.sent_bytes)
            for use in simulate(
                lower(plan, graph), plan, graph, profile, cluster, optimizer_copies=copies
            ).devices
        }
        for copies in (0, 2)
    )
    assert many["d0"] == few["d0"]
    # Parameters, gradients, the copy that is pulled, and the gradients while they are pushed.
    assert few["d0"][0] == 4 * 400
    assert many["s"][0] == few["s"][0] + 2 * 400
    assert [few[device][1] for device in ("d0", "d1", "s")] == [400, 400, 800]


def test_unlike_devices_settle_at_the_greatest_cycle_mean() -> None:
    """Over many steps: which device waits for which changes until the rounds have settled."""
    r = random.Random(0)
    for family in FAMILIES:
        first, second = (without_overhead(r, 5, family) for _ in range(2))
        both = [first, replace(second, pull=Chain(first.layer_bytes, second.pull.compute_ns, 0),
                               push=Chain(first.layer_bytes, second.push.compute_ns, 0),
                               layer_bytes=first.layer_bytes)]  # fmt: skip
        planned = duplex([first]).workers[0]
        graph = exchange_graph(first)
        plan = server_plan(graph, {"d0": 1, "d1": 1}, served(["d0", "d1"], planned.cuts, order=planned.order))
        found = simulate(
            lower(plan, graph), plan, graph, exchange_profile(both, graph), star(2), steps=12, spans=False
        )
        expected = duplex_step_ns(both, [planned, planned]) * NS
        assert expected * (1 - 1e-9) <= found.step_time_s <= 1.05 * expected
