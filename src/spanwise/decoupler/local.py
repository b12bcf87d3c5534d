"""Training sub-models where they are: a plain loop, shared layers averaged in rounds, and a fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from spanwise.core.decoupling import Decoupling, Loss
from spanwise.core.errors import InputError, TrainingError
from spanwise.core.job import Job
from spanwise.decoupler.build import COUNT, tensors_of
from spanwise.decoupler.merge import Merged
from spanwise.decoupler.rows import own_class_bce, tensors
from spanwise.runtime.feed import Rows, Sampler, read_rows
from spanwise.runtime.optimize import make_optimizer, make_scheduler

LossFunction = Callable[[Any, Any], Tensor]

_ROWS = 256


def loss_of(loss: Loss) -> LossFunction:
    """The loss that a sub-model is trained by."""
    return F.cross_entropy if loss == "softmax" else own_class_bce


class Fit:
    """A model in training, with its optimizer; goes on where it stopped.

    Rows come in the order that the runtime reads them in for one device and one micro-batch, under the job's
    seed; a rest that does not fill a batch is left out of its epoch.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, data: Rows, job: Job) -> None:
        self.model, self.loss, self.data, self.job = model, loss, data, job
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(trained.values())
        self.optimizer = make_optimizer(job.optimizer, trained)
        self.scheduler = make_scheduler(job.scheduler, self.optimizer)
        self.batch = min(job.batch, len(data))
        self.sampler = Sampler(job.seed, (len(data),), (self.batch,), 1)
        self.step = 0

    @property
    def epochs(self) -> int:
        """As many as the job wants; one if it does not say."""
        return self.job.epochs or 1

    def run(self, epochs: int | None = None) -> list[float]:
        """Trains; the mean loss of each epoch.

        Raises:
            TrainingError: the loss is not finite.
        """
        self.model.train()
        return [self._epoch() for _ in range(self.epochs if epochs is None else epochs)]

    def _epoch(self) -> float:
        steps = self.sampler.steps_per_epoch
        losses = [self._step() for _ in range(steps)]
        if self.scheduler is not None and self.job.scheduler_every == "epoch":
            self.scheduler.step()
        return math.fsum(losses) / steps

    def _step(self) -> float:
        inputs, labels = read_rows(self.data, self.sampler.indices(0, self.step)[0])
        self.optimizer.zero_grad()
        loss = self.loss(self.model(*inputs), labels[0])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"loss is {value} at step {self.step}; lower the learning rate or set clip_norm"
            )
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        if self.job.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.job.clip_norm)
        self.optimizer.step()
        if self.scheduler is not None and self.job.scheduler_every == "step":
            self.scheduler.step()
        self.step += 1
        return value


@dataclass(frozen=True)
class Averaging:
    """What averaging shared layers took: rounds, and bytes that each sub-model sent and received."""

    rounds: int
    sent_bytes: int
    received_bytes: int


def fit_with_averages(
    fits: Mapping[int, Fit], decoupling: Decoupling, *, every: int = 1
) -> tuple[dict[int, list[float]], Averaging]:
    """Trains sub-models whose shared first layers are averaged by rows every few epochs.

    The idea is Fed2's (Yu et al., "Fed2: Feature-Aligned Federated Learning", arXiv 2111.14248; from a
    secondary source); the division of the other layers is not.
    """
    losses: dict[int, list[float]] = {group: [] for group in fits}
    done = rounds = sent = 0
    total = max(fit.epochs for fit in fits.values())
    average_shared({g: fit.model for g, fit in fits.items()}, decoupling)
    while done < total:
        epochs = min(every, total - done)
        for group, fit in fits.items():
            losses[group] += fit.run(epochs)
        weights = [len(fit.data) for fit in fits.values()]
        sent += average_shared({g: fit.model for g, fit in fits.items()}, decoupling, weights)
        done, rounds = done + epochs, rounds + 1
    return losses, Averaging(rounds, sent, sent)


def average_shared(
    models: Mapping[int, nn.Module], decoupling: Decoupling, weights: Sequence[float] | None = None
) -> int:
    """Puts the weighted mean of the shared layers into all sub-models; bytes of these layers."""
    given = list(weights) if weights is not None else [1.0] * len(models)
    total, nbytes = sum(given), 0
    states = [model.state_dict() for model in models.values()]
    for layer in (layer for layer in decoupling.net.layers if layer.whole):
        for key, first in tensors_of(states[0], layer):
            name = f"{layer.name}.{key}"
            nbytes += first.numel() * first.element_size()
            if key == COUNT:
                continue
            mean = sum(
                (state[name].double() * (w / total) for state, w in zip(states, given, strict=True)),
                torch.zeros((), dtype=torch.float64),
            ).to(first.dtype)
            for state in states:
                state[name].copy_(mean)
    return nbytes


def finetune(merged: Merged, data: Rows, job: Job) -> list[float]:
    """Trains the merged network whole, so that weights between sub-models grow from zero; a step of its own.

    Afterwards it is a dense network like any other, and no longer the sub-models. Rows of classes whose
    sub-model is missing are left out. The mean loss of each epoch.

    Raises:
        InputError: the merged network has no weights between sub-models, as it is not of the form ``dense``.
    """
    if merged.form != "dense":
        raise InputError(
            f"decoupling: form '{merged.form}' has no weights between sub-models to tune; merge as 'dense'"
        )
    x, y = tensors(data)
    known = ~torch.isin(y, torch.tensor(merged.missing, dtype=torch.int64))
    losses = Fit(merged.module, F.cross_entropy, TensorDataset(x[known], y[known]), job).run()
    merged.module.eval()
    return losses


def predict(model: nn.Module, samples: Tensor) -> Tensor:
    """Scores in evaluation mode, without gradients; the model's mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            starts = range(0, len(samples), _ROWS)
            return torch.cat([model(samples[start : start + _ROWS]) for start in starts])
    finally:
        model.train(training)


def accuracy(model: nn.Module, data: Rows) -> float:
    """Share of rows whose greatest score is that of their class."""
    x, y = tensors(data)
    return float((predict(model, x).argmax(1) == y).double().mean())


def class_profiles(model: nn.Module, head: str, data: Rows, classes: int) -> NDArray[np.float64]:
    """``[class, feature]`` mean input of the head for every class, by which classes can be clustered."""
    x, y = tensors(data)
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    handle = model.get_submodule(head).register_forward_pre_hook(keep)
    try:
        predict(model, x)
    finally:
        handle.remove()
    features = torch.cat(seen).double()
    means = [features[y == k].mean(0) if bool((y == k).any()) else features.mean(0) for k in range(classes)]
    return torch.stack(means).cpu().numpy()
