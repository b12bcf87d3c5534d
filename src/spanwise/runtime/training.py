"""The training loop over a session: epochs, evaluation, checkpoints, metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spanwise.core.errors import TrainingError
from spanwise.core.profile import Profile
from spanwise.core.run_folder import RunFolder
from spanwise.runtime.checkpoint import Checkpoint, save_checkpoint, save_weights
from spanwise.runtime.device_run import Assignment, Snapshot
from spanwise.runtime.evaluate import Score, evaluate
from spanwise.runtime.feed import Rows
from spanwise.runtime.measure import step_times
from spanwise.runtime.session import Guide, Session, StepReport, Switched


class Progress(Protocol):
    """What a run tells while it goes on."""

    def on_step(self, report: StepReport, step_time_s: float, total_steps: int) -> None:
        """A step is done."""
        ...

    def on_epoch(self, epoch: int, score: Score | None, loss: float) -> None:
        """An epoch is done; ``loss`` is the mean training loss in it."""
        ...


class Silent:
    """Tells nothing."""

    def on_step(self, report: StepReport, step_time_s: float, total_steps: int) -> None:
        """Nothing."""

    def on_epoch(self, epoch: int, score: Score | None, loss: float) -> None:
        """Nothing."""


class Steering(Guide, Protocol):
    """Watches a run and may change its plan between two steps."""

    def observe(self, report: StepReport, step_time_s: float) -> None:
        """A step is done."""
        ...

    def next_assignment(self) -> Assignment | None:
        """What to go over to now, if anything; the run stands at a step boundary."""
        ...

    @property
    def profile(self) -> Profile:
        """The numbers believed now: state moves over links as they are."""
        ...

    def switched(self, assignment: Assignment, step: int, cost: Switched) -> None:
        """The run goes on under this plan from ``step`` on."""
        ...


@dataclass(frozen=True)
class Trained:
    """What a run has come to. ``assignment`` is that of the last plan, which ran from step ``since``."""

    reports: tuple[StepReport, ...]
    score: Score | None
    steps_done: int
    assignment: Assignment
    since: int


@dataclass(frozen=True)
class Evaluation:
    """The original model and what it is scored by."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    data: Rows | None


def total_steps(assignment: Assignment) -> int:
    """Steps of the whole job: epochs or ``steps``, whichever ends first; one epoch if neither is set."""
    job, per_epoch = assignment.job, assignment.sampler.steps_per_epoch
    limits = [job.steps] if job.steps is not None else []
    if job.epochs is not None or not limits:
        limits.append((job.epochs or 1) * per_epoch)
    return min(limits)


def train(
    session: Session,
    assignment: Assignment,
    evaluation: Evaluation,
    folder: RunFolder,
    *,
    start: int = 0,
    progress: Progress | None = None,
    steering: Steering | None = None,
) -> Trained:
    """Runs the job from step ``start`` to its end and leaves the trained weights in model and folder.

    ``steering`` may put other plans in place of the one that it begins with.

    Raises:
        TrainingError: the loss is not finite; the last good checkpoint stays.
        PeerError: a device was lost.
    """
    progress = progress or Silent()
    per_epoch, last = assignment.sampler.steps_per_epoch, total_steps(assignment)
    every = assignment.job.checkpoint_every
    reports: list[StepReport] = []
    score: Score | None = None
    step = since = start
    while step < last:
        stop = min(last, _next(step, per_epoch), _next(step, every) if every else last)
        for report in session.run(step, stop - step, steering):
            _check_finite(session, report, folder)
            reports.append(report)
            seconds = step_times(reports[-2:], skip=0)[-1]
            _log_step(folder, assignment, report, seconds)
            progress.on_step(report, seconds, last)
            if steering is not None:
                steering.observe(report, seconds)
        step = reports[-1].step + 1
        changed = None if steering is None or step == last else steering.next_assignment()
        if steering is not None and changed is not None:
            steering.switched(changed, step, session.switch(changed, steering.profile.links))
            assignment, since = changed, step
        if step < stop:
            continue
        at_epoch, at_end = step % per_epoch == 0, step == last
        snapshot = session.snapshot()
        if at_end or (every and step % every == 0):
            digest = assignment.graph.source_digest
            save_checkpoint(folder.checkpoints, Checkpoint(step, digest, snapshot))
        if at_epoch or at_end:
            load_into(evaluation.model, snapshot)
            score = _score(evaluation, assignment, folder, reports, step, progress)
    if last > start:
        save_weights(folder.weights, dict(evaluation.model.state_dict()))
    return Trained(tuple(reports), score, max(last - start, 0), assignment, since)


def load_into(model: nn.Module, snapshot: Snapshot) -> None:
    """Copies parameters and buffers into the original model by its own names; tied ones once."""
    own: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in (snapshot.parameters | snapshot.buffers).items():
            own[name].copy_(tensor)


def _next(step: int, period: int) -> int:
    return (step // period + 1) * period


def _check_finite(session: Session, report: StepReport, folder: RunFolder) -> None:
    if math.isfinite(report.loss):
        return
    error = TrainingError(
        f"loss is {report.loss} at step {report.step}; the last good checkpoint is kept in "
        f"{folder.checkpoints}; lower the learning rate or set clip_norm, then use --resume"
    )
    session.fail(error)
    raise error


def _log_step(folder: RunFolder, assignment: Assignment, report: StepReport, seconds: float) -> None:
    folder.append_metric(
        {
            "event": "step",
            "step": report.step,
            "loss": report.loss,
            "step_time_s": seconds,
            "samples_per_s": assignment.plan.batch / seconds if seconds else 0.0,
        }
    )


def _score(
    evaluation: Evaluation,
    assignment: Assignment,
    folder: RunFolder,
    reports: list[StepReport],
    step: int,
    progress: Progress,
) -> Score | None:
    per_epoch = assignment.sampler.steps_per_epoch
    epoch = (step - 1) // per_epoch
    losses = [r.loss for r in reports if r.step // per_epoch == epoch]
    mean = math.fsum(losses) / len(losses) if losses else 0.0
    score = None
    if evaluation.data is not None:
        score = evaluate(evaluation.model, evaluation.loss, evaluation.data, assignment.graph)
    folder.append_metric(
        {
            "event": "epoch",
            "epoch": epoch,
            "step": step,
            "loss": mean,
            "test_loss": score.loss if score else None,
            "accuracy": score.accuracy if score else None,
        }
    )
    progress.on_epoch(epoch, score, mean)
    return score
