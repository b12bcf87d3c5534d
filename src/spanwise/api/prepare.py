"""From a job to live objects: model, loss, data, and the traced graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spanwise.core.errors import InputError
from spanwise.core.job import Job
from spanwise.profiler.trace import Traced, trace
from spanwise.runtime.feed import Rows, read_rows
from spanwise.runtime.imports import build, data_sets, load_loss
from spanwise.runtime.optimize import check_recipes

_SAMPLE_ROWS = 4  # enough to see which dimension is the batch and whether the loss is a mean over rows


@dataclass(frozen=True)
class Prepared:
    """A job's objects. ``traced`` shares its tensors with ``model``."""

    job: Job
    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    train: Rows
    test: Rows | None
    traced: Traced

    def sample(self, rows: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Inputs and labels of that many rows, repeated if there are fewer."""
        return _sample(self.train, self.job, rows)


def prepare(job: Job) -> Prepared:
    """Builds what the job names and traces it. The seed of the job makes the weights the same each time."""
    check_recipes(job)
    loss = load_loss(job.loss)
    torch.manual_seed(job.seed)  # pyright: ignore[reportUnknownMemberType]
    model = build(job.model.name, job.model.args, "model")
    if not isinstance(model, nn.Module):
        raise InputError(f"job: model '{job.model.name}' gave {type(model).__name__}, not an nn.Module")
    train, test = data_sets(build(job.data.name, job.data.args, "data"))
    return _prepared(job, model, loss, train, test)


def prepare_live(
    job: Job, model: nn.Module, loss: Callable[[Any, Any], Tensor], dataset: Any, test: Any
) -> Prepared:
    """The same for objects at hand. The model's dtype is the job's."""
    check_recipes(job)
    floating = [p.dtype for p in model.parameters() if p.is_floating_point()]
    if floating:
        job = job.model_copy(update={"dtype": str(floating[0]).removeprefix("torch.")})
    return _prepared(job, model, loss, dataset, test)


def _prepared(
    job: Job, model: nn.Module, loss: Callable[[Any, Any], Tensor], train: Any, test: Any
) -> Prepared:
    if len(train) < 1:
        raise InputError("data: the training set is empty; give at least one batch of rows")
    if len(train) < job.batch:
        raise InputError(
            f"data: the training set has {len(train)} rows, fewer than one batch of {job.batch}; "
            "lower 'batch' or give more data"
        )
    model.to(getattr(torch, job.dtype)).train()
    return Prepared(job, model, loss, train, test, _trace(job, model, loss, train))


def _trace(job: Job, model: nn.Module, loss: Callable[[Any, Any], Tensor], train: Rows) -> Traced:
    inputs, labels = _sample(train, job, _SAMPLE_ROWS)
    return trace(model, loss, inputs, labels, name=type(model).__name__)


def _sample(train: Rows, job: Job, rows: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    inputs, labels = read_rows(train, torch.arange(rows) % len(train))
    dtype = getattr(torch, job.dtype)

    def fit(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)

    return fit(inputs), fit(labels)
