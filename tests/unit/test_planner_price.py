from __future__ import annotations

import random
from itertools import pairwise, permutations
from statistics import quantiles

import pytest

from planner_cases import make_cluster, make_graph, make_job, make_profile
from spanwise.core.cluster import Cluster
from spanwise.planner import Problem
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.build import build
from spanwise.planner.plans.price import Step, dominant, price, round_s
from spanwise.planner.plans.trial import timeline


def published(steps: list[Step], m: int) -> float:
    """Asteroid's round time (Ye et al., MobiCom 2024) by a re-implementation's equation numbers.

    Without our full-duplex correction.
    """
    e = [s.forward_s + s.backward_s for s in steps]
    dm = max(range(len(steps)), key=lambda c: m * e[c] + sum(e[:c]))
    worst = 0.0
    for s, step in enumerate(steps):
        tw = sum(x.forward_s for x in steps[:s])
        te = m * e[dm] + (sum(e[s:dm]) if s <= dm else -sum(e[dm:s]))
        worst = max(worst, tw + te + step.sum_s)
    return worst


def test_the_closed_form_is_the_published_formula() -> None:
    r = random.Random(0)
    for _ in range(300):
        steps: list[Step] = []
        for c in range(2 * r.randint(1, 5) - 1):
            f, b = r.random(), 2 * r.random()
            kind = "link" if c % 2 else "compute"
            steps.append(Step(kind, "", f, b, f + b, 0.0 if c % 2 else r.choice([0.0, 5 * r.random()])))
        m = r.randint(1, 16)
        assert round_s(steps, m, barrier=True) == pytest.approx(published(steps, m))


def test_full_duplex_links_hold_less_up() -> None:
    link = Step("link", "wan", 1.0, 1.0, 1.0)
    half = Step("link", "wan", 1.0, 1.0, 2.0)
    assert dominant([link], 8)[1] == 9.0
    assert dominant([half], 8)[1] == 16.0


def test_without_a_barrier_sums_hide_behind_the_next_step() -> None:
    steps = [
        Step("compute", "a", 1.0, 2.0, 3.0),
        Step("link", "a>b", 0.1, 0.1, 0.1),
        Step("compute", "b", 1.0, 2.0, 3.0, sum_s=3.0),
    ]
    assert round_s(steps, 4, barrier=False) == pytest.approx(12.0 + 3.2)
    assert round_s(steps, 4, barrier=True) == pytest.approx(12.0 + 3.2 + (3.0 - 2.1))


def pipelines(cases: int) -> list[tuple[float, float, float]]:
    """(formula, simulation, link over compute time) of pipelines with warm-up 2(P-p)-1, M from 4 to 16."""
    r = random.Random(1)
    out: list[tuple[float, float, float]] = []
    for seed in range(cases):
        stages = r.randint(2, 4)
        cluster = make_cluster(stages, seed)
        cluster = Cluster.parse({**cluster.to_data(), "data": ["d0"]})
        graph = make_graph(2 * stages + 2, seed)
        profile = make_profile(graph, cluster, flops_per_s=r.choice([2e9, 1e10]))
        problem = Problem(graph, profile, cluster, make_job(32))
        cuts = sorted(r.sample(range(1, len(graph)), stages - 1))
        edges = [0, *cuts, len(graph)]
        order = r.choice(list(permutations(range(stages))))
        spans = tuple(Span(a, b, (d,)) for a, b, d in zip(edges, edges[1:], order, strict=False))
        plan = build(problem, "random", Outline(r.choice([4, 8, 16]), spans))
        rows, ids = plan.micro_batch_rows, cluster.ids
        compute = [profile.forward_s(ids[s.group[0]], s.start, s.stop, rows) for s in spans]
        links = [
            rows * graph.layers[a.stop - 1].cut_bytes
            / cluster.route(ids[a.group[0]], ids[b.group[0]]).bandwidth_bytes_per_s
            for a, b in pairwise(spans)
        ]  # fmt: skip
        ratio = max(links) / (sum(compute) / stages)
        out.append((price(problem, plan).step_time_s, timeline(problem, plan).step_time_s, ratio))
    return out


def test_formula_against_simulation() -> None:
    """Our own bound for links up to the compute time: 95 % of cases within 10 %, none beyond 20 %.

    Measured with 314 such cases: mean -0.2 %, 5th percentile -2.4 %, from -16.9 % to +3.2 %.
    """
    errors = sorted(
        abs(formula / simulated - 1) for formula, simulated, ratio in pipelines(120) if ratio <= 1
    )
    assert len(errors) > 60
    assert quantiles(errors, n=20)[-1] < 0.10
    assert errors[-1] < 0.20


def test_beyond_that_the_formula_is_too_low() -> None:
    """Why finalists are simulated: with links of three times the compute it misses up to two fifths."""
    worst = min(formula / simulated - 1 for formula, simulated, ratio in pipelines(120) if ratio > 3)
    assert worst < -0.10


def test_a_link_without_bandwidth_for_long_is_the_bottleneck() -> None:
    cluster = Cluster.parse(
        {"devices": [{"id": "a"}, {"id": "b"}], "data": ["a"],
         "links": [{"between": ["a", "b"], "bandwidth": "1 Mbit/s"}]}
    )  # fmt: skip
    graph = make_graph(4)
    problem = Problem(graph, make_profile(graph, cluster), cluster, make_job(16))
    plan = build(problem, "x", Outline(4, (Span(0, 2, (0,)), Span(2, 4, (1,)))))
    found = price(problem, plan)
    assert found.bottleneck == "link a > b"
    # Own derivation: with full-duplex links never above the simulation when a link dominates.
    assert found.step_time_s <= timeline(problem, plan).step_time_s * (1 + 1e-9)
