"""What ``spanwise plan`` and ``spanwise simulate`` answer. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spanwise.api.planning import fastest_plan, predict
from spanwise.core.cluster import Cluster
from spanwise.core.faults import Fault
from spanwise.core.importance import Importance
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.core.run_folder import RunFolder
from spanwise.core.timeline import Timeline
from spanwise.planner import (
    Advice,
    Bound,
    Evaluation,
    Problem,
    WhatIf,
    advise,
    bottleneck,
    compare,
    compare_baselines,
    left_out,
    lower_bound,
    make_plan,
    what_if,
)


@dataclass(frozen=True)
class Answer:
    """The chosen plan, its prediction, how near it is to the best there can be, and every strategy's.

    Attributes:
        plan, predicted: what was chosen, simulated.
        evaluations: every strategy.
        advice: whether distributing pays, by the strategy that wins.
        bottleneck: what limits ``plan``.
        bound: no plan is faster.
        left_out: devices that ``plan`` does not use, and why.
        baselines: planners of others, if asked for.
        what_if: what changes of the cluster would give, if asked for.
    """

    plan: Plan
    predicted: Timeline
    evaluations: tuple[Evaluation, ...]
    advice: Advice
    bottleneck: str
    bound: Bound
    left_out: dict[str, str]
    baselines: tuple[Evaluation, ...] = ()
    what_if: WhatIf | None = None

    @property
    def gap(self) -> float:
        """By which part the predicted step time is above the bound."""
        return self.bound.gap(self.predicted.step_time_s)

    def ratio(self, entry: Evaluation) -> float | None:
        """Step time of another plan over that of the winner; None without one."""
        return entry.timeline.step_time_s / self.advice.step_time_s if entry.timeline else None

    def to_data(self) -> dict[str, Any]:
        """Under the same keys as everywhere: ``step_time_s``, ``devices.<id>...``; see docs/strategies.md."""
        out: dict[str, Any] = {
            "strategy": self.plan.strategy,
            "step_time_s": self.predicted.step_time_s,
            "throughput_samples_per_s": self.plan.batch / self.predicted.step_time_s,
            "pays": self.advice.pays,
            "advice": self.advice.sentence,
            "bottleneck": self.bottleneck,
            "bound": {
                "step_time_s": self.bound.step_time_s,
                "compute_s": self.bound.compute_s,
                "gap": self.gap,
                "term": self.bound.term,
            },
            "left_out": self.left_out,
            "plan": self.plan.to_data(),
            "devices": {u.device: u.to_data() for u in self.predicted.devices},
            "strategies": {e.strategy: _evaluation_data(e) for e in self.evaluations},
        }
        if self.baselines:
            out["baselines"] = {
                e.strategy: {
                    **_evaluation_data(e),
                    "ratio": self.ratio(e),
                    "plan": e.plan.to_data() if e.plan else None,
                }
                for e in self.baselines
            }
        if self.what_if is not None:
            out["what_if"] = asdict(self.what_if)
        return out


def _evaluation_data(entry: Evaluation) -> dict[str, Any]:
    uses = entry.timeline.devices if entry.timeline else ()
    return {
        "step_time_s": entry.timeline.step_time_s if entry.timeline else None,
        "peak_memory_bytes": {use.device: use.peak_memory_bytes for use in uses},
        "reason": entry.reason,
    }


def advice_data(
    job: Job,
    cluster: Cluster,
    graph: ModelGraph,
    times: Profile,
    strategy: str,
    *,
    baselines: bool = False,
    replans: int = 0,
    importance: Importance | None = None,
) -> Answer:
    """Compares all strategies, chooses the one asked for (or the best), explains.

    Args:
        job: what to train.
        cluster: on what.
        graph: layers of the model.
        times: layer times and measured links.
        strategy: whose plan; ``auto`` for the fastest.
        baselines: whether to plan with every baseline too.
        replans: how many changes of the cluster to plan for; 0 = none.
        importance: scores of parameters, for a strategy that chooses what each device trains.
    """
    problem = Problem(graph=graph, profile=times, cluster=cluster, job=job, importance=importance)
    evaluations = compare(problem)
    chosen = fastest_plan(problem, evaluations) if strategy == "auto" else make_plan(problem, strategy)
    predicted = predict(chosen, graph, times, cluster, job)
    return Answer(
        plan=chosen,
        predicted=predicted,
        evaluations=evaluations,
        advice=advise(problem, evaluations),
        bottleneck=bottleneck(problem, chosen, predicted),
        bound=lower_bound(problem),
        left_out=left_out(problem, chosen),
        baselines=compare_baselines(problem) if baselines else (),
        what_if=what_if(problem, chosen, make_plan, replans) if replans else None,
    )


def save_plan(
    path: Path, job: Job, cluster: Cluster, graph: ModelGraph, times: Profile, chosen: Plan
) -> None:
    """Writes a folder that ``simulate`` reads: the inputs of a run without its results."""
    folder = RunFolder.create(path)
    job.save(folder.job)
    cluster.save(folder.cluster)
    graph.save(folder.graph)
    times.save(folder.profile)
    chosen.save(folder.plan)
    predict(chosen, graph, times, cluster, job).save(folder.simulated)


def simulate_folder(path: Path, cluster_path: Path | None, faults: tuple[str, ...], steps: int) -> Timeline:
    """The predicted Timeline of a folder's plan, optionally on another cluster and with faults."""
    folder = RunFolder.open(path)
    cluster = Cluster.load(cluster_path or folder.cluster)
    chosen = Plan.load(folder.plan)
    for device in chosen.devices:
        cluster.device(device)
    return predict(
        chosen, ModelGraph.load(folder.graph), Profile.load(folder.profile), cluster, Job.load(folder.job),
        steps=steps, faults=tuple(Fault.of(text) for text in faults),
    )  # fmt: skip
