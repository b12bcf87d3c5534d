"""Changes of the cluster are planned again: what each gives, in which order, and which cannot matter."""

from __future__ import annotations

import pytest

from planner_cases import make_graph, make_job, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.profile import LinkTimes
from spanwise.planner import Problem, left_out, make_plan, what_if
from spanwise.planner.changes import more_memory, second_device, wider_links
from spanwise.planner.plans.trial import timeline


def cluster_of(bandwidth: str = "100 Mbit/s", memory: str = "1 GiB", **more: object) -> Cluster:
    return Cluster.parse(
        {"devices": [
            {"id": "cam", "site": "plant", "speed": 0.2, "memory": memory},
            {"id": "box", "site": "plant", "speed": 0.5, "memory": memory, "up": "1 Gbit/s"},
            {"id": "box-2", "site": "plant", "speed": 0.5, "memory": memory, "up": "1 Gbit/s"},
            {"id": "server", "site": "far", "speed": 1.0, "memory": memory}],
         "links": [{"between": ["plant", "plant"], "bandwidth": "1 Gbit/s", "latency": "1 ms"},
                   {"between": ["plant", "far"], "bandwidth": bandwidth, "latency": "5 ms"}],
         "data": ["cam"], **more}
    )  # fmt: skip


def problem_on(cluster: Cluster, *links: LinkTimes) -> Problem:
    graph = make_graph(4, 3)
    profile = make_profile(graph, cluster, flops_per_s=2e9).model_copy(update={"links": links})
    return Problem(graph, profile, cluster, make_job(8))


def test_a_second_device_equals_the_first() -> None:
    link = LinkTimes(source="cam", target="box", bandwidth_bytes_per_s=1e7, latency_s=1e-3)
    found = second_device(problem_on(cluster_of(), link), "box").problem
    assert found.cluster.ids == ("cam", "box", "box-2", "server", "box-3")  # box-2 is taken
    old, new = found.cluster.device("box"), found.cluster.device("box-3")
    assert new == old.model_copy(update={"id": "box-3"})
    assert found.profile.table("box-3") == found.profile.table("box")
    assert [(x.source, x.target) for x in found.profile.links] == [("cam", "box"), ("cam", "box-3")]
    assert found.cluster.connected("box", "box-3")
    assert Cluster.from_json(found.cluster.to_json()) == found.cluster
    assert found.sources == ("cam",)


def test_a_second_device_has_links_of_its_own_like_the_first() -> None:
    cluster = Cluster.parse(
        {"devices": [{"id": "a"}, {"id": "b"}], "links": [{"between": ["a", "b"], "bandwidth": "1 Mbit/s"}]}
    )
    found = second_device(problem_on(cluster), "b").problem.cluster
    assert found.connected("a", "b-2")
    assert found.connected("b-2", "a")
    assert not found.connected("b", "b-2")


def test_a_link_is_doubled_both_ways_with_what_was_measured_over_it() -> None:
    links = (
        LinkTimes(source="cam", target="server", bandwidth_bytes_per_s=1.1e7, latency_s=5e-3),
        LinkTimes(source="cam", target="box", bandwidth_bytes_per_s=1e8, latency_s=1e-3),
    )
    problem = problem_on(cluster_of(), *links)
    changes = {change.text: change for change in wider_links(problem)}
    assert list(changes) == [
        "twice the bandwidth inside plant",
        "twice the bandwidth between far and plant",
        "twice the bandwidth of the port of box",
        "twice the bandwidth of the port of box-2",
    ]
    wan = changes["twice the bandwidth between far and plant"]
    assert wan.resources == {"link:plant>far", "link:far>plant"}
    assert wan.problem.cluster.route("server", "cam").bandwidth_bytes_per_s == 2.5e7
    assert [x.bandwidth_bytes_per_s for x in wan.problem.profile.links] == [2.2e7, 1e8]
    assert wan.problem.links.route(0, 3).bandwidth_bytes_per_s == 2.2e7  # type: ignore[union-attr]


def test_what_was_measured_does_not_outgrow_what_else_is_on_the_way() -> None:
    link = LinkTimes(source="box", target="server", bandwidth_bytes_per_s=1e8, latency_s=5e-3)
    problem = problem_on(cluster_of("1 Gbit/s"), link)
    wan = next(c for c in wider_links(problem) if "far" in c.text)
    assert wan.problem.profile.links[0].bandwidth_bytes_per_s == 1.25e8  # its own port


def test_each_change_is_planned_again_and_none_is_a_loss() -> None:
    problem = problem_on(cluster_of("1 Gbit/s"))
    plan = make_plan(problem)
    today = timeline(problem, plan).step_time_s
    found = what_if(problem, plan, make_plan)
    assert [s.ratio for s in found.found] == sorted((s.ratio for s in found.found), reverse=True)
    for entry in found.found:
        assert entry.ratio == pytest.approx(today / entry.step_time_s)
        assert entry.ratio >= 1 - 1e-9
    by_name = {s.change: s for s in found.found}
    server = second_device(problem, "server").problem
    planned = timeline(server, make_plan(server)).step_time_s
    assert by_name["a second server"].step_time_s == pytest.approx(min(planned, today))
    assert by_name["a second server"].ratio > 1.05
    assert "a second box-2" not in by_name  # box stands for it
    memory = [u for u in found.untried if u.change.startswith("1 GiB more")]
    assert len(memory) == 3
    assert all("memory does not bind" in u.reason for u in memory)


def test_at_most_so_many_plans_the_busiest_first() -> None:
    problem = problem_on(cluster_of())
    calls: list[Problem] = []

    def planner(changed: Problem) -> object:
        calls.append(changed)
        return make_plan(changed, "single")

    plan = make_plan(problem, "single")
    found = what_if(problem, plan, planner, 2)  # type: ignore[arg-type]
    assert len(calls) == len(found.found) == 2
    assert [u.reason for u in found.untried].count("beyond the 2 most promising changes") >= 2
    assert {s.change for s in found.found} & {f"a second {d}" for d in plan.devices}


def test_memory_that_binds_is_planned_again() -> None:
    problem = problem_on(cluster_of(memory="5 MiB"))
    found = what_if(problem, make_plan(problem), make_plan, 4)
    assert any(s.change.startswith("1 GiB more on ") for s in found.found)
    assert not any("memory does not bind" in u.reason for u in found.untried)
    assert more_memory(problem, "box").problem.cluster.device("box").memory_bytes == 5 * 2**20 + 2**30


def test_links_cannot_matter_where_compute_alone_binds() -> None:
    cluster = Cluster.parse(
        {"devices": [{"id": "a"}], "links": [{"between": ["site", "site"], "bandwidth": "1 Mbit/s"}]}
    )
    problem = problem_on(cluster)
    found = what_if(problem, make_plan(problem), make_plan)
    reasons = {u.change: u.reason for u in found.untried}
    assert reasons["twice the bandwidth inside site"] == "no pair of devices uses it"
    assert [s.change for s in found.found] == ["a second a"]


def test_devices_left_out_are_told_with_the_reason() -> None:
    cluster = cluster_of()
    alone = cluster.devices[3].model_copy(update={"id": "island", "site": "sea"})
    tiny = cluster.devices[1].model_copy(update={"id": "tiny", "memory_bytes": 100})
    problem = problem_on(cluster.model_copy(update={"devices": (*cluster.devices, alone, tiny)}))
    plan = make_plan(problem, "single")
    found = left_out(problem, plan)
    assert found["island"].startswith("no link from island to ")
    assert found["tiny"].startswith("the smallest layer needs ")
    assert found["box"] == "no plan that was found is faster with it"
    assert not found.keys() & set(plan.devices)
