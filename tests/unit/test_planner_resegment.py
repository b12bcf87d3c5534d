"""Segments of a run under way: cut anew where its messages show other numbers, and left alone where not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from test_planner_duplex import unlike
from test_planner_servers import on_a_star

from segment_cases import simulated_pull, simulated_push
from spanwise.core.observed import Arrival, Departure, DeviceStep
from spanwise.core.plan import Plan
from spanwise.lowering import lower
from spanwise.planner import Problem, make_plan
from spanwise.planner.adapting.adaptation import Change
from spanwise.planner.adapting.adapter import Adapter
from spanwise.planner.adapting.message_fit import MessageFit
from spanwise.planner.adapting.ratios import Message
from spanwise.planner.adapting.resegment import Resegmenter, over_border, slowest
from spanwise.planner.segments.chain import NS_PER_S, Chain, Cuts, Exchange, step_ns
from spanwise.planner.segments.duplex import DuplexCuts, duplex_step_ns
from spanwise.planner.segments.duplex_search import duplex
from spanwise.planner.segments.rules import SEGMENT_RULES, dynacomm
from spanwise.planner.strategies.parameter_server import (
    Star,
    after_pushes,
    aggregated,
    exchanges,
    plan_of,
    star_of,
)

OVERHEAD_S, RATE = 5.0, 50e6 / 8  # of a link as it really is; the rate is the one believed


def shown(
    problem: Problem, plan: Plan, step: int, overhead_s: float, *, rate: float = RATE, noise: float = 0.0
) -> tuple[DeviceStep, ...]:
    """A step as its devices tell of it: pushes come in the step itself, pulls in the one after."""
    r = random.Random(step)
    sent: dict[str, list[Departure]] = {d: [] for d in plan.devices}
    came: dict[str, list[Arrival]] = {d: [] for d in plan.devices}
    for device, actions in lower(plan, problem.graph).devices.items():
        free_s: dict[str, float] = {}
        for action in actions:
            if action.kind != "send" or action.payload not in ("push", "pull"):
                continue
            at_s = free_s.get(action.peer, float(step))
            seconds = (overhead_s + action.nbytes / rate) * max(0.2, r.gauss(1.0, noise))
            free_s[action.peer] = at_s + seconds
            latency_s = problem.cluster.route(device, action.peer).latency_s
            tag = 1000 * step + action.transfer
            arrival = Arrival(device, tag, at_s + seconds + latency_s, True)
            sent[device].append(Departure(action.peer, tag, action.nbytes, at_s))
            came[action.peer].append(arrival)
    return tuple(DeviceStep(d, (), tuple(sent[d]), tuple(came[d])) for d in plan.devices)


def crossing(steps: list[tuple[DeviceStep, ...]], server: str) -> list[tuple[DeviceStep, ...]]:
    """Steps in which what a server sent comes a step later, as in a run."""
    out: list[tuple[DeviceStep, ...]] = []
    for number, seen in enumerate(steps):
        late = {s.device: s.received for s in (steps[number - 1] if number else ())}
        out.append(
            tuple(s if s.device == server else replace(s, received=late.get(s.device, ())) for s in seen)
        )
    return out


def as_it_is(problem: Problem, plan: Plan, overhead_s: float, rate: float = RATE) -> Exchange:
    """What a worker exchanges where messages take this."""
    star = Star(plan.servers[0].server, plan.stages[0].replicas)
    own = exchanges(problem, star, by_latency=False)[0]
    pull, push = (
        Chain(
            tuple(round(n / rate * 1e9) for n in own.layer_bytes), chain.compute_ns, round(overhead_s * 1e9)
        )
        for chain in (own.pull, own.push)
    )
    return Exchange(pull, push, own.layer_bytes)


def cuts_of(plan: Plan) -> Cuts:
    return Cuts(plan.servers[0].pulls, plan.servers[0].pushes)


def test_a_fit_that_moves_gives_the_segments_that_are_best_for_it() -> None:
    problem = on_a_star(3, mbit=50)
    plan = make_plan(problem, "dynacomm")
    follower = Resegmenter.of(problem, plan)
    assert follower is not None
    for seen in crossing([shown(problem, plan, step, OVERHEAD_S) for step in range(4)], "s"):
        follower.add(1.0, seen)
    assert len(follower.fits) == 6  # three devices, each way
    for fit in follower.fits.values():
        assert fit.trusted
        assert fit.overhead_s == pytest.approx(OVERHEAD_S, rel=1e-6)
        assert fit.bytes_per_s == pytest.approx(RATE, rel=1e-4)
    found = follower.cut_anew()
    assert found is not None
    truth = as_it_is(problem, plan, OVERHEAD_S)
    best = step_ns(truth, dynacomm(truth))
    assert step_ns(truth, cuts_of(found.plan)) == pytest.approx(best, rel=1e-6)
    assert cuts_of(found.plan) == Cuts((12,), (12,))  # nothing is worth a second message of 5 s
    assert found.gain_s == pytest.approx((step_ns(truth, cuts_of(plan)) - best) / 1e9, rel=1e-4)
    assert found.gain_s > 1
    assert "s>d0 shows 5000.00 ms and 6.25 MB/s a message" in found.reason
    assert follower.cut_anew() is None  # it has moved once
    after = follower.under(found.plan)
    assert after is not None
    assert after.fits == follower.fits


def by_hand(believed: Exchange, down: MessageFit, up: MessageFit) -> Exchange:
    """A worker's exchange with fitted messages, number by number."""
    pull, push = (
        Chain(
            tuple(round(n / fit.bytes_per_s * NS_PER_S) for n in believed.layer_bytes),
            chain.compute_ns,
            round(fit.overhead_s * NS_PER_S),
        )
        for chain, fit in ((believed.pull, down), (believed.push, up))
    )
    return Exchange(pull, push, believed.layer_bytes)


@pytest.mark.parametrize("strategy", ["dynacomm", "mg_wfbp"])
def test_the_best_of_what_the_rule_makes_of_each_worker_is_taken(strategy: str) -> None:
    """Four devices whose links are all other than believed, against segments played through one by one."""
    problem, rule, changed = on_a_star(4, mbit=50, message_s=1e-3), SEGMENT_RULES[strategy], 0
    star = star_of(problem)
    believed = exchanges(problem, star, by_latency=False)
    plan = plan_of(problem, strategy, star, after_pushes(rule(believed[0])))
    for seed in range(12):
        r, follower = random.Random(seed), Resegmenter.of(problem, plan)
        assert follower is not None
        for seen in follower._links.values():
            overhead_s, rate = r.choice((1e-3, 0.05, 0.4)) * r.uniform(1, 2), RATE * 2 ** r.uniform(-2, 2)
            seen.add_sizes([Message(n, overhead_s + n / rate) for n in (10_000, 10**5, 10**6, 3 * 10**6)])
        fits, found = follower.fits, follower.cut_anew()
        workers = [
            by_hand(own, fits["s", replica.device], fits[replica.device, "s"])
            for own, replica in zip(believed, star.replicas, strict=True)
        ]

        def ends_ns(cuts: Cuts, workers: list[Exchange] = workers) -> int:
            return max(simulated_pull(w.pull, cuts.pull) + simulated_push(w.push, cuts.push) for w in workers)

        best = min(
            (cuts_of(plan), *map(rule, workers)), key=lambda c: (ends_ns(c), len(c.pull) + len(c.push))
        )
        assert (cuts_of(plan) if found is None else cuts_of(found.plan)) == best
        if found is not None:
            assert found.gain_s == (ends_ns(cuts_of(plan)) - ends_ns(best)) / NS_PER_S
            changed += 1
    assert changed > 5


def test_a_fit_that_stays_leaves_the_plan_alone() -> None:
    """With noise of 5 %, over forty steps: no link moves, so nothing is cut."""
    problem = on_a_star(3, mbit=50)
    plan = make_plan(problem, "dynacomm")
    follower = Resegmenter.of(problem, plan)
    assert follower is not None
    for seen in crossing([shown(problem, plan, s, 0.0, noise=0.05) for s in range(40)], "s"):
        follower.add(1.0, seen)
        assert follower.cut_anew() is None


def test_messages_of_one_size_ask_for_small_ones() -> None:
    problem = on_a_star(2, mbit=50, message_s=0.5)
    plan = make_plan(problem, "dynacomm")
    assert len(plan.servers[0].pushes) == 1  # as an overhead of 1 s is believed
    follower = Resegmenter.of(problem, plan)
    assert follower is not None
    for seen in crossing([shown(problem, plan, step, 0.001) for step in range(6)], "s"):
        follower.add(1.0, seen)
    assert not any(fit.trusted for fit in follower.fits.values())
    asked = [look for now in range(10) for look in follower.look(now / 10)]
    assert {look.link for look in asked} == follower.fits.keys()
    assert follower.look(1.0) == ()
    for look in asked:
        there_and_back = 2 * (problem.cluster.route(*look.link).latency_s + 0.001 + look.sizes[0] / RATE)
        follower.looked(look.link, [(nbytes, there_and_back) for nbytes in look.sizes])
    assert all(fit.trusted for fit in follower.fits.values())
    assert all(fit.overhead_s == pytest.approx(0.001, rel=0.1) for fit in follower.fits.values())
    found = follower.cut_anew()
    assert found is not None
    truth = as_it_is(problem, plan, 0.001)
    assert step_ns(truth, cuts_of(found.plan)) == pytest.approx(step_ns(truth, dynacomm(truth)), rel=1e-3)


@pytest.mark.parametrize("strategy", ["dynacomm", "duplex"])
def test_an_adapter_changes_segments_and_nothing_else_and_once(strategy: str) -> None:
    problem = on_a_star(3, mbit=50)
    adapter = Adapter(problem, make_plan(problem, strategy), last_step=1000, strategy=strategy)
    first, changes = adapter.plan, list[Change]()
    before: tuple[DeviceStep, ...] = ()
    for step in range(30):
        seen = shown(problem, adapter.plan, step, OVERHEAD_S)
        mixed = crossing([before, seen], "s")[1]
        wanted = adapter.observe(step, 20.0 - 2.0 * len(changes), mixed, float(step))
        before = seen
        if isinstance(wanted, Change):
            changes.append(wanted)
            adapter.changed(wanted, step + 1, 0, 0.05)
            before = ()
    assert [change.kind for change in changes] == ["segments"]
    assert {s.replicas for s in adapter.plan.stages} == {s.replicas for s in first.stages}
    assert adapter.plan.servers != first.servers
    assert adapter.records[0].realised_gain == pytest.approx(0.1)


def duplex_ns(workers: Sequence[Exchange], plan: Plan) -> int:
    sync = plan.servers[0]
    return duplex_step_ns(workers, [DuplexCuts(cuts_of(plan), sync.order)] * len(workers))


def test_duplex_has_fewer_segments_where_messages_cost_twice_what_was_believed() -> None:
    problem = on_a_star(3, mbit=50, message_s=0.02)
    star = star_of(problem)
    planned = duplex(exchanges(problem, star, by_latency=False)).workers[0]
    plan = plan_of(problem, "duplex", star, aggregated(planned))
    follower = Resegmenter.of(problem, plan)
    assert follower is not None
    believed_s = 0.04  # of both ends
    for seen in crossing([shown(problem, plan, step, 2 * believed_s) for step in range(6)], "s"):
        follower.add(1.0, seen)
    found = follower.cut_anew()
    assert found is not None
    truth, old, new = as_it_is(problem, plan, 2 * believed_s), cuts_of(plan), cuts_of(found.plan)
    assert len(new.pull) + len(new.push) < len(old.pull) + len(old.push)
    assert found.plan.servers[0].as_aggregated
    before, after = duplex_ns([truth], plan), duplex_ns([truth], found.plan)
    assert after < before
    assert found.gain_s == pytest.approx((before - after) / NS_PER_S, rel=1e-3)
    assert after <= 1.02 * duplex([truth]).step_ns


def test_duplex_with_a_clipped_norm_is_cut_as_dynacomm_is() -> None:
    problem = on_a_star(3, mbit=50, clip_norm=1.0)
    star = star_of(problem)
    cuts = dynacomm(exchanges(problem, star, by_latency=False)[0])
    plan = plan_of(problem, "duplex", star, after_pushes(cuts))
    follower = Resegmenter.of(problem, plan)
    assert follower is not None
    for seen in crossing([shown(problem, plan, step, OVERHEAD_S) for step in range(4)], "s"):
        follower.add(1.0, seen)
    found = follower.cut_anew()
    assert found is not None
    assert cuts_of(found.plan) == Cuts((12,), (12,))
    assert not found.plan.servers[0].as_aggregated


def test_no_step_is_longer_than_that_of_a_worker_as_slow_as_the_slowest_in_everything() -> None:
    for number in range(60):
        r, workers = random.Random(number), unlike(3, number)
        layers = workers[0].pull.layers
        pull, push = ((*sorted(r.sample(range(1, layers), r.randrange(layers))), layers) for _ in range(2))
        planned = DuplexCuts(Cuts(pull, push), tuple(r.sample(range(len(pull)), len(pull))))
        assert duplex_step_ns(workers, [planned] * 3) <= duplex_step_ns([slowest(workers)], [planned])
        assert slowest(workers[:1]) is workers[0]


def test_only_plans_over_one_server_are_followed() -> None:
    problem = on_a_star(2, mbit=5)
    assert Resegmenter.of(problem, make_plan(problem, "weighted_data_parallel")) is None
    for strategy in ("sequential", "ibatch", "dynacomm", "duplex"):
        assert Resegmenter.of(problem, make_plan(problem, strategy)) is not None


def test_what_crosses_a_step_is_held_against_its_arrival() -> None:
    sent = DeviceStep("s", (), (Departure("d", 7, 9000, 1.0), Departure("d", 8, 9000, 1.0)))
    came = DeviceStep("d", (), (), (Arrival("s", 7, 2.0, True),))
    merged = over_border([sent], [DeviceStep("s"), came])
    assert [d.tag for seen in merged for d in seen.sent] == [7]
    assert over_border([], [sent, DeviceStep("d")])[0].sent == ()
