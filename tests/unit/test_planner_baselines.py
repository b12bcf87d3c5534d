"""Baselines against brute force over their own published rules, written down anew here."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest

from planner_cases import make_cluster, make_graph, make_job, make_problem, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError, InputError
from spanwise.core.plan import Plan
from spanwise.planner import BASELINES, STRATEGIES, Problem, compare, compare_baselines, make_plan
from spanwise.planner.facts.rows import min_max_rows
from spanwise.planner.published.dapple import placements
from spanwise.planner.published.hetpipe import partition, virtual_workers
from spanwise.planner.published.pipedream import balanced
from spanwise.planner.published.two_phases import two_phase_rows


def test_auto_does_not_consider_them() -> None:
    problem = make_problem(3, 4, 1, batch=8)
    assert {e.strategy for e in compare(problem)} == set(STRATEGIES)
    assert [e.strategy for e in compare_baselines(problem)] == list(BASELINES)
    assert make_plan(problem).strategy in STRATEGIES
    more = "all_device, .*, two_tier, rounded_lp, sequential, .*, duplex, dsparse, .*"
    with pytest.raises(InputError, match=rf"known: single, .*, auto, asteroid, .*, hetpipe, {more}$"):
        make_plan(problem, "magic")


def published_round_s(problem: Problem, plan: Plan) -> float:
    """Section 3 of the method spec, term by term."""
    profile, links, rows, m = problem.profile, problem.links, plan.micro_batch_rows, plan.micro_batches
    index = {d: i for i, d in enumerate(problem.cluster.ids)}

    def slowest(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[float, float]:
        found = [links.route(index[x], index[y]) for x, y in [*product(a, b), *product(b, a)] if x != y]
        assert all(route is not None for route in found)
        known = [route for route in found if route is not None]
        return min(r.bandwidth_bytes_per_s for r in known), max(r.latency_s for r in known)

    steps: list[tuple[float, float, float]] = []
    for number, stage in enumerate(plan.stages):
        ef = max(profile.forward_s(r.device, stage.start, stage.stop, r.rows) for r in stage.replicas)
        eb = max(profile.backward_s(r.device, stage.start, stage.stop, r.rows) for r in stage.replicas)
        ta, n = 0.0, len(stage.replicas)
        if n > 1:
            rate, latency = slowest(stage.devices, stage.devices)
            size = sum(p.bytes for p in problem.graph.parameters_of(stage.start, stage.stop))
            ta = 2 * (n - 1) / n * size / rate + 2 * (n - 1) * latency
        steps.append((ef, eb, ta))
        if number + 1 < len(plan.stages):
            rate, latency = slowest(stage.devices, plan.stages[number + 1].devices)
            link = rows * problem.graph.layers[stage.stop - 1].cut_bytes / rate + latency
            steps.append((link, link, 0.0))
    whole = [m * (f + b) + sum(x + y for x, y, _ in steps[:c]) for c, (f, b, _) in enumerate(steps)]
    dm = max(range(len(steps)), key=lambda c: whole[c])
    total = []
    for s, (_, _, ta) in enumerate(steps):
        tw = sum(f for f, _, _ in steps[:s])
        between = sum(f + b for f, b, _ in steps[s:dm]) if s <= dm else -sum(f + b for f, b, _ in steps[dm:s])
        total.append(tw + m * (steps[dm][0] + steps[dm][1]) + between + ta)
    return max(total)


def changed(plan: Plan, stages: tuple[tuple[int, int, tuple[tuple[str, int], ...]], ...]) -> Plan:
    entries = [
        {"start": a, "stop": b, "replicas": [{"device": d, "rows": y} for d, y in held]}
        for a, b, held in stages
    ]
    return Plan.parse({**plan.to_data(), "stages": entries, "syncs": []}, "plan")


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_asteroid_is_the_cheapest_of_two_devices_in_memory_order(seed: int) -> None:
    problem = make_problem(2, 5, seed, batch=8)
    bigger = problem.cluster.devices[1].model_copy(update={"memory_bytes": 2**31})
    cluster = problem.cluster.model_copy(update={"devices": (problem.cluster.devices[0], bigger)})
    problem = Problem(problem.graph, problem.profile, cluster, problem.job)
    plan = make_plan(problem, "asteroid")
    assert {s.devices for s in plan.stages} <= {("d1",), ("d0",), ("d1", "d0")}  # memory first
    rows, layers = plan.micro_batch_rows, len(problem.graph)
    both = [((0, layers, (("d1", y), ("d0", rows - y))),) for y in range(1, rows)]
    pipes = [((0, c, (("d1", rows),)), (c, layers, (("d0", rows),))) for c in range(1, layers)]
    alone = [((0, layers, (("d0", rows),)),)]  # the last devices of the order may do without the first
    prices = [published_round_s(problem, changed(plan, stages)) for stages in both + pipes + alone]
    assert published_round_s(problem, plan) == pytest.approx(min(prices), rel=1e-9)
    depths = [min(2 * (len(plan.stages) - p) - 1, plan.micro_batches) for p in range(len(plan.stages))]
    assert [stage.warmup for stage in plan.stages] == depths


def test_two_phases_keep_to_caps_and_are_never_better_than_the_exact_rows() -> None:
    r = np.random.default_rng(0)
    seconds = np.cumsum(r.lognormal(0, 1.5, (200, 3, 8)), axis=2)
    caps = r.integers(1, 9, (200, 3))
    rows, fits = two_phase_rows(seconds, caps, 8)
    limited = np.where(np.arange(1, 9) > caps[:, :, None], np.inf, seconds)
    exact, feasible = min_max_rows(limited, 8)
    assert (fits <= feasible).all()
    assert fits.sum() > 100
    assert (rows[fits].sum(axis=1) == 8).all()
    assert (rows <= caps)[fits].all()
    assert (rows[fits] >= 1).all()
    padded = np.concatenate([np.zeros((200, 3, 1)), seconds], axis=2)

    def slowest(found: np.ndarray) -> np.ndarray:
        return np.take_along_axis(padded, found[:, :, None], axis=2)[:, :, 0].max(axis=1)

    ratio = slowest(rows)[fits] / slowest(exact)[fits]
    assert ratio.min() >= 1
    assert ratio.max() > 1  # control: the exact rows are another method


@pytest.mark.parametrize(("devices", "seed"), [(2, 0), (3, 1), (4, 2), (3, 5)])
def test_pipedream_solves_its_recurrence(devices: int, seed: int) -> None:
    problem = make_problem(devices, 4, seed, batch=8)
    count, layers, rows = devices, 4, 4
    times = [problem.profile.table(d) for d in problem.cluster.ids]
    layer_s = [
        sum(f * (t.forward(x, rows) + t.backward(x, rows)) for t, f in times) / count for x in range(layers)
    ]
    pairs = list(permutations(problem.cluster.ids, 2))
    rate = sum(problem.cluster.route(a, b).bandwidth_bytes_per_s for a, b in pairs) / len(pairs)

    def slowest(cuts: tuple[int, ...], sizes: tuple[int, ...]) -> float:
        most = 0.0
        for a, b, n in zip((0, *cuts), (*cuts, layers), sizes, strict=True):
            weights = sum(x.parameter_bytes for x in problem.graph.layers[a:b])
            most = max(most, (sum(layer_s[a:b]) + 4 * (n - 1) * weights / (n * rate)) / n)
            if a:
                most = max(most, 2 * rows * problem.graph.layers[a - 1].cut_bytes / (n * rate))
        return most

    every = [
        slowest(cuts, tuple(b - a for a, b in pairwise((0, *borders, count))))
        for stages in range(1, min(layers, count) + 1)
        for cuts in combinations(range(1, layers), stages - 1)
        for borders in combinations(range(1, count), stages - 1)
    ]
    found = balanced(problem, 2)
    assert sum(n for _, _, n in found) == count
    cuts, sizes = tuple(a for a, _, _ in found[1:]), tuple(n for _, _, n in found)
    assert slowest(cuts, sizes) == pytest.approx(min(every), rel=1e-9)


def test_dapple_places_by_three_policies() -> None:
    servers = ((0, 1, 2), (3, 4), (5,))
    fresh_first, append_first, scattered = (0, 2, 0), (2, 0, 0), (2, 0, 0)
    assert set(placements(servers, (1, 0, 0), 2)) == {fresh_first, append_first, scattered}
    assert set(placements(servers, (0, 0, 0), 3)) == {(3, 0, 0), (1, 1, 1)}
    assert set(placements(servers, (1, 1, 0), 2)) == {(1, 0, 1), (2, 0, 0), (1, 1, 0)}
    assert set(placements(servers, (3, 2, 0), 1)) == {(0, 0, 1)}


def test_dapple_and_pipedream_use_all_devices_with_equal_rows() -> None:
    problem = make_problem(4, 6, 2, batch=16)
    for strategy in ("dapple", "pipedream"):
        plan = make_plan(problem, strategy)
        assert {d for s in plan.stages for d in s.devices} == set(problem.cluster.ids)
        for stage in plan.stages:
            rows = [r.rows for r in stage.replicas]
            assert max(rows) - min(rows) <= 1


def kinds_problem() -> Problem:
    entries = [
        {"id": name, "speed": speed, "memory": memory}
        for name, speed, memory in (
            ("a0", 1.0, "64 MiB"), ("b0", 0.5, "32 MiB"), ("a1", 1.0, "64 MiB"), ("b1", 0.5, "32 MiB"),
            ("b2", 0.5, "32 MiB"),
        )
    ]  # fmt: skip
    cluster = Cluster.parse(
        {"devices": entries, "links": [{"between": ["site", "site"], "bandwidth": "1 Gbit/s"}]}
    )
    graph = make_graph(6)
    return Problem(graph, make_profile(graph, cluster, flops_per_s=2e9), cluster, make_job(8))


def test_hetpipe_gives_virtual_workers_equal_shares_of_every_kind() -> None:
    found = virtual_workers(kinds_problem())
    assert ((0, 2), (1, 3)) in found  # two workers: a0 b0 and a1 b1; b2 stays out
    assert ((1, 3), (0, 2)) in found
    assert ((1, 3, 4),) in found  # three workers: no a for each
    assert ((0,), (2,), (1,), (3,), (4,)) in found  # one worker of all


def test_hetpipe_partition_has_the_fastest_slowest_stage() -> None:
    problem = kinds_problem()
    rows = 2  # of a micro-batch of 4, in each of two virtual workers

    def slowest(cut: int) -> float:
        def both(d: str, a: int, b: int) -> float:
            return problem.profile.forward_s(d, a, b, rows) + problem.profile.backward_s(d, a, b, rows)

        layer = problem.graph.layers[cut - 1]
        messages = rows * (layer.cut_bytes + layer.gradient_cut_bytes) / 125e6
        return max(both("a0", 0, cut), both("b0", cut, 6) + messages)

    seconds, cuts = partition(problem, ((0, 2), (1, 3)), 2)
    best = min(range(1, 6), key=slowest)
    assert cuts == (0, best, 6)
    assert seconds == pytest.approx(slowest(best))


def test_a_plan_that_does_not_fit_is_a_reason_and_not_repaired() -> None:
    cluster = make_cluster(3, 1, memory="64 MiB")
    small = cluster.devices[2].model_copy(update={"memory_bytes": 2000})
    cluster = cluster.model_copy(update={"devices": (*cluster.devices[:2], small)})
    graph = make_graph(6)
    problem = Problem(graph, make_profile(graph, cluster), cluster, make_job(8))
    assert make_plan(problem)
    for strategy in ("pipedream", "dapple"):
        with pytest.raises(
            InfeasibleError, match=rf"{strategy}: d2 needs .* its budget is 2.0 KiB, .* short;"
        ):
            make_plan(problem, strategy)


def test_they_do_not_know_of_privacy() -> None:
    problem = make_problem(3, 4, 1, batch=8, private=True)
    reasons = [e.reason for e in compare_baselines(problem) if e.plan is None]
    assert any("must not leave" in reason for reason in reasons)


def test_more_stages_than_layers_are_not_made() -> None:
    problem = make_problem(5, 2, 1, batch=16)
    for entry in (*compare(problem), *compare_baselines(problem)):
        if entry.strategy == "all_cloud":
            assert "no device is of tier 'cloud'" in entry.reason
            continue
        assert entry.plan is not None
        assert len(entry.plan.stages) <= 2
