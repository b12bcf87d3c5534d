"""Any cluster, model, job and strategy: the plan covers, fits, keeps data where it must stay, and ends."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from planner_cases import make_graph, make_job, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.lowering import check, lower, natural_syncs
from spanwise.planner import (
    BASELINES,
    SERVER_STRATEGIES,
    STRATEGIES,
    Problem,
    lower_bound,
    make_plan,
)
from spanwise.planner.plans.feasible import broken_rule, shortage
from spanwise.planner.plans.price import price
from spanwise.planner.plans.trial import timeline


def random_problem(seed: int) -> Problem:
    r = random.Random(seed)
    devices = r.choice([1, 2, 3, 3, 4, 4])
    sites = [r.choice("ab") for _ in range(devices)]
    memory = r.choice(["1 GiB", "64 MiB", "16 MiB", "4 MiB"])
    entries = [
        {"id": f"d{i}", "site": site, "memory": memory, "speed": r.choice([0.1, 0.5, 1.0])}
        for i, site in enumerate(sites)
    ]
    links: list[dict[str, object]] = []
    for pair in (["a", "a"], ["a", "b"], ["b", "b"]):
        if set(pair) <= set(sites) and r.random() < 0.9:  # now and then a link is missing
            rate = r.choice(["1 Mbit/s", "20 Mbit/s", "1 Gbit/s"])
            links.append({"between": pair, "bandwidth": rate, "latency": "5 ms"})
    held = r.sample(range(devices), min(devices, r.randint(1, 2)))
    data = {f"d{i}": r.choice([1.0, 3.0]) for i in held}
    cluster = Cluster.parse({"devices": entries, "links": links, "data": data})
    layers, seed = r.randint(1, 9), r.randint(0, 3)
    # With 10 times the activations memory binds, and layers run again.
    graph = make_graph(layers, seed, activation=200_000 if memory in ("4 MiB", "16 MiB") else 20_000)
    profile = make_profile(
        graph, cluster, message_s=r.choice([0.0, 1e-3]), flops_per_s=r.choice([1e7, 2e8, 4e9])
    )
    job = make_job(
        r.choice([1, 4, 6, 16, 16, 16]),
        private=r.random() < 0.4,
        share_labels=r.random() < 0.4,
        clip_norm=r.choice([None, 1.0]),
    )
    if r.random() < 0.3:
        cluster = cluster.model_copy(update={"data": "everywhere"})
    return Problem(graph, profile, cluster, job)


problems = st.integers(0, 2**32).map(random_problem)


def check_plan(problem: Problem, plan: Plan) -> None:
    assert plan.batch == problem.job.batch
    whole = tuple(sync.model_copy(update={"segments": 1, "ends": None}) for sync in plan.syncs)
    assert whole == natural_syncs(plan.stages, problem.graph)
    assert Plan.from_json(plan.to_json()) == plan
    check(lower(plan, problem.graph, clip=problem.job.clip_norm is not None), plan, problem.graph)
    assert shortage(problem, plan.stages, plan.schedule, plan.micro_batches) is None
    assert broken_rule(problem, plan) == ""
    if problem.job.private or problem.cluster.data == "everywhere":
        assert plan.stages[0].replicas == plan.sources
        if problem.job.private and not problem.job.share_labels:
            assert plan.stages[-1].replicas == plan.sources
    found = timeline(problem, plan)
    assert found.step_time_s >= lower_bound(problem).step_time_s * (1 - 1e-9) > 0
    for use in found.devices:
        assert use.peak_memory_bytes <= problem.cluster.device(use.device).memory_bytes
    formula = price(problem, plan).step_time_s
    assert 0 < formula < float("inf")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems, st.sampled_from([*STRATEGIES, "auto"]))
def test_every_plan_keeps_to_the_rules(problem: Problem, strategy: str) -> None:
    plan, reason = attempt(problem, strategy)
    if plan is None:
        assert reason.startswith((f"{strategy}: ", "job "))
        assert "\n" not in reason
        return
    assert strategy in ("auto", plan.strategy)
    check_plan(problem, plan)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(problems, st.sampled_from(list(BASELINES)))
def test_baselines_keep_to_the_rules_or_say_why_not(problem: Problem, strategy: str) -> None:
    plan, reason = attempt(problem, strategy)
    if plan is None:
        assert reason.startswith(f"{strategy}: ")
        return
    check_plan(problem, plan)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems, st.sampled_from(list(SERVER_STRATEGIES)))
def test_plans_over_a_server_keep_to_the_rules_or_say_why_not(problem: Problem, strategy: str) -> None:
    plan, reason = attempt(problem, strategy)
    if plan is None:
        assert reason.startswith(f"{strategy}: ")
        assert "\n" not in reason
        return
    assert (plan.strategy, plan.batch) == (strategy, problem.job.batch)
    assert Plan.from_json(plan.to_json()) == plan
    check(lower(plan, problem.graph, clip=problem.job.clip_norm is not None), plan, problem.graph)
    assert broken_rule(problem, plan) == ""
    if problem.job.private or problem.cluster.data == "everywhere":
        assert plan.stages[0].replicas == plan.stages[-1].replicas == plan.sources
    (sync,) = plan.servers
    assert set(sync.clients) == set(plan.computing) - {sync.server}
    found = timeline(problem, plan)
    assert found.step_time_s >= lower_bound(problem).step_time_s * (1 - 1e-9)
    for use in found.devices:
        assert use.peak_memory_bytes <= problem.cluster.device(use.device).memory_bytes


def attempt(problem: Problem, strategy: str) -> tuple[Plan | None, str]:
    try:
        return make_plan(problem, strategy), ""
    except InfeasibleError as error:
        return None, str(error)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems)
def test_auto_finds_what_any_strategy_finds(problem: Problem) -> None:
    best = float("inf")
    for strategy in STRATEGIES:
        try:
            best = min(best, timeline(problem, make_plan(problem, strategy)).step_time_s)
        except InfeasibleError:
            continue
    try:
        auto = timeline(problem, make_plan(problem)).step_time_s
    except InfeasibleError:
        auto = float("inf")
    assert auto == best
