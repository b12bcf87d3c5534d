"""One training run from job to report."""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import psutil
import torch

import spanwise
from spanwise.api.adaptive import Adapting
from spanwise.api.in_lab import meet_in_lab, profile_in_lab
from spanwise.api.planning import choose_for, predict, tight_devices
from spanwise.api.prepare import Prepared, prepare
from spanwise.api.scores import needs_scores, scores
from spanwise.api.times import profile_devices, profile_prepared
from spanwise.api.trying import Trying, steering_of
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InputError, PlanError
from spanwise.core.faults import Fault
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.noun import write_whole
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.core.run_folder import RunFolder
from spanwise.core.timeline import Timeline
from spanwise.lowering import lower
from spanwise.planner import Problem, check_plan
from spanwise.reporting import summarize, write_report
from spanwise.runtime.checkpoint import load_checkpoint
from spanwise.runtime.device_run import Assignment, Snapshot
from spanwise.runtime.measure import measured_timeline
from spanwise.runtime.pool import Meeting, WorkerPool
from spanwise.runtime.processes import ProcessSession
from spanwise.runtime.session import Session
from spanwise.runtime.threads import ThreadSession
from spanwise.runtime.training import Evaluation as Examination
from spanwise.runtime.training import Progress, Silent, Trained, train

if TYPE_CHECKING:
    from spanwise.lab import Lab
    from spanwise.planner import Evaluation
    from spanwise.planner.adapting.adaptation import Adaptation

Backend = Literal["processes", "threads"]


class Watcher(Progress, Protocol):
    """What a run tells while it goes on: its phases, besides the progress of training."""

    def on_stage(self, text: str) -> None:
        """The run enters a new phase: profiling, planning, starting workers, training."""
        ...

    def on_plan(
        self, plan: Plan, graph: ModelGraph, evaluations: tuple[Evaluation, ...], predicted: Timeline
    ) -> None:
        """The plan is made."""
        ...

    def on_meeting(self, pool: WorkerPool) -> None:
        """Workers may join now, or have joined."""
        ...

    def on_change(self, plan: Plan, graph: ModelGraph, record: Adaptation) -> None:
        """The run goes on under another plan."""
        ...


class Quiet(Silent):
    """Tells nothing."""

    def on_stage(self, text: str) -> None:
        """Nothing."""

    def on_plan(
        self, plan: Plan, graph: ModelGraph, evaluations: tuple[Evaluation, ...], predicted: Timeline
    ) -> None:
        """Nothing."""

    def on_meeting(self, pool: WorkerPool) -> None:
        """Nothing."""

    def on_change(self, plan: Plan, graph: ModelGraph, record: Adaptation) -> None:
        """Nothing."""


@dataclass(frozen=True)
class TrainOptions:
    """How to run.

    ``plan``, ``prepared`` and ``times`` are taken as they are in place of what the run would make itself.
    ``listen`` and ``token`` are for workers that are started by hand (``spawn = False``). With ``lab`` every
    worker runs as its device of that lab, which must be up. The first steps are run under up to ``tries``
    plans by turns, the rest under the fastest of them. With ``adapt`` the run changes its plan when devices
    or links drift. ``faults`` of the kind ``slow`` are what a portably emulated cluster suffers.
    """

    run: Path = Path("runs/latest")
    strategy: str = "auto"
    resume: Path | None = None
    cache: Path | None = None
    plan: Plan | None = None
    watcher: Watcher | None = None
    prepared: Prepared | None = None
    times: Profile | None = None
    backend: Backend = "processes"
    spawn: bool = True
    listen: tuple[str, int] = ("127.0.0.1", 0)
    token: str = ""
    join_timeout_s: float = 120.0
    lab: Lab | None = None
    tries: int = 1
    adapt: bool = False
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a run came to. ``summary`` is ``summary.json``; ``model`` holds the trained weights."""

    folder: RunFolder
    plan: Plan
    predicted: Timeline
    measured: Timeline
    summary: dict[str, Any]
    model: torch.nn.Module
    evaluations: tuple[Evaluation, ...] = field(default=())


def run_job(job: Job, cluster: Cluster, options: TrainOptions) -> Outcome:
    """Profiles, plans, predicts, trains, reports."""
    watcher = options.watcher or Quiet()
    resumes_here = options.resume is not None and options.resume.resolve() == options.run.resolve()
    folder = RunFolder.create(options.run, keep=resumes_here)
    watcher.on_stage("tracing the model")
    prepared = options.prepared or prepare(job)
    job = prepared.job
    run = _Run(job, cluster, options, prepared, folder, watcher)
    try:
        return run.go()
    finally:
        run.close()


class _Run:
    """One run's parts, so that whatever was opened is closed."""

    def __init__(
        self, job: Job, cluster: Cluster, options: TrainOptions, prepared: Prepared, folder: RunFolder,
        watcher: Watcher,
    ) -> None:  # fmt: skip
        self.job, self.cluster, self.options = job, cluster, options
        self.prepared, self.folder, self.watcher = prepared, folder, watcher
        self.pool: WorkerPool | None = None
        self.session: Session | None = None
        self.steering: Adapting | Trying | None = None

    def go(self) -> Outcome:
        graph = self.prepared.traced.graph
        resume = self._checkpoint(graph)
        times = self._profile()
        self.watcher.on_stage("planning")
        problem = self._problem(graph, times)
        plan, evaluations = self._plan(problem)
        if plan.sparse and self._may_change:
            raise InputError(
                f"strategy '{plan.strategy}': its devices train some parameters only, and such a run keeps "
                "its plan; train without adapting and trying, or choose another strategy"
            )
        predicted = predict(plan, graph, times, self.cluster, self.job)
        assignment = self._assignment(plan, graph, predicted)
        self._write_inputs(assignment, times, predicted)
        self.watcher.on_plan(plan, graph, evaluations, predicted)
        start, snapshot = (0, None) if resume is None else resume
        with self._eased():
            self.session = self._session(assignment, snapshot)
            if plan.sparse:
                self.watcher.on_stage("timing what each device trains")
                times = times.model_copy(update={"stages": self.session.stage_times()})
                predicted = predict(plan, graph, times, self.cluster, self.job)
                self._write_plan(assignment, times, predicted)
        self.steering = self._steering(problem, assignment, start)
        self.watcher.on_stage("training")
        began = time.monotonic()
        trained = train(
            self.session,
            assignment,
            Examination(self.prepared.model, self.prepared.loss, self.prepared.test),
            self.folder,
            start=start,
            progress=self.watcher,
            steering=self.steering,
        )
        if self.steering is not None and self.steering.records:
            times = self.steering.profile
            assignment = trained.assignment
            predicted = predict(assignment.plan, graph, times, self.cluster, self.job)
            self._write_plan(assignment, times, predicted)
        reports = [report for report in trained.reports if report.step >= trained.since]
        measured = measured_timeline(self.session.spans(), reports, assignment.program)
        measured.save(self.folder.measured)
        summary = self._summary(assignment, predicted, measured, trained, time.monotonic() - began)
        self.folder.write_json(self.folder.summary, summary)
        write_report(self.folder)
        return Outcome(
            self.folder, assignment.plan, predicted, measured, summary, self.prepared.model, evaluations
        )

    def _steering(self, problem: Problem, assignment: Assignment, start: int) -> Adapting | Trying | None:
        return steering_of(
            problem, assignment, self.folder, start=start, strategy=self.options.strategy,
            tries=self.options.tries, adapt=self.options.adapt, on_stage=self.watcher.on_stage,
            on_change=lambda work, record: self.watcher.on_change(work.plan, work.graph, record),
        )  # fmt: skip

    def close(self) -> None:
        if self.steering is not None:
            self.steering.close()
        if self.session is not None:
            self.session.close()
        if self.pool is not None:
            self.pool.close()

    def _checkpoint(self, graph: ModelGraph) -> tuple[int, Snapshot] | None:
        if self.options.resume is None:
            return None
        source = RunFolder.open(self.options.resume)
        found = load_checkpoint(source.checkpoints, graph.source_digest)
        return found.step, found.snapshot

    def _profile(self) -> Profile:
        if self.options.times is not None:
            return self.options.times
        if self.options.lab is not None:
            self.watcher.on_stage("starting workers in the lab")
            with self._eased():
                self.pool = self._meet(self.cluster.ids)
            self.watcher.on_stage("profiling layers on this machine, and the devices of the lab against it")
            return profile_in_lab(
                self.prepared, self.cluster, self.options.lab, self.pool, self.options.cache
            )
        if self.cluster.emulation is not None or self.options.backend == "threads":
            self.watcher.on_stage("profiling layers on this machine")
            return profile_prepared(self.prepared, self.cluster, self.options.cache)
        self.watcher.on_stage("waiting for workers")
        self.pool = self._meet(self.cluster.ids)
        self.watcher.on_stage("profiling layers and links on the devices")
        return profile_devices(self.prepared, self.pool)

    def _problem(self, graph: ModelGraph, times: Profile) -> Problem:
        found = scores(self.prepared, self.options.strategy) if self.options.plan is None else None
        return Problem(graph=graph, profile=times, cluster=self.cluster, job=self.job, importance=found)

    def _plan(self, problem: Problem) -> tuple[Plan, tuple[Evaluation, ...]]:
        given = self.options.plan
        if given is None:
            return choose_for(problem, self.options.strategy)
        if given.batch != self.job.batch:
            raise PlanError(
                f"plan '{given.strategy}' is for batches of {given.batch} rows, the job has "
                f"{self.job.batch}; plan again"
            )
        check_plan(problem, given)
        return given, ()

    def _assignment(self, plan: Plan, graph: ModelGraph, predicted: Timeline) -> Assignment:
        program = lower(plan, graph, clip=self.job.clip_norm is not None)
        assignment = Assignment(
            self.job, self.cluster, graph, self.prepared.traced.ops, plan, program,
            len(self.prepared.train), self._emulates, self.options.adapt, self._faults(),
            tight_devices(plan, self.cluster, predicted),
        )  # fmt: skip
        _ = assignment.sampler  # data too short for a batch: now, not on a worker
        return assignment

    def _faults(self) -> tuple[Fault, ...]:
        for fault in self.options.faults:
            if fault.kind != "slow" or not self._emulates:
                raise InputError(
                    f"fault {fault}: a run suffers 'slow' faults only, on a portably emulated cluster; "
                    "simulate others, or change the lab"
                )
        return self.options.faults

    def _eased(self) -> AbstractContextManager[None]:
        """Starting workers and building stages is not what a lab slows down."""
        return nullcontext() if self.options.lab is None else self.options.lab.eased()

    def _session(self, assignment: Assignment, snapshot: Snapshot | None) -> Session:
        traced = self.prepared.traced
        tensors = {k: v.detach() for k, v in traced.parameters.items()} | dict(traced.buffers)
        if snapshot is not None:
            tensors |= snapshot.parameters | snapshot.buffers
        data = self.prepared.train
        if self.options.backend == "threads":
            return ThreadSession(assignment, tensors, data, resume=snapshot)
        if self.pool is None:
            self.watcher.on_stage("starting workers")
            self.pool = self._meet(self.cluster.ids if self._may_change else assignment.plan.devices)
        return ProcessSession(self.pool, assignment, tensors, data, resume=snapshot)

    @property
    def _may_change(self) -> bool:
        """Whether the run may go over to other plans, on other devices."""
        return self.options.adapt or self.options.tries > 1

    @property
    def _emulates(self) -> bool:
        """Whether spanwise slows and paces by itself: not where a lab does it."""
        return self.cluster.emulation is not None and self.options.lab is None

    @property
    def _sparse(self) -> bool:
        """Whether devices will train a part of their layers, as far as it is known before there is a plan."""
        plan = self.options.plan
        return plan.sparse if plan is not None else needs_scores(self.options.strategy)

    def _meet(self, devices: tuple[str, ...]) -> WorkerPool:
        options = self.options
        if options.lab is not None:
            return meet_in_lab(
                options.lab, devices, options.join_timeout_s, self.watcher.on_meeting,
                huge_pages=self._sparse,
            )  # fmt: skip
        placed = [d for d in devices if self.cluster.device(d).address is not None]
        if placed and options.spawn and self.cluster.emulation is None:
            raise InputError(
                f"cluster '{self.cluster.name}': device '{placed[0]}' has an address, so its worker is "
                "started there by hand; give train --listen HOST:PORT, or remove the addresses"
            )
        meeting = Meeting(
            options.listen[0], options.listen[1], options.token, options.spawn, options.join_timeout_s,
            huge_pages=self._sparse,
        )  # fmt: skip
        return WorkerPool(
            self.cluster, devices, meeting, emulate=self._emulates, on_listen=self.watcher.on_meeting
        )

    def _write_inputs(self, assignment: Assignment, times: Profile, predicted: Timeline) -> None:
        folder = self.folder
        self.job.save(folder.job)
        self.cluster.save(folder.cluster)
        assignment.graph.save(folder.graph)
        write_whole(folder.ops, assignment.ops.to_json() + "\n")
        self._write_plan(assignment, times, predicted)
        folder.write_json(folder.env, environment())

    def _write_plan(self, assignment: Assignment, times: Profile, predicted: Timeline) -> None:
        folder = self.folder
        times.save(folder.profile)
        assignment.plan.save(folder.plan)
        write_whole(folder.program, str(assignment.program))
        predicted.save(folder.simulated)

    def _summary(
        self, assignment: Assignment, predicted: Timeline, measured: Timeline, trained: Trained,
        seconds: float,
    ) -> dict[str, Any]:  # fmt: skip
        batch = assignment.plan.batch
        step_s = measured.step_time_s
        score = trained.score
        return {
            "strategy": assignment.plan.strategy,
            "devices_used": list(assignment.plan.devices),
            "steps": trained.steps_done,
            "seconds": seconds,
            "step_time_s": step_s,
            "throughput_samples_per_s": batch / step_s if step_s else 0.0,
            "loss": trained.reports[-1].loss if trained.reports else None,
            "test_loss": score.loss if score else None,
            "accuracy": score.accuracy if score else None,
            "adaptations": [r.to_data() for r in self.steering.records] if self.steering else [],
            **summarize(predicted, measured),
        }


def environment() -> dict[str, Any]:
    """Versions, cores, memory: what a number needs beside it."""
    return {
        "spanwise": spanwise.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "command": " ".join(Path(arg).name if i == 0 else arg for i, arg in enumerate(sys.argv)),
    }


__all__ = ["Outcome", "Quiet", "TrainOptions", "Watcher", "environment", "run_job"]
