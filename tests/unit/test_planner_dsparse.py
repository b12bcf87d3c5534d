"""What each device trains under its own memory, and how values are passed on."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise, product

import pytest

from planner_cases import make_job, make_profile
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile, StageTimes
from spanwise.core.trained import parse_unit
from spanwise.cost.sparse import chain_pieces, chain_s
from spanwise.cost.training import optimizer_copies, ring_edge_bytes
from spanwise.lowering import lower, units_of
from spanwise.planner import SPARSE_STRATEGIES, STRATEGIES, Problem, check_plan, make_plan
from spanwise.planner.dsparse.options import Selectable
from spanwise.planner.dsparse.select import (
    Choice,
    in_order,
    last_k,
    parameter_bytes,
    select,
    shifts_only,
    within_bytes,
)
from spanwise.planner.dsparse.strategy import Sparsity, sparse_plan
from spanwise.reporting.text import describe_plan
from spanwise.simulator import simulate
from sparse_cases import conv_chain, scores, unequal


def model(parts: int, seed: int, *, stored: bool = True) -> Selectable:
    graph = conv_chain(parts, seed)
    return Selectable(graph, scores(graph, seed, stored=stored), 1 + seed % 4, seed % 3, stored, (0.5, 1.0))


def every_choice(found: Selectable) -> list[tuple[int, float, Choice]]:
    """Bytes, gain and choice of all there are, by the formula that hooks confirm."""
    numbers = product(*(range(len(part.options)) for part in found.parts))
    return [(found.peak_bytes(found.trains(n)), found.gain(n), n) for n in numbers]


@pytest.mark.parametrize("stored", [True, False])
def test_the_program_finds_what_exhaustive_search_finds(stored: bool) -> None:
    """Up to 12 units; at every budget, never above it, and a byte less never gains more."""
    for seed in range(16):
        found = model(3 + (seed % 8 == 0) * 3 + seed % 2, seed, stored=stored)
        every = every_choice(found)
        r = random.Random(seed)
        least, most = min(b for b, _, _ in every), max(b for b, _, _ in every)
        before = float("-inf")
        for budget in sorted({least, most, *(r.randint(least, most) for _ in range(6))}):
            expected = max(gain for nbytes, gain, _ in every if nbytes <= budget)
            choice = select(found, budget, grain=1)
            assert found.gain(choice) == pytest.approx(expected, abs=1e-9), (seed, budget)
            assert found.peak_bytes(found.trains(choice)) <= budget
            assert (
                found.gain(select(found, budget - 1, grain=1)) <= found.gain(choice)
                if budget > least
                else True
            )
            coarse = select(found, budget, grain=256)
            assert found.peak_bytes(found.trains(coarse)) <= budget
            assert found.gain(choice) >= before
            before = found.gain(choice)


def test_a_limit_on_what_travels_is_kept() -> None:
    found = model(6, 3)
    budget = found.peak_bytes(found.trains([len(p.options) - 1 for p in found.parts]))
    whole = parameter_bytes(found, select(found, budget, grain=1))
    for share in (0.2, 0.5, 0.9):
        choice = within_bytes(found, budget, round(share * whole), grain=1)
        assert parameter_bytes(found, choice) <= share * whole
        assert found.gain(choice) > 0


def test_baselines_are_what_they_say() -> None:
    found = model(6, 2)
    budget = (
        found.constant_bytes + found.peak_bytes(found.trains([len(p.options) - 1 for p in found.parts]))
    ) // 2
    best = found.gain(select(found, budget, grain=1))
    last = last_k(found, budget)
    assert list(last) == sorted(last, key=bool), "the last ones only"
    shifts = shifts_only(found, budget)
    assert all(name.startswith("b") for name in found.trains(shifts))
    order = list(range(6))
    for choice in (last, shifts, in_order(found, budget, order)):
        assert found.peak_bytes(found.trains(choice)) <= budget
        assert any(choice)
        assert found.gain(choice) <= best + 1e-9


SHARES = (0.9, 0.6, 0.4, 0.2)  # of the way from what nothing needs to what everything does


def problem(
    seed: int = 1, shares: tuple[float, ...] = SHARES, *, stored: bool = True, scratch: bool = False,
    **options: object,
) -> Problem:  # fmt: skip
    graph = conv_chain(6, seed, width=24)
    importance = scores(graph, seed, stored=stored).model_copy(update={"from_scratch": scratch})
    job = make_job(4 * len(shares), **options)
    whole = Selectable(graph, importance, 4, optimizer_copies(job.optimizer), stored)
    least, most = (
        whole.peak_bytes(whole.trains([n * (len(p.options) - 1) for p in whole.parts])) for n in (0, 1)
    )
    # Several sums at once may take more than layers do; devices have room for their buffers.
    floor = max(least, 4 * graph.parameter_bytes)
    budgets = {f"d{i}": max(100, round(floor + s * (most - least))) for i, s in enumerate(shares)}
    cluster = unequal(budgets)
    return Problem(graph, make_profile(graph, cluster), cluster, job, importance)


def test_plans_are_nested_and_within_every_budget() -> None:
    for seed in range(6):
        found = problem(seed)
        plan = make_plan(found, "dsparse")
        check_plan(found, plan)
        assert Plan.from_json(plan.to_json()) == plan
        trained = [dict(r.trained or {}) for r in plan.stages[0].replicas]
        for more, less in pairwise(trained):
            for name, count in less.items():
                assert name in more
                assert more[name] is None or (count is not None and count <= more[name])
        assert len({u.trainers for u in units_of(plan, found.graph)}) <= len(SHARES) + 1
        text = describe_plan(plan, found.graph)
        assert "d0 x 4 (trains " in text
        assert text.count("\n") >= 1 + len(plan.groups)
        for use in simulated(found, plan).devices:
            assert use.peak_memory_bytes <= found.cluster.device(use.device).memory_bytes, use.device


def simulated(found: Problem, plan: Plan):
    return simulate(
        lower(plan, found.graph), plan, found.graph, found.profile, found.cluster,
        optimizer_copies=found.copies,
    )  # fmt: skip


def test_it_stands_beside_the_strategies_that_train_everything() -> None:
    assert not SPARSE_STRATEGIES.keys() & STRATEGIES.keys()
    for name in SPARSE_STRATEGIES:
        plan = make_plan(problem(), name)
        assert (plan.strategy, plan.batch, plan.stored_statistics) == (name, 16, True)


def test_a_budget_below_what_nothing_needs_says_by_how_many_bytes() -> None:
    with pytest.raises(InfeasibleError, match=r"d3: .*trains nothing needs .*\(\d+ bytes\) short"):
        make_plan(problem(shares=(*SHARES[:3], -2.0)), "dsparse")
    bare = Problem(*(getattr(problem(), n) for n in ("graph", "profile", "cluster", "job")))
    with pytest.raises(InfeasibleError, match="not known which parameters"):
        make_plan(bare, "dsparse")


def test_from_scratch_layers_that_nobody_trains_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="nobody trains"):
        plan = make_plan(problem(shares=(0.1, 0.1), stored=False, scratch=True), "dsparse")
    assert plan.stored_statistics is None


def test_the_job_limits_what_is_trained_anywhere() -> None:
    for share in (0.2, 0.6):
        found = problem(trained_share=share)
        plan = make_plan(found, "dsparse")
        trained = sum(u.nbytes for u in units_of(plan, found.graph) if u.trainers)
        assert 0 < trained <= share * found.graph.parameter_bytes
    free = make_plan(problem(), "dsparse")
    assert sum(u.nbytes for u in units_of(free, found.graph) if u.trainers) > trained


def test_of_a_trained_model_layers_may_stay_as_they_are() -> None:
    for stored in (True, False):  # warnings are errors
        plan = make_plan(problem(shares=(0.1, 0.1), stored=stored), "dsparse")
        assert plan.stored_statistics == (stored or None)


def test_each_group_goes_the_way_that_its_links_make_cheapest() -> None:
    """On equal links one trainer sends on, several average over all; what is not linear is summed."""
    found = problem(shares=(0.9, 0.6, 0.5, 0.3, 0.2))
    plan = make_plan(found, "dsparse")
    assert {len(g.trainers) for g in plan.groups} > {1}
    adam = make_plan(problem(optimizer={"name": "Adam", "lr": 0.01}), "dsparse")
    assert {g.way for g in adam.groups} == {"grouped"}
    seconds = {}
    for ways in (("grouped",), ("masked", "grouped")):
        seconds[ways] = simulated(found, sparse_plan(found, "x", Sparsity(ways=ways))).step_time_s
    assert simulated(found, plan).step_time_s <= min(seconds.values()) + 1e-12


def test_bytes_and_seconds_are_those_of_the_formulas() -> None:
    found = problem()
    grouped = sparse_plan(found, "x", Sparsity(ways=("grouped",)))
    masked = grouped.model_copy(
        update={"syncs": tuple(s.model_copy(update={"way": "masked"}) for s in grouped.groups)}
    )
    sizes = {u.text: u.nbytes for u in units_of(grouped, found.graph)}
    for plan in (grouped, masked):
        program, expected = lower(plan, found.graph), dict.fromkeys(found.cluster.ids, 0.0)
        for sync, segments in zip(plan.groups, program.buckets, strict=True):
            nbytes = sum(sizes[name] for names in segments for name in names)
            members = sync.devices if sync.way == "masked" else sync.trainers
            for device in members:
                expected[device] += ring_edge_bytes(len(members), nbytes)
            if sync.way == "grouped" and sync.receivers:
                for device in (sync.trainers[0], *sync.receivers)[:-1]:
                    expected[device] += nbytes
        for use in simulated(found, plan).devices:
            assert use.sent_bytes == pytest.approx(expected[use.device], abs=1)
    assert chain_pieces(1) == 1
    assert chain_s(2, 10**6, 1e6, 0.01) == pytest.approx(1.01)


def test_a_postponed_refresh_is_paid_for_once_a_period() -> None:
    found = problem()
    often = sparse_plan(found, "x", Sparsity(ways=("grouped",)))
    seldom = sparse_plan(found, "x", Sparsity(ways=("grouped",), refresh_every=4))
    a, b = simulated(found, often), simulated(found, seldom)
    assert b.step_time_s < a.step_time_s
    assert sum(d.sent_bytes for d in b.devices) < sum(d.sent_bytes for d in a.devices)
    assert {parse_unit(u)[0] for names in lower(seldom, found.graph).trained.values() for u in names}


def test_a_step_takes_what_devices_timed_of_its_own_plan() -> None:
    """By each device's factor; times of another plan count for nothing."""
    found = problem()
    plan = make_plan(found, "dsparse")
    factors = {d.device: d.factor for d in found.profile.devices}

    def busy_s(digest: str, more: float) -> dict[str, float]:
        stages = tuple(
            StageTimes(plan=digest, device=d, stage=0, forward_s=1.0 + more, backward_s=2.0 + 2 * more)
            for d in plan.devices
        )
        timed = found.profile.model_copy(update={"stages": stages})
        uses = simulated(replace(found, profile=Profile.from_json(timed.to_json())), plan).devices
        return {use.device: use.busy_s for use in uses}

    without = {use.device: use.busy_s for use in simulated(found, plan).devices}
    short, long = busy_s(plan.digest, 0.0), busy_s(plan.digest, 0.5)
    for device, seconds in short.items():
        assert long[device] - seconds == pytest.approx(1.5 * factors[device])
        assert seconds > 3 * factors[device]
    assert busy_s("another", 0.0) == without
