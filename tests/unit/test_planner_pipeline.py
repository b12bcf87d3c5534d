"""The search against brute force, on the price alone: an independent reading of Asteroid's cost model.

Ye et al., MobiCom 2024, by the equations of its unofficial re-implementations.
"""

from __future__ import annotations

from itertools import combinations, permutations

import pytest

from planner_cases import make_cluster, make_graph, make_job, make_profile
from spanwise.planner import Problem, make_plan
from spanwise.planner.search.grid import all_cuts, coarse_cuts, fine_cuts
from spanwise.planner.search.outlines import best_outlines


def dominant_step_s(problem: Problem, order: tuple[str, ...], edges: tuple[int, ...], m: int) -> float:
    """Time of the dominant step, links full duplex, the input link in front where the data is elsewhere."""
    graph, profile, cluster = problem.graph, problem.profile, problem.cluster
    rows = problem.job.batch // m
    steps: list[tuple[float, float]] = []  # (forward + backward, busy)
    for number, device in enumerate(order):
        a, b = edges[number], edges[number + 1]
        both = profile.forward_s(device, a, b, rows) + profile.backward_s(device, a, b, rows)
        steps.append((both, both))
        if number + 1 < len(order):
            forth, back = cluster.route(device, order[number + 1]), cluster.route(order[number + 1], device)
            out = rows * graph.layers[b - 1].cut_bytes / forth.bandwidth_bytes_per_s
            into = rows * graph.layers[b - 1].gradient_cut_bytes / back.bandwidth_bytes_per_s
            steps.append((out + into + forth.latency_s + back.latency_s, max(out, into)))
    source = problem.sources[0]
    raw = 0.0
    if source != order[0]:
        route = cluster.route(source, order[0])
        raw = rows * graph.input_row_bytes / route.bandwidth_bytes_per_s
        if source in order:
            steps.insert(0, (raw + route.latency_s, raw))
    best = before = 0.0
    for both, busy in steps:
        best = max(best, (m - 1) * busy + both + before)
        before += both
    return max(best, m * raw)


@pytest.mark.parametrize("seed", range(9))
def test_search_is_exact_over_orders_subsets_cuts_and_counts(seed: int) -> None:
    devices, layers = (3, 7) if seed % 2 else (4, 5)
    cluster = make_cluster(devices, seed)
    graph = make_graph(layers, seed)
    profile = make_profile(graph, cluster, flops_per_s=4e9, update_s_per_byte=0.0)
    problem = Problem(graph, profile, cluster, make_job(16, data_devices=[cluster.ids[seed % devices]]))
    best = min(
        dominant_step_s(problem, order, (0, *cuts, layers), m)
        for count in range(1, devices + 1)
        for order in permutations(cluster.ids, count)
        for cuts in combinations(range(1, layers), count - 1)
        for m in problem.micro_batch_choices()
    )
    found = best_outlines(problem, singles=True, in_flight=1, cuts=all_cuts(layers))
    assert found[0].price_s == pytest.approx(best, rel=1e-12)
    groups = [span.group for span in found[0].spans]
    assert all(len(group) == 1 for group in groups)
    assert len(set(groups)) == len(groups)


def test_stages_have_one_device_each() -> None:
    cluster = make_cluster(4, 2)
    graph = make_graph(8)
    plan = make_plan(Problem(graph, make_profile(graph, cluster), cluster, make_job()), "pipeline")
    assert all(len(stage.replicas) == 1 for stage in plan.stages)


def test_coarse_cuts_keep_the_thin_ones() -> None:
    cluster = make_cluster(2, 0)
    graph = make_graph(60)
    wide = 100_000
    layers = list(graph.layers)
    for i in range(59):
        spec = layers[i].outputs[0].model_copy(update={"shape": (10 if i % 6 == 5 else wide,)})
        layers[i] = layers[i].model_copy(update={"outputs": (spec,)})
    graph = graph.model_copy(update={"layers": tuple(layers)})
    problem = Problem(graph, make_profile(graph, cluster), cluster, make_job())
    cuts = coarse_cuts(problem.tables)
    assert len(cuts) == 25
    assert (cuts[0], cuts[-1]) == (0, 60)
    thin = set(range(6, 60, 6))
    assert thin <= set(cuts)


def test_fine_cuts_surround_the_given_ones() -> None:
    assert fine_cuts(100, [10, 50, 10], 8) == (0, 8, 9, 10, 11, 49, 50, 51, 100)
    assert fine_cuts(5, [], 8) == (0, 5)
