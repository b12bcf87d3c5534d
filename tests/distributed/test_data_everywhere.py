"""Data on every device: training equals plain PyTorch, on batches that no plan changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ALL, BATCH_STATISTICS, GPT, MLP
from equality import (
    Case,
    assignment,
    cluster,
    largest_difference,
    of,
    random_plan,
    reference,
)
from test_privacy import Recording, integer_messages, leaked_rows
from torch import Tensor

from spanwise.api.run import TrainOptions, run_job
from spanwise.core.cluster import Cluster
from spanwise.core.job import Job
from spanwise.core.plan import Plan
from spanwise.core.profile import DeviceTimes, Profile
from spanwise.planner import Problem, compare
from spanwise.profiler.scale import analytic_table
from spanwise.runtime.device_run import Assignment, Snapshot
from spanwise.runtime.pool import WorkerPool
from spanwise.runtime.processes import ProcessSession
from spanwise.runtime.session import StepReport
from spanwise.runtime.threads import ThreadSession
from spanwise.runtime.transport import Transport

EVERYWHERE = cluster(data="everywhere")


def plan_for(case: Case, seed: int) -> Plan:
    """A random plan whose rows start out where they are first computed."""
    same = case.name in BATCH_STATISTICS
    plan = random_plan(of(case)[1].graph, case.batch, seed, same_slices=same, least=case.slice_rows)
    return plan.model_copy(update={"sources": plan.stages[0].replicas})


def work_for(case: Case, plan: Plan, machines: Cluster = EVERYWHERE) -> Assignment:
    return assignment(case, of(case)[1], plan, machines)


def on_threads(case: Case, work: Assignment) -> tuple[Snapshot, list[StepReport], list[Tensor]]:
    """State, reports, and every tensor that was sent."""
    source = of(case)[1]
    recorders: list[Recording] = []

    def wrap(_: str, transport: Transport) -> Transport:
        recorders.append(Recording(transport))
        return recorders[-1]

    session = ThreadSession(work, source.parameters | source.buffers, case.data(), wrap=wrap)
    try:
        reports = list(session.run(0, case.steps))
        return session.snapshot(), reports, [t for recorder in recorders for t in recorder.sent]
    finally:
        session.close()


def difference(case: Case, work: Assignment, found: Snapshot, reports: list[StepReport]) -> float:
    expected, losses = reference(case, of(case)[0], work, case.steps)
    kept = {name: expected[name] for name in found.parameters}
    far = max(abs(report.loss - loss) for report, loss in zip(reports, losses, strict=True))
    return max(largest_difference(found.parameters, kept), far)


@pytest.mark.parametrize("seed", range(40, 43))
@pytest.mark.parametrize("name", ALL)
def test_random_plans_on_threads_equal_plain_pytorch(name: str, seed: int) -> None:
    case = ALL[name]
    work = work_for(case, plan_for(case, seed))
    found, reports, _ = on_threads(case, work)
    assert difference(case, work, found, reports) < 1e-10


@pytest.mark.parametrize("seed", range(43, 46))
@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_gloo_processes_equal_plain_pytorch(pool: WorkerPool, name: str, seed: int) -> None:
    case = ALL[name]
    source = of(case)[1]
    work = work_for(case, plan_for(case, seed))
    session = ProcessSession(pool, work, source.parameters | source.buffers, case.data())
    reports = list(session.run(0, case.steps))
    assert difference(case, work, session.snapshot(), reports) < 1e-10


def test_raw_rows_do_not_travel() -> None:
    rows = MLP.data().tensors[0].double()
    for seed in range(6):
        _, _, sent = on_threads(MLP, work_for(MLP, plan_for(MLP, seed)))
        assert leaked_rows(sent, rows) == 0
    plan = random_plan(of(MLP)[1].graph, MLP.batch, 3)  # control: sources elsewhere are noticed
    assert plan.sources != plan.stages[0].replicas
    _, _, sent = on_threads(MLP, work_for(MLP, plan))
    assert leaked_rows(sent, rows) > 0


def test_every_plan_trains_on_the_same_batches() -> None:
    """Plain PyTorch on the rows of one plan is what every other plan computes, whatever its sources."""
    plans = [plan_for(MLP, seed) for seed in range(4)] + [random_plan(of(MLP)[1].graph, MLP.batch, 3)]
    assert len({(plan.micro_batches, plan.sources) for plan in plans}) >= 4
    runs = [on_threads(MLP, work_for(MLP, plan)) for plan in plans]
    for found, reports, _ in runs[1:]:
        assert largest_difference(found.parameters, runs[0][0].parameters) < 1e-10
        assert [r.loss for r in reports] == pytest.approx([r.loss for r in runs[0][1]], abs=1e-10)
    listed = [work_for(MLP, plan, cluster(tuple(s.device for s in plan.sources))) for plan in plans[:2]]
    one, other = (on_threads(MLP, work)[0].parameters for work in listed)  # control: shards
    assert largest_difference(one, other) > 1e-6


def test_private_plans_of_every_strategy_keep_samples_and_labels() -> None:
    source = of(GPT)[1]
    times = Profile(
        graph_digest=source.graph.digest,
        tables=(analytic_table(source.graph, 1e8),),
        devices=tuple(DeviceTimes(device=d) for d in EVERYWHERE.ids),
    )
    problem = Problem(source.graph, times, EVERYWHERE, GPT.job(private=True))
    plans = [entry.plan for entry in compare(problem) if entry.plan is not None]
    assert {len(plan.stages[0].replicas) for plan in plans} >= {1, 4}
    for plan in plans:
        found, reports, sent = on_threads(GPT, work_for(GPT, plan))
        assert integer_messages(sent) == 0  # samples and labels of this model are integers
        assert difference(GPT, work_for(GPT, plan), found, reports) < 1e-10


def job(**changes: Any) -> Job:
    return Job.parse(
        {
            "model": {"name": "spanwise.zoo:mlp", "sizes": [8, 16, 16, 4]},
            "data": {"name": "spanwise.zoo.data:synthetic_vectors", "rows": 96, "features": 8, "classes": 4},
            "batch": 12, "steps": 6, "dtype": "float64", **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["data_parallel", "gpipe", "auto"])
def test_a_run_from_job_to_report_and_on_under_another_plan(tmp_path: Path, strategy: str) -> None:
    def run(task: Job, name: str, **options: Any) -> dict[str, Tensor]:
        options = {"strategy": strategy, "backend": "threads", **options}
        outcome = run_job(task, EVERYWHERE, TrainOptions(run=tmp_path / name, **options))
        assert outcome.plan.sources == outcome.plan.stages[0].replicas
        assert Cluster.load(outcome.folder.cluster) == EVERYWHERE
        return {k: v.detach().clone() for k, v in outcome.model.state_dict().items()}

    whole = run(job(), "whole", strategy="single")
    run(job(steps=3), "half")
    rest = run(job(), "rest", resume=tmp_path / "half", strategy="single")
    assert all(torch.allclose(rest[k], whole[k], rtol=1e-10, atol=1e-12) for k in whole)


def test_the_data_devices_of_a_job_go_before(tmp_path: Path) -> None:
    options = TrainOptions(run=tmp_path / "r", strategy="single", backend="threads")
    outcome = run_job(job(data_devices=["b", "d"]), EVERYWHERE, options)
    assert [source.device for source in outcome.plan.sources] == ["b", "d"]
