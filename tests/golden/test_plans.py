"""The plans of all strategies for the default cluster as text: a change of planning shows as a diff."""

from __future__ import annotations

from collections.abc import Callable

from planner_cases import make_graph, make_job, make_problem, make_profile
from spanwise.core.defaults import default_cluster
from spanwise.planner import Evaluation, Problem, compare, compare_baselines

JOBS: dict[str, dict[str, object]] = {
    "free": {},
    "private": {"private": True},
    "private, labels shared": {"private": True, "share_labels": True},
}


def text(evaluation: Evaluation) -> str:
    if evaluation.plan is None or evaluation.timeline is None:
        return f"{evaluation.strategy}: infeasible\n  {evaluation.reason}"
    plan = evaluation.plan
    sources = " ".join(f"{s.device}:{s.rows}" for s in plan.sources)
    size = f"{plan.micro_batches} x {plan.micro_batch_rows} rows"
    lines = [f"{plan.strategy}: {size}, {plan.schedule}, from {sources}"]
    for stage in plan.stages:
        replicas = " ".join(f"{r.device}:{r.rows}" for r in stage.replicas)
        lines.append(f"  layers [{stage.start}:{stage.stop}) on {replicas}, warm-up {stage.warmup}")
    lines += [
        f"  sum {sync.layers} over {' '.join(sync.devices)}"
        + (f", in {sync.segments} segments" if sync.segments > 1 else "")
        + (f", in segments up to layers {sync.ends}" if sync.ends else "")
        for sync in plan.syncs
    ]
    return "\n".join(lines)


def all_plans() -> str:
    cluster = default_cluster()
    graph = make_graph(12, 1)
    profile = make_profile(graph, cluster, flops_per_s=1e10)
    blocks: list[str] = []
    for name, options in JOBS.items():
        problem = Problem(graph, profile, cluster, make_job(64, **options))
        blocks.append(f"# {name}\n\n" + "\n\n".join(text(e) for e in compare(problem)))
    return "\n\n\n".join(blocks) + "\n"


def all_baselines() -> str:
    cluster = default_cluster()
    graph = make_graph(12, 1)
    tiers = Problem(graph, make_profile(graph, cluster, flops_per_s=1e10), cluster, make_job(16))
    blocks: list[str] = []
    for name, problem in (("three tiers", tiers), ("two sites", make_problem(5, 8, 2, batch=12))):
        blocks.append(f"# {name}\n\n" + "\n\n".join(text(e) for e in compare_baselines(problem)))
    return "\n\n\n".join(blocks) + "\n"


def test_baselines_plan_as_written(golden: Callable[[str, str], None]) -> None:
    golden("baselines", all_baselines())


def test_plans_are_as_written(golden: Callable[[str, str], None]) -> None:
    golden("plans", all_plans())
