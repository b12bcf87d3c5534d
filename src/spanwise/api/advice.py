"""What ``spanwise plan`` and ``spanwise simulate`` answer. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spanwise.api.planning import choose, predict
from spanwise.core.cluster import Cluster
from spanwise.core.faults import Fault
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.core.run_folder import RunFolder
from spanwise.core.timeline import Timeline
from spanwise.planner import Advice, Evaluation, Problem, advise, compare


@dataclass(frozen=True)
class Answer:
    """The chosen plan, its prediction, every strategy's, and the advice."""

    plan: Plan
    predicted: Timeline
    evaluations: tuple[Evaluation, ...]
    advice: Advice

    def to_data(self) -> dict[str, Any]:
        """Under the same keys as everywhere: ``step_time_s``, ``devices.<id>...``."""
        return {
            "strategy": self.plan.strategy,
            "step_time_s": self.predicted.step_time_s,
            "throughput_samples_per_s": self.plan.batch / self.predicted.step_time_s,
            "pays": self.advice.pays,
            "advice": self.advice.sentence,
            "bottleneck": self.advice.bottleneck,
            "plan": self.plan.to_data(),
            "devices": {u.device: u.to_data() for u in self.predicted.devices},
            "strategies": {
                e.strategy: {
                    "step_time_s": e.timeline.step_time_s if e.timeline else None,
                    "peak_memory_bytes": {u.device: u.peak_memory_bytes for u in e.timeline.devices}
                    if e.timeline
                    else {},
                    "reason": e.reason,
                }
                for e in self.evaluations
            },
        }


def advice_data(job: Job, cluster: Cluster, graph: ModelGraph, times: Profile, strategy: str) -> Answer:
    """Compares all strategies, chooses the one asked for (or the best), explains."""
    problem = Problem(graph=graph, profile=times, cluster=cluster, job=job)
    if strategy == "auto":
        chosen, evaluations = choose(job, cluster, graph, times, "auto")
    else:
        evaluations = compare(problem)
        chosen, _ = choose(job, cluster, graph, times, strategy)
    predicted = predict(chosen, graph, times, cluster, job)
    return Answer(chosen, predicted, evaluations, advise(problem, evaluations))


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
