"""Strategies over a parameter server: who serves, what rules promise, and plans that keep to the rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner_cases import make_cluster, make_graph, make_job, make_problem, make_profile
from server_cases import star
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError, InputError
from spanwise.planner import SERVER_STRATEGIES, STRATEGIES, Problem, compare, make_plan
from spanwise.planner.plans.trial import timeline
from spanwise.planner.segments.chain import Chain, Cuts, step_ns
from spanwise.planner.segments.rules import SEGMENT_RULES
from spanwise.planner.strategies.parameter_server import (
    ABOUT,
    Choice,
    Star,
    after_pushes,
    exchanges,
    plan_of,
    star_of,
)

MBIT = 1e6 / 8


def on_a_star(
    devices: int = 4, *, mbit: float = 10, latency: float = 0.01, message_s: float = 0.0, layers: int = 12,
    seed: int = 0, **options: object,
) -> Problem:  # fmt: skip
    cluster, graph = star(devices, mbit * MBIT, latency), make_graph(layers, seed)
    profile = make_profile(graph, cluster, message_s=message_s, flops_per_s=4e9)
    return Problem(graph, profile, cluster, make_job(8 * devices, **options))


def seconds(problem: Problem, strategy: str) -> float:
    return timeline(problem, make_plan(problem, strategy)).step_time_s


@pytest.mark.parametrize("message_s", [0.0, 1e-3, 2e-2])
@pytest.mark.parametrize("mbit", [5, 50, 500])
def test_dynacomm_is_about_the_best_rule_and_duplex_never_behind_it(mbit: float, message_s: float) -> None:
    for seed in range(2):
        problem = on_a_star(3, mbit=mbit, message_s=message_s, seed=seed)
        found = {name: seconds(problem, name) for name in SERVER_STRATEGIES}
        others = [found[name] for name in found if name not in ("dynacomm", "duplex")]
        assert found["dynacomm"] <= 1.03 * min(others)
        assert found["duplex"] <= (1 + ABOUT) * found["dynacomm"]
    assert found["dynacomm"] < found["sequential"]


def test_segments_leave_room_for_devices_that_are_late() -> None:
    problem = on_a_star(mbit=100)
    where = star_of(problem)
    own = exchanges(problem, where, by_latency=False)[0]
    pull, push = (
        replace(chain, compute_ns=tuple(ns * 3 // 2 for ns in chain.compute_ns))
        for chain in (own.pull, own.push)
    )
    (sync,) = make_plan(problem, "dynacomm").servers
    exact = SEGMENT_RULES["dynacomm"](own)
    on_paper = timeline(problem, plan_of(problem, "dynacomm", where, after_pushes(exact))).step_time_s
    late = replace(own, pull=pull, push=push)
    assert step_ns(late, Cuts(sync.pulls, sync.pushes)) < 0.98 * step_ns(late, exact)
    assert seconds(problem, "dynacomm") <= 1.01 * on_paper


def test_on_thin_links_duplex_takes_off_a_fifth() -> None:
    problem = on_a_star(mbit=5)
    assert seconds(problem, "duplex") < 0.8 * seconds(problem, "dynacomm")
    assert make_plan(problem, "duplex").servers[0].as_aggregated


def test_a_clipped_norm_leaves_duplex_what_dynacomm_has() -> None:
    problem = on_a_star(mbit=5, clip_norm=1.0)
    duplex, dynacomm = (make_plan(problem, name) for name in ("duplex", "dynacomm"))
    assert duplex.model_copy(update={"strategy": "dynacomm"}) == dynacomm


def test_auto_does_not_consider_them() -> None:
    problem = make_problem(3, 4, 1, batch=8)
    assert not SERVER_STRATEGIES.keys() & STRATEGIES.keys()
    assert {e.strategy for e in compare(problem)} == set(STRATEGIES)
    with pytest.raises(InputError, match=r"known: .*sequential, layer_by_layer, .*, duplex, dsparse, .*"):
        make_plan(problem, "dynacom")


def test_the_server_has_the_fastest_links_and_no_data_of_its_own() -> None:
    assert star_of(on_a_star(3)).server == "s"
    devices = [{"id": d, "speed": v} for d, v in (("a", 1.0), ("b", 0.5), ("c", 1.0))]
    links = [{"between": ["site", "site"], "bandwidth": "10 Mbit/s"}]
    alike = Cluster.parse({"devices": devices, "links": links, "data": "everywhere"})
    graph = make_graph(4)

    def found(cluster: Cluster, **options: object) -> Star:
        return star_of(Problem(graph, make_profile(graph, cluster), cluster, make_job(8, **options)))

    assert found(alike).server == "b"  # all links alike: the device whose compute is missed least
    faster = alike.model_copy(
        update={"devices": tuple(d.model_copy(update={"up_bytes_per_s": 1e5}) if d.id != "c" else d
                                 for d in alike.devices)}
    )  # fmt: skip
    assert found(faster).server in ("a", "b", "c")
    with_data = alike.model_copy(update={"data": Cluster.parse({**alike.to_data(), "data": ["b"]}).data})
    assert found(with_data).server in ("a", "c")
    private = Cluster.parse({**alike.to_data(), "data": ["a", "b", "c"]})
    own = found(private, private=True)
    assert own.server in [replica.device for replica in own.replicas]
    assert len(own.replicas) == 3


def test_rows_go_by_speed_and_every_device_gets_its_share_of_a_port() -> None:
    cluster = star(2, 10 * MBIT).model_copy(
        update={"devices": tuple(d.model_copy(update={"up_bytes_per_s": 5 * MBIT if d.id == "s" else None})
                                 for d in star(2).devices)}
    )  # fmt: skip
    graph = make_graph(4)
    profile = make_profile(graph, cluster)
    slow = profile.model_copy(
        update={"devices": tuple(d.model_copy(update={"factor": 3.0}) if d.device == "d0" else d
                                 for d in profile.devices)}
    )  # fmt: skip
    problem = Problem(graph, slow, cluster, make_job(16))
    found = star_of(problem)
    rows = {replica.device: replica.rows for replica in found.replicas}
    assert sum(rows.values()) == 16
    assert rows["d1"] > 2 * rows["d0"]
    first, second = exchanges(problem, found, by_latency=False)
    size = graph.layers[0].parameter_bytes
    assert first.pull.message_ns[0] == pytest.approx(size / (2.5 * MBIT) * 1e9, abs=1)
    assert (
        first.push.message_ns[0]
        == second.push.message_ns[0]
        == pytest.approx(size / (10 * MBIT) * 1e9, abs=1)
    )


def test_a_tied_parameter_travels_with_its_first_layer() -> None:
    graph = make_graph(3)
    both = (*graph.layers[0].parameters, *graph.layers[2].parameters)
    last = graph.layers[2].model_copy(update={"parameters": both})
    tied = graph.model_copy(update={"layers": (*graph.layers[:2], last)})
    cluster = star(1)
    problem = Problem(tied, make_profile(tied, cluster), cluster, make_job(4))
    (own,) = exchanges(problem, star_of(problem), by_latency=False)
    assert own.layer_bytes == tuple(layer.parameter_bytes for layer in graph.layers)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (lambda: Chain((1, 2), (1,), 0), "2 message times and 1 compute times"),
        (lambda: Chain((), (), 0), "give both for each of at least one layer"),
        (lambda: Chain((1, -2), (1, 1), 0), "times must not be negative"),
        (lambda: Chain.of([4], [float("nan")], 0.0, 1.0), "times must be finite"),
        (lambda: Chain.of([4], [0.0], 0.0, float("nan")), "it must be above zero"),
    ],
)
def test_costs_that_are_none_are_refused(bad: object, why: str) -> None:
    assert callable(bad)
    with pytest.raises(InputError, match=why):
        bad()


def test_what_has_no_plan_says_why() -> None:
    graph = make_graph(4)
    alone = Cluster.parse({"devices": [{"id": "a"}]})
    with pytest.raises(
        InfeasibleError, match="dynacomm: a would be the server, but there is no other device"
    ):
        make_plan(Problem(graph, make_profile(graph, alone), alone, make_job(8)), "dynacomm")
    private = Problem(graph, make_profile(graph, alone), alone, make_job(8, private=True))
    with pytest.raises(InfeasibleError, match="a would be the server, and alone to compute"):
        make_plan(private, "duplex")
    apart = Cluster.parse({"devices": [{"id": "a"}, {"id": "b"}], "data": "everywhere"})
    with pytest.raises(InfeasibleError, match="no other device is joined to it both ways"):
        make_plan(Problem(graph, make_profile(graph, apart), apart, make_job(8)), "duplex")
    small = make_cluster(3, 1, memory="1 MiB")
    with pytest.raises(InfeasibleError, match=r"sequential: d\d .* short; raise its memory"):
        make_plan(Problem(graph, make_profile(graph, small), small, make_job(8)), "sequential")


def test_the_plan_of_a_choice_is_cut_where_either_way_is() -> None:
    problem = on_a_star(2, layers=4)
    choice = Choice(Cuts((1, 4), (3, 4)), (1, 0), as_aggregated=True)
    plan = plan_of(problem, "hand", star_of(problem), choice)
    assert [stage.stop for stage in plan.stages] == [1, 3, 4]
    assert plan.servers[0].order == (1, 0)
    assert step_ns(exchanges(problem, star_of(problem), by_latency=True)[0], choice.cuts) > 0
