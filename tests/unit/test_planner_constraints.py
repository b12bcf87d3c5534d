"""Data, links and rows: what a plan must keep to."""

from __future__ import annotations

import pytest

from planner_cases import make_graph, make_job, make_problem, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.defaults import default_cluster
from spanwise.core.errors import InfeasibleError, InputError
from spanwise.core.plan import Plan
from spanwise.lowering import lower
from spanwise.planner import STRATEGIES, Problem, compare, make_plan


def problem(cluster: Cluster | None = None, layers: int = 12, batch: int = 32, **options: object) -> Problem:
    cluster = cluster or default_cluster()
    graph = make_graph(layers)
    return Problem(graph, make_profile(graph, cluster), cluster, make_job(batch, **options))


def raw_rows_sent(found: Problem, plan: Plan, payload: str) -> int:
    """Rows of that payload that any device sends to another."""
    program = lower(plan, found.graph)
    sends = [a for actions in program.devices.values() for a in actions if a.kind == "send"]
    return sum(a.rows[1] - a.rows[0] for a in sends if a.payload == payload)


def test_without_privacy_every_strategy_has_a_plan() -> None:
    found = problem()
    for evaluation in compare(found):
        assert evaluation.reason == ""
        assert evaluation.plan is not None
        assert evaluation.plan.batch == 32
        assert evaluation.plan.strategy == evaluation.strategy


@pytest.mark.parametrize("strategy", ["single", "gpipe", "pipeline"])
def test_private_data_on_two_devices_refuses_single_stages(strategy: str) -> None:
    with pytest.raises(InfeasibleError, match=rf"^{strategy}: raw data on end-1 and end-2 must not leave"):
        make_plan(problem(private=True), strategy)


@pytest.mark.parametrize("share_labels", [False, True])
def test_private_data_stays(share_labels: bool) -> None:
    """In the plans of all strategies, and so in that of ``auto``, which is one of them."""
    found = problem(private=True, share_labels=share_labels)
    plans = {e.strategy: e.plan for e in compare(found) if e.plan is not None}
    assert plans.keys() >= {"data_parallel", "weighted_data_parallel", "hpp"}
    for plan in plans.values():
        assert plan.stages[0].replicas == plan.sources
        assert raw_rows_sent(found, plan, "input") == 0
        if not share_labels:
            assert plan.stages[-1].replicas == plan.sources
            assert raw_rows_sent(found, plan, "label") == 0


def test_the_check_above_can_fail() -> None:
    """Control: without ``private`` raw rows do move."""
    found = problem()
    assert raw_rows_sent(found, make_plan(found, "single"), "input") == 32


def test_private_hpp_computes_the_middle_elsewhere() -> None:
    plan = make_plan(problem(private=True), "hpp")
    assert len(plan.stages) > 2
    assert set(plan.devices) > {"end-1", "end-2"}


def test_private_data_on_one_device() -> None:
    found = problem(private=True, data_devices=["edge"])
    assert make_plan(found, "single").stages[0].devices == ("edge",)
    for strategy in ("gpipe", "pipeline", "hpp"):
        plan = make_plan(found, strategy)
        assert plan.stages[0].devices == plan.stages[-1].devices == ("edge",)


def test_shared_labels_free_the_last_stage() -> None:
    found = problem(private=True, share_labels=True, data_devices=["end-2"])
    for strategy in ("gpipe", "pipeline"):
        plan = make_plan(found, strategy)
        assert plan.stages[0].devices == ("end-2",)
        assert plan.stages[-1].devices != ("end-2",)


def test_shares_of_the_data_are_rows_of_the_sources() -> None:
    cluster = Cluster.parse({**default_cluster().to_data(), "data": {"end-1": 3.0, "end-2": 1.0}})
    plan = make_plan(problem(cluster, batch=16), "data_parallel")
    rows = [source.rows * plan.micro_batches for source in plan.sources]
    assert rows == [12, 4]


def test_equal_shares_are_as_equal_as_integers_allow() -> None:
    plan = make_plan(problem(batch=30), "data_parallel")
    rows = [replica.rows for replica in plan.stages[0].replicas]
    assert len(rows) == 4
    assert max(rows) - min(rows) <= 1


def test_replicas_keep_the_rows_that_they_hold() -> None:
    """Data on both of two devices: equal shares need no raw row to move."""
    cluster = Cluster.parse(
        {"devices": [{"id": "a"}, {"id": "b"}], "data": ["b", "a"],
         "links": [{"between": ["site", "site"], "bandwidth": "1 Mbit/s"}]}
    )  # fmt: skip
    found = problem(cluster)
    assert raw_rows_sent(found, make_plan(found, "data_parallel"), "input") == 0


def test_devices_that_would_get_no_row_are_left_out_of_large_clusters() -> None:
    speeds = [1.0] * 8 + [0.001, 0.002]
    devices = [{"id": f"d{i}", "speed": speed} for i, speed in enumerate(speeds)]
    links = [{"between": ["site", "site"], "bandwidth": "1 Gbit/s"}]
    found = problem(Cluster.parse({"devices": devices, "links": links}), batch=40)
    plan = make_plan(found, "weighted_data_parallel")
    assert set(plan.devices) <= {f"d{i}" for i in range(8)}


def test_batch_smaller_than_the_replicas() -> None:
    text = r"^data_parallel: a batch of 3 rows is smaller than its 4 replicas, .*; raise the batch to 4 or "
    with pytest.raises(InfeasibleError, match=text):
        make_plan(problem(batch=3), "data_parallel")
    text = r"^single: a batch of 1 row is smaller than its 2 data devices, .*; raise the batch to 2 or name "
    with pytest.raises(InfeasibleError, match=text):
        make_plan(problem(batch=1), "single")


@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 3}, {"private": True}])
def test_a_reason_stands_behind_its_strategy_once(options: dict[str, int]) -> None:
    found = problem(**options)
    seen = 0
    for evaluation in compare(found):
        if evaluation.plan is None:
            seen += 1
            assert not evaluation.reason.startswith(f"{evaluation.strategy}:")
            with pytest.raises(InfeasibleError) as caught:
                make_plan(found, evaluation.strategy)
            assert str(caught.value) == f"{evaluation.strategy}: {evaluation.reason}"
    assert seen


def test_unknown_data_device() -> None:
    with pytest.raises(InputError, match="unknown device 'nobody'"):
        make_plan(problem(data_devices=["nobody"]), "single")


def chain() -> Cluster:
    """end - edge - cloud without a direct link from end to cloud."""
    links = [
        {"between": ["end", "edge"], "bandwidth": "50 Mbit/s"},
        {"between": ["edge", "cloud"], "bandwidth": "1 Gbit/s"},
    ]
    devices = [{"id": "end", "speed": 0.1}, {"id": "edge", "speed": 0.5}, {"id": "cloud", "speed": 2.0}]
    return Cluster.parse({"devices": devices, "links": links, "data": ["end"]})


def test_plans_use_links_that_exist() -> None:
    found = problem(chain())
    by_name = {e.strategy: e for e in compare(found)}
    assert "no link from" in by_name["data_parallel"].reason
    for strategy in ("single", "weighted_data_parallel", "pipeline", "hpp"):
        plan = by_name[strategy].plan
        assert plan is not None
        # Labels go from the data straight to the last stage.
        assert "cloud" not in plan.stages[-1].devices


def test_a_device_without_any_link_is_left_out() -> None:
    data = default_cluster().to_data()
    lonely = {"id": "lonely", "site": "moon", "speed": 100.0}
    cluster = Cluster.parse({**data, "devices": [*data["devices"], lonely]})
    for evaluation in compare(problem(cluster)):
        if evaluation.plan is not None:
            assert "lonely" not in evaluation.plan.devices
        else:
            assert "no link" in evaluation.reason


def test_measured_links_replace_those_of_the_file() -> None:
    found = problem(chain())
    link = {"source": "end", "target": "edge", "bandwidth_bytes_per_s": 1.0, "latency_s": 0.5}
    profile = type(found.profile).parse({**found.profile.to_data(), "links": [link]})
    slow = Problem(found.graph, profile, found.cluster, found.job)
    assert make_plan(slow, "auto").devices == ("end",)
    assert make_plan(found, "auto").devices != ("end",)


def test_unknown_strategy_names_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"strategy 'best': unknown; known: single, data_parallel, .*hpp, auto"
    ):
        make_plan(problem(), "best")


def test_registry_is_literal_and_complete() -> None:
    assert list(STRATEGIES) == [
        "single",
        "data_parallel",
        "weighted_data_parallel",
        "gpipe",
        "pipeline",
        "hiertrain",
        "hiertrain_n",
        "hpp",
    ]


def test_clipping_puts_a_barrier_at_the_end_of_a_step() -> None:
    free, clipped = make_problem(3, 6, 1), make_problem(3, 6, 1, clip_norm=1.0)
    fast = {e.strategy: e.timeline.step_time_s for e in compare(free) if e.timeline}
    slow = {e.strategy: e.timeline.step_time_s for e in compare(clipped) if e.timeline}
    assert slow["hpp"] >= fast["hpp"] * (1 - 1e-9)
