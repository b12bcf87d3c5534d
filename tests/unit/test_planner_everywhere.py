"""Data on every device: rows start out where they are first computed, so that no raw row travels."""

from __future__ import annotations

from itertools import pairwise

import pytest

from planner_cases import make_cluster, make_graph, make_job, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.defaults import default_cluster
from spanwise.core.errors import InfeasibleError, InputError, PlanError
from spanwise.core.plan import Plan
from spanwise.lowering import lower
from spanwise.planner import STRATEGIES, Problem, check_plan, compare, fastest_of, make_plan
from spanwise.planner.plans.price import price
from spanwise.planner.plans.trial import timeline
from spanwise.planner.search.grid import all_cuts
from spanwise.planner.search.outlines import best_outlines


def everywhere(cluster: Cluster | None = None) -> Cluster:
    return Cluster.parse({**(cluster or default_cluster()).to_data(), "data": "everywhere"})


def problem(
    cluster: Cluster | None = None,
    *,
    layers: int = 12,
    batch: int = 32,
    inputs: int = 12_288,
    **options: object,
) -> Problem:
    cluster = cluster or everywhere()
    graph = make_graph(layers, inputs=inputs)
    return Problem(graph, make_profile(graph, cluster), cluster, make_job(batch, **options))


def slower(cluster: Cluster, factor: float) -> Cluster:
    """All links of that part of their bandwidth."""
    links = [
        link.model_copy(update={"bandwidth_bytes_per_s": link.bandwidth_bytes_per_s * factor})
        for link in cluster.links
    ]
    return cluster.model_copy(update={"links": tuple(links)})


def sent(found: Problem, plan: Plan, payload: str) -> int:
    """Messages of that payload between devices."""
    program = lower(plan, found.graph)
    return sum(a.kind == "send" and a.payload == payload for d in program.devices.values() for a in d)


def plans_of(found: Problem) -> dict[str, Plan]:
    """The plan of every strategy and that of ``auto``, which is one of them."""
    evaluations = compare(found)
    best = fastest_of(evaluations)
    assert best is not None
    plans = {e.strategy: e.plan for e in evaluations if e.plan is not None}
    assert plans.keys() == STRATEGIES.keys()
    return {**plans, "auto": plans[best.strategy]}


def test_the_sources_are_the_replicas_of_the_first_stage() -> None:
    found = problem()
    for plan in plans_of(found).values():
        assert plan.sources == plan.stages[0].replicas
        assert sent(found, plan, "input") == 0
        check_plan(found, plan)


def test_data_on_some_devices_does_travel() -> None:
    """Control: the same cluster with its data on the end devices."""
    found = problem(default_cluster())
    assert sent(found, make_plan(found, "single"), "input") > 0


def test_large_clusters_alike() -> None:
    """Beyond eight devices other searches are used."""
    found = problem(everywhere(make_cluster(9, 2)), layers=6, batch=36)
    for evaluation in compare(found):
        assert evaluation.plan is not None, evaluation.reason
        assert evaluation.plan.sources == evaluation.plan.stages[0].replicas


def test_the_step_of_single_depends_on_no_link() -> None:
    cluster = everywhere()
    fast, slow = problem(cluster), problem(slower(cluster, 1e-3))
    plans = [make_plan(found, "single") for found in (fast, slow)]
    assert plans[0] == plans[1]
    assert plans[0].stages[0].devices == ("cloud",)
    assert timeline(fast, plans[0]).step_time_s == timeline(slow, plans[1]).step_time_s
    assert price(fast, plans[0]) == price(slow, plans[1])
    listed = default_cluster()  # control: with the data elsewhere links count
    fast, slow = problem(listed), problem(slower(listed, 1e-3))
    step = [timeline(found, make_plan(found, "single")).step_time_s for found in (fast, slow)]
    assert step[1] > 1.5 * step[0]


def test_rows_of_any_size_cost_nothing() -> None:
    """Prices and trials count no transfer of raw rows: the plan is that for inputs of one number."""
    data = everywhere().to_data()
    roomy = [{**device, "memory_bytes": 2**50} for device in data["devices"]]  # inputs need memory, too
    cluster = Cluster.parse({**data, "devices": roomy})
    small, large = problem(cluster, inputs=4), problem(cluster, inputs=40_000_000)
    ones, others = plans_of(small), plans_of(large)
    for strategy, one in ones.items():
        other = others[strategy]
        assert one.stages == other.stages
        assert timeline(small, one).step_time_s == timeline(large, other).step_time_s
        assert price(small, one) == price(large, other)


def test_a_micro_batch_may_have_fewer_rows_than_the_cluster_has_devices() -> None:
    plan = make_plan(problem(batch=2), "single")
    assert plan.sources == plan.stages[0].replicas
    text = "^data_parallel: a batch of 2 rows is smaller than its 4 replicas"
    with pytest.raises(InfeasibleError, match=text):
        make_plan(problem(batch=2), "data_parallel")


def test_replicas_of_one_site_stay_neighbours() -> None:
    """No source asks for another order, so a ring crosses between the sites once each way."""
    data = default_cluster().to_data()
    order = [data["devices"][i] for i in (1, 0, 2, 3)]  # edge, cloud, end-1, end-2
    plan = make_plan(problem(everywhere(Cluster.parse({**data, "devices": order}))), "data_parallel")
    assert plan.stages[0].devices == ("edge", "end-1", "end-2", "cloud")


def test_the_data_devices_of_a_job_go_before() -> None:
    found = problem(data_devices=["end-1"])
    plan = make_plan(found, "single")
    assert [source.device for source in plan.sources] == ["end-1"]
    assert found.shares[0].share == 1.0
    fixed = problem(data_devices=["end-1"], private=True)
    assert fixed.first_is_fixed
    assert make_plan(fixed, "hpp").stages[0].devices == ("end-1",)
    with pytest.raises(InputError, match="unknown device 'nobody'"):
        make_plan(problem(data_devices=["nobody"]), "single")


def test_private_with_shared_labels_restricts_nothing() -> None:
    free, private = problem(), problem(private=True, share_labels=True)
    for strategy in STRATEGIES:
        plan = make_plan(private, strategy)
        assert plan == make_plan(free, strategy)
        check_plan(private, plan)


@pytest.mark.parametrize("devices", [4, 9])
def test_private_labels_make_plans_of_one_stage(devices: int) -> None:
    cluster = everywhere(make_cluster(devices, 1))
    found = problem(cluster, layers=6, batch=36, private=True)
    for strategy in ("single", "data_parallel", "weighted_data_parallel", "pipeline", "hpp", "auto"):
        plan = make_plan(found, strategy)
        assert len(plan.stages) == 1
        assert plan.sources == plan.stages[0].replicas
        assert sent(found, plan, "input") == sent(found, plan, "label") == 0
    text = "^gpipe: labels on d0 must not leave .*; set share_labels = true or use one stage$"
    with pytest.raises(InfeasibleError, match=text):
        make_plan(found, "gpipe")


def test_private_labels_do_not_hinder_a_model_without_labels() -> None:
    found = problem(private=True)
    graph = found.graph.model_copy(update={"labels": ()})
    plan = make_plan(Problem(graph, found.profile, found.cluster, found.job), "gpipe")
    assert len(plan.stages) == 4


def test_a_plan_from_elsewhere_must_keep_private_rows_where_they_are() -> None:
    free = problem()
    plan = make_plan(free, "gpipe")
    check_plan(problem(private=True, share_labels=True), plan)
    with pytest.raises(PlanError, match="labels on cloud must not leave them"):
        check_plan(problem(private=True), plan)
    moved = plan.model_copy(update={"sources": problem(default_cluster()).source_rows(plan.micro_batch_rows)})
    check_plan(free, moved)  # any device has the rows; they travel, which is slower but right
    with pytest.raises(PlanError, match="raw data on end-1 and end-2 must not leave"):
        check_plan(problem(private=True, share_labels=True), moved)


def chain(*ends: str) -> Cluster:
    """Devices in a row, each with links to its neighbours only."""
    links = [{"between": pair, "bandwidth": "1 Gbit/s"} for pair in pairwise(ends)]
    return Cluster.parse(
        {"devices": [{"id": d} for d in ends], "links": links, "data": "everywhere"}
    )  # fmt: skip


def test_labels_need_a_link_from_the_first_stage_to_the_last() -> None:
    found = problem(chain("a", "b", "c"))
    by_name = {e.strategy: e for e in compare(found)}
    assert "no link from" in by_name["gpipe"].reason
    for strategy in ("single", "weighted_data_parallel", "pipeline", "hpp"):
        plan = by_name[strategy].plan
        assert plan is not None, by_name[strategy].reason
        assert set(plan.devices) != {"a", "b", "c"} or len(plan.stages) < 3
    assert len(make_plan(found, "pipeline").devices) == len(make_plan(found, "hpp").devices) == 2
    outlines = best_outlines(found, singles=True, in_flight=1, cuts=all_cuts(len(found.graph)))
    ends = {(outline.spans[0].group, outline.spans[-1].group) for outline in outlines}
    assert ends == {((a,), (b,)) for a in range(3) for b in range(3) if abs(a - b) < 2}
