"""Layers run again in backward exactly where memory asks for it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from planner_cases import make_graph, make_job, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.cost.training import again_s, stage_bytes
from spanwise.lowering import lower
from spanwise.planner import STRATEGIES, Problem, compare, make_plan
from spanwise.planner.facts.ways import equal_parts, ways
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans import build, finish
from spanwise.planner.plans.build import fitted
from spanwise.planner.plans.feasible import memory_bytes, shortage
from spanwise.planner.plans.price import price
from spanwise.planner.plans.trial import timeline
from spanwise.simulator import simulate

GRAPH = make_graph(9, 0, activation=200_000)


def problem(memory: str, devices: int = 1, *, bandwidth: str = "1 Gbit/s", batch: int = 4) -> Problem:
    cluster = Cluster.parse(
        {"devices": [{"id": f"d{i}", "memory": memory} for i in range(devices)], "data": ["d0"],
         "links": [{"between": ["site", "site"], "bandwidth": bandwidth, "latency": "1 ms"}]}
    )  # fmt: skip
    return Problem(GRAPH, make_profile(GRAPH, cluster), cluster, make_job(batch))


def needs(found: Problem, plan: Plan) -> int:
    return max(memory_bytes(found, plan.stages, plan.schedule, plan.micro_batches).values())


def least_bytes(found: Problem, *, recompute: bool) -> int:
    """Of one device at one row a micro-batch."""

    def bytes_of(ranges: tuple[tuple[int, int], ...]) -> int:
        return stage_bytes(GRAPH, 0, 9, rows=1, in_flight=1, recompute=ranges, copies=0, synced=False)

    return min(bytes_of(w.ranges) for w in ways(GRAPH, 0, 9, 1)) if recompute else bytes_of(())


def test_a_budget_that_only_running_again_satisfies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits as it is; one byte less runs as little as it can again; at the least all parts; then nothing."""
    loose = problem("1 GiB")
    enough, least = least_bytes(loose, recompute=False), least_bytes(loose, recompute=True)
    assert least < 0.75 * enough
    outline = Outline(4, (Span(0, 9, (0,)),))
    assert build.build(problem(f"{enough} B"), "x", outline).stages[0].recompute == ()
    work = 0.0
    for budget in (enough - 1, (enough + least) // 2, least):
        tight = problem(f"{budget} B")
        plan = make_plan(tight, "single")
        assert plan == make_plan(tight, "auto").model_copy(update={"strategy": "single"})
        assert plan.stages[0].recompute
        assert needs(tight, plan) <= budget
        assert timeline(tight, plan).device("d0").peak_memory_bytes <= budget
        again = again_s(tight.profile, plan.stages[0], "d0", 1)
        assert again > work
        work = again
    with pytest.raises(
        InfeasibleError, match=r"4 micro-batches in flight and \d parts run again .* 1 B short"
    ):
        make_plan(problem(f"{least - 1} B"), "single")
    monkeypatch.setattr(build, "eased", lambda *_, **__: None)
    with pytest.raises(InfeasibleError, match=r"micro-batches in flight, its budget .* 1 B short"):
        make_plan(problem(f"{enough - 1} B"), "single")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_where_memory_does_not_bind_nobody_asks(strategy: str) -> None:
    """Negative control: no way to run layers again is even worked out."""
    found = problem("1 GiB", 3)
    plan = make_plan(found, strategy)
    assert not found.memo.ways
    assert not any(stage.recompute for stage in plan.stages)


def test_every_replica_of_a_stage_fits() -> None:
    found = problem("1 GiB", 2)
    outline = Outline(1, (Span(0, 9, (0, 1), (1, 3)),))
    whole = build.build(found, "x", outline)
    budgets = memory_bytes(found, whole.stages, "1f1b", 1)
    tight = problem(f"{(budgets['d0'] + budgets['d1']) // 2} B", 2)
    plan = build.build(tight, "x", outline)
    assert plan.stages[0].recompute
    after = memory_bytes(tight, plan.stages, "1f1b", 1)
    assert all(after[d] <= budgets[d] for d in budgets)
    assert shortage(tight, plan.stages, "1f1b", 1) is None


def test_running_again_keeps_more_forwards_ahead_where_that_is_faster() -> None:
    """With one micro-batch ahead stages wait for each other. Where memory allows all, nothing changes."""
    outline = Outline(32, tuple(Span(3 * i, 3 * i + 3, (i,)) for i in range(3)))
    loose = problem("1 GiB", 3, bandwidth="400 Mbit/s", batch=32)
    deep = build.build(loose, "x", outline)
    lowered = tuple(stage.model_copy(update={"warmup": 1}) for stage in deep.stages)
    budget = max(memory_bytes(loose, lowered, "1f1b", 32).values())
    tight = problem(f"{budget} B", 3, bandwidth="400 Mbit/s", batch=32)
    plan = build.build(tight, "x", outline)
    assert not any(stage.recompute for stage in plan.stages)
    assert plan.stages[0].warmup < deep.stages[0].warmup
    found = finish.recomputed(tight, [plan])
    assert any(stage.recompute for stage in found.stages)
    assert timeline(tight, found).step_time_s < timeline(tight, plan).step_time_s
    assert shortage(tight, found.stages, "1f1b", 32) is None
    ample = problem(f"{needs(loose, deep)} B", 3, bandwidth="400 Mbit/s", batch=32)
    shallow = deep.model_copy(update={"stages": lowered})
    for whole in (deep, shallow):
        assert finish.recomputed(ample, [whole]) == whole


def test_all_strategies_stay_within_budgets_that_bind() -> None:
    used = 0
    for memory in ("4 MiB", "6 MiB", "9 MiB"):
        found = problem(memory, 3, batch=16)
        for entry in compare(found):
            if entry.plan is not None and entry.timeline is not None:
                used += any(stage.recompute for stage in entry.plan.stages)
                assert all(
                    use.peak_memory_bytes <= found.cluster.device(use.device).memory_bytes
                    for use in entry.timeline.devices
                )
    assert used >= 3


def test_simulator_and_formulas_charge_the_second_forward() -> None:
    found = problem("1 GiB")
    one = (Replica(device="d0", rows=2),)
    plain = build.build(found, "x", Outline(2, (Span(0, 9, (0,)),)))
    ranges = ((0, 3), (3, 7))
    stages = (Stage(start=0, stop=9, replicas=one, recompute=ranges),)
    again = plain.model_copy(update={"stages": stages})
    seconds = again_s(found.profile, stages[0], "d0", 2)
    assert seconds == found.profile.forward_s("d0", 0, 7, 2)
    for compute in (lambda p: timeline(found, p).step_time_s, lambda p: price(found, p).step_time_s):
        assert compute(again) - compute(plain) == pytest.approx(2 * seconds)
    peaks: list[int] = []
    for plan in (plain, again):
        program = lower(plan, GRAPH)
        result = simulate(program, plan, GRAPH, found.profile, found.cluster, optimizer_copies=0)
        peaks.append(result.device("d0").peak_memory_bytes)
        assert result.memory[-1].bytes == result.memory[0].bytes
    assert peaks[1] < peaks[0]


def test_parts_save_about_as_much_and_cross_little() -> None:
    for parts in (1, 2, 3, 5, 9, 20):
        edges = equal_parts(GRAPH, 0, 9, parts)
        assert edges[0] == 0
        assert edges[-1] == 9
        assert len(edges) <= min(parts, 9) + 1
        assert all(a < b for a, b in pairwise(edges))
    saved = [layer.saved_bytes for layer in GRAPH.layers]
    middle = equal_parts(GRAPH, 0, 9, 2)[1]
    assert abs(sum(saved[:middle]) - sum(saved[middle:])) < 0.6 * sum(saved)


def test_of_all_ways_the_least_work_comes_first() -> None:
    found = ways(GRAPH, 2, 9, 3)
    work = [way.flops for way in found]
    assert work == sorted(work)
    assert ((2, 9),) in [way.ranges for way in found]
    assert len({way.ranges for way in found}) == len(found)


def test_gpipe_keeps_its_depth_and_runs_again() -> None:
    loose = problem("1 GiB", 3, batch=8)
    spans = tuple(Span(3 * i, 3 * i + 3, (i,)) for i in range(3))
    whole = build.build(loose, "gpipe", Outline(8, spans), schedule="gpipe")
    tight = problem(f"{needs(loose, whole) // 2} B", 3, batch=8)
    assert fitted(tight, whole.stages, "gpipe", 8)[1] is not None
    plan = build.build(tight, "gpipe", Outline(8, spans), schedule="gpipe")
    assert any(stage.recompute for stage in plan.stages)
    assert [s.warmup for s in plan.stages] == [s.warmup for s in whole.stages]
