"""The lower bound where it is known, and that it is near plans where links decide."""

from __future__ import annotations

import pytest

from planner_cases import make_graph, make_job, make_problem, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.profile import LayerTimes
from spanwise.planner import Problem, compare, compare_baselines, lower_bound, make_plan
from spanwise.planner.plans.trial import timeline


def cluster_of(*names: str, bandwidth: str = "100 Gbit/s", latency: str = "0 ms", **more: object) -> Cluster:
    links = [{"between": ["site", "site"], "bandwidth": bandwidth, "latency": latency}]
    return Cluster.parse({"devices": [{"id": n} for n in names], "links": links, **more})


def problem_on(cluster: Cluster, batch: int = 16, launch_s: float = 0.0, **options: object) -> Problem:
    graph = make_graph(6, 2)
    profile = make_profile(graph, cluster, flops_per_s=2e9, launch_s=launch_s)
    return Problem(graph, profile, cluster, make_job(batch, **options))


def best_s(problem: Problem) -> float:
    return timeline(problem, make_plan(problem)).step_time_s


def test_one_device_reaches_it() -> None:
    problem = problem_on(cluster_of("a"), launch_s=1e-3)
    bound = lower_bound(problem)
    assert best_s(problem) == pytest.approx(bound.step_time_s, rel=1e-9)
    assert bound.gap(best_s(problem)) == pytest.approx(0.0, abs=1e-9)
    assert (bound.term, bound.compute_s) == ("compute", bound.step_time_s)


def test_equal_devices_with_free_links_reach_it_but_for_the_update() -> None:
    """Each of two replicas updates all parameters; the bound lets each update its half."""
    problem = problem_on(cluster_of("a", "b", data="everywhere"))
    update = problem.profile.update_s("a", problem.graph.parameter_bytes)
    bound = lower_bound(problem).step_time_s
    assert bound <= best_s(problem) <= bound + update / 2 + 1e-3


def test_unlike_devices_count_by_speed() -> None:
    cluster = Cluster.parse(
        {"devices": [{"id": "a", "speed": 1.0}, {"id": "b", "speed": 0.25}],
         "links": [{"between": ["site", "site"], "bandwidth": "1 Gbit/s"}], "data": "everywhere"}
    )  # fmt: skip
    alone = lower_bound(problem_on(cluster_of("a"))).step_time_s
    assert lower_bound(problem_on(cluster)).compute_s == pytest.approx(alone / 1.25, rel=1e-3)


def test_very_slow_links_leave_one_device() -> None:
    problem = problem_on(cluster_of("a", "b", "c", bandwidth="1 kbit/s"))
    bound, found = lower_bound(problem), best_s(problem)
    assert bound.compute_s < 0.4 * found
    assert bound.step_time_s > 0.98 * found
    assert bound.term.startswith("links of devices, most of all those of ")


def test_raw_data_on_its_way_counts() -> None:
    cluster = Cluster.parse(
        {"devices": [{"id": "cam", "speed": 0.01}, {"id": "server", "site": "far"}],
         "links": [{"between": ["site", "far"], "bandwidth": "1 Mbit/s"}], "data": ["cam"]}
    )  # fmt: skip
    problem = problem_on(cluster)
    moved = problem.job.batch * problem.graph.input_row_bytes * 8 / 1e6
    bound, found = lower_bound(problem), best_s(problem)
    assert bound.compute_s < 0.5 * bound.step_time_s <= 0.5 * found
    assert bound.step_time_s < moved * 1.01
    assert "cam" in bound.term or "site" in bound.term


def test_private_data_keeps_the_first_layer_at_home() -> None:
    cluster = Cluster.parse(
        {"devices": [{"id": "cam", "speed": 0.01}, {"id": "server"}],
         "links": [{"between": ["site", "site"], "bandwidth": "100 Gbit/s"}], "data": ["cam"]}
    )  # fmt: skip
    free, private = problem_on(cluster), problem_on(cluster, private=True, share_labels=True)
    assert lower_bound(private).step_time_s > 1.5 * lower_bound(free).step_time_s
    assert lower_bound(private).step_time_s <= best_s(private) * (1 + 1e-9)


def test_a_layer_that_a_device_cannot_hold_is_not_counted_there() -> None:
    cluster = cluster_of("a", "b", data="everywhere")
    small = cluster.devices[1].model_copy(update={"memory_bytes": 1000})
    tight = cluster.model_copy(update={"devices": (cluster.devices[0], small)})
    alone = lower_bound(problem_on(cluster_of("a"))).step_time_s
    assert lower_bound(problem_on(tight)).step_time_s == pytest.approx(alone, rel=1e-6)


def test_devices_of_one_machine_count_as_alone() -> None:
    problem = problem_on(cluster_of("a"))
    lab = [e.model_copy(update={"alone": 0.8}) for e in problem.profile.devices]
    shared = Problem(
        problem.graph,
        problem.profile.model_copy(update={"devices": tuple(lab)}),
        problem.cluster,
        problem.job,
    )
    assert lower_bound(shared).step_time_s == pytest.approx(0.8 * lower_bound(problem).step_time_s)


def test_times_that_fall_with_rows_count_as_they_are_simulated() -> None:
    problem = problem_on(cluster_of("a"))
    table = problem.profile.tables[0]
    first = LayerTimes(
        forward_s=tuple(reversed(table.layers[0].forward_s)), backward_s=table.layers[0].backward_s
    )
    odd = table.model_copy(update={"layers": (first, *table.layers[1:])})
    fallen = Problem(
        problem.graph, problem.profile.model_copy(update={"tables": (odd,)}), problem.cluster, problem.job
    )
    assert lower_bound(fallen).step_time_s <= best_s(fallen) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_of_any_strategy_is_below_it(seed: int) -> None:
    problem = make_problem(3, 5, seed, batch=8)
    bound = lower_bound(problem)
    assert 0 < bound.compute_s <= bound.step_time_s
    for entry in (*compare(problem), *compare_baselines(problem)):
        if entry.timeline is not None:
            assert entry.timeline.step_time_s >= bound.step_time_s * (1 - 1e-9), entry.strategy


def test_a_bound_a_fifth_higher_would_be_wrong() -> None:
    """Negative control: the bound is near enough that plans break one of 1.2 times its value."""
    tight = [problem_on(cluster_of("a")), problem_on(cluster_of("a", "b", "c", bandwidth="1 kbit/s"))]
    for problem in tight:
        assert best_s(problem) < 1.2 * lower_bound(problem).step_time_s
