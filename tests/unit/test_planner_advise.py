from __future__ import annotations

import pytest

from planner_cases import make_graph, make_job, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.defaults import default_cluster
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.core.timeline import Timeline
from spanwise.core.units import format_seconds
from spanwise.planner import Evaluation, Problem, advise, compare


def problem(bandwidth: str = "100 Mbit/s", memory: str = "1 GiB", **options: object) -> Problem:
    cluster = Cluster.parse(
        {"devices": [{"id": x, "memory": memory} for x in ("a", "b", "c")], "data": ["a"],
         "links": [{"between": ["site", "site"], "bandwidth": bandwidth, "latency": "1 ms"}]}
    )  # fmt: skip
    graph = make_graph(12)
    return Problem(graph, make_profile(graph, cluster, flops_per_s=2e9), cluster, make_job(32, **options))


def computing(plan: Plan) -> set[str]:
    return {device for stage in plan.stages for device in stage.devices}


def test_over_one_kbit_a_second_distributing_does_not_pay() -> None:
    found = problem("1 kbit/s")
    advice = advise(found, compare(found))
    assert not advice.pays
    assert advice.sentence.startswith("Distributing does not pay: a alone takes ")
    assert advice.winner == "single"
    assert advice.single_device == "a"
    assert advice.speed_up == 1.0
    assert "; the best distributed plan found, " in advice.sentence


def test_the_rival_is_the_best_of_all_that_was_simulated() -> None:
    """Strategies that end on one device leave data_parallel, but better distributed plans were tried."""
    found = problem("500 kbit/s")
    evaluations = compare(found)
    left = [e for e in evaluations if e.plan and e.timeline and len(computing(e.plan)) > 1]
    tried = [
        result.step_time_s
        for plan, (_, result) in found.memo.trials.items()
        if isinstance(result, Timeline) and len(computing(plan)) > 1
    ]
    assert min(tried) < min(e.timeline.step_time_s for e in left if e.timeline)  # the case is one
    advice = advise(found, evaluations)
    assert not advice.pays
    assert f"takes {format_seconds(min(tried))}, limited by" in advice.sentence


def test_no_distributed_plan_is_said_so() -> None:
    cluster = Cluster.parse({"devices": [{"id": "a"}]})
    graph = make_graph(4)
    found = Problem(graph, make_profile(graph, cluster), cluster, make_job(16))
    advice = advise(found, compare(found))
    assert advice.sentence.endswith("; no distributed plan was found.")


def test_over_a_fast_network_it_pays() -> None:
    found = problem("10 Gbit/s")
    advice = advise(found, compare(found))
    assert advice.pays
    assert advice.speed_up is not None
    assert 2.0 < advice.speed_up < 3.3
    assert advice.single_step_time_s == pytest.approx(advice.step_time_s * advice.speed_up)
    assert advice.sentence.startswith("Distributing pays: ")
    assert "limited by compute on" in advice.sentence
    assert "\n" not in advice.sentence


def test_the_default_cluster_pays() -> None:
    cluster = default_cluster()
    graph = make_graph(24, activation=8_000)
    found = Problem(graph, make_profile(graph, cluster, flops_per_s=5e9), cluster, make_job(128))
    advice = advise(found, compare(found))
    assert advice.pays
    assert advice.single_device == "cloud"


def test_without_a_single_device_there_is_nothing_to_compare_with() -> None:
    cluster = default_cluster()
    graph = make_graph(8)
    found = Problem(graph, make_profile(graph, cluster), cluster, make_job(16, private=True))
    advice = advise(found, compare(found))
    assert advice.single_device is None
    assert advice.single_step_time_s is None
    assert advice.speed_up is None
    assert advice.pays
    assert "must not leave" in advice.sentence


def test_no_plan_at_all() -> None:
    found = problem(memory="100 KiB")
    evaluations = compare(found)
    assert all(isinstance(e, Evaluation) and e.plan is None and " short" in e.reason for e in evaluations)
    with pytest.raises(InfeasibleError, match=r"no strategy has a plan; hpp: \w needs .* short"):
        advise(found, evaluations)


def test_a_gain_within_the_error_of_prediction_is_none() -> None:
    found = problem("10 Gbit/s")
    evaluations = compare(found)
    single = next(e for e in evaluations if e.strategy == "single")
    best = next(e for e in evaluations if e.strategy == "hpp")
    assert single.timeline is not None
    near = single.timeline.model_copy(update={"step_time_s": single.timeline.step_time_s * 0.98})
    advice = advise(found, (single, Evaluation("hpp", best.plan, near, "")))
    assert advice.winner == "hpp"
    assert not advice.pays
    assert "within the error of the prediction" in advice.sentence
