"""What each sub-model learns from: its own classes, foreign ones as "other", and labels by class id."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from spanwise.core.decoupling import Decoupling
from spanwise.core.errors import InputError
from spanwise.runtime.feed import Rows, read_rows


def tensors(data: Rows) -> tuple[Tensor, Tensor]:
    """All rows of a classification data set: samples (rows, ...) and labels (rows,) int64."""
    inputs, labels = read_rows(data, torch.arange(len(data)))
    if len(inputs) != 1 or len(labels) != 1 or labels[0].dim() != 1 or labels[0].is_floating_point():
        raise InputError("decoupling: a row of the data must be one sample and one class number")
    return inputs[0], labels[0].long()


def class_counts(labels: Tensor, classes: int) -> tuple[int, ...]:
    """Rows of every class; ``InputError`` if there are other labels."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"decoupling: labels from {int(labels.min())} to {int(labels.max())}, the model has {classes} "
            "outputs; labels must be class numbers from 0"
        )
    return tuple(int(n) for n in torch.bincount(labels, minlength=classes))


def group_rows(
    data: Rows, decoupling: Decoupling, group: int, *, public: Rows | None = None, seed: int = 0
) -> TensorDataset:
    """The training set of one sub-model.

    Args:
        data: of all classes. In a deployment every device has its part of it, and what the policy sends.
        decoupling: whose groups, negatives and loss.
        group: which sub-model.
        public: samples and class numbers that everybody may see, for the policy ``public``.
        seed: of the rows that go into a pool.

    Returns:
        Samples, and labels by :func:`relabel`.

    Raises:
        InputError: there is no sample of an own class, or ``public`` is missing or not wanted.
    """
    x, y = tensors(data)
    counts = class_counts(y, decoupling.net.classes)
    own_classes = decoupling.groups[group].classes
    empty = [str(k) for k in own_classes if not counts[k]]
    if empty:
        raise InputError(
            f"decoupling: no sample of class {', '.join(empty)} for sub-model {group}; give some"
        )
    own = torch.isin(y, torch.tensor(own_classes)).nonzero()[:, 0]
    px, py = _foreign(x, y, decoupling, own_classes, public, seed)
    times = decoupling.negatives.repeats(len(own), len(own_classes), len(py))
    samples = torch.cat([x[own], *[px] * times])
    labels = torch.cat([y[own], *[py] * times])
    return TensorDataset(samples, relabel(labels, decoupling, group))


def _foreign(
    x: Tensor, y: Tensor, decoupling: Decoupling, own: tuple[int, ...], public: Rows | None, seed: int
) -> tuple[Tensor, Tensor]:
    policy = decoupling.negatives.policy
    if (public is None) == (policy == "public"):
        raise InputError(
            "decoupling: negatives 'public' need a public data set"
            if public is None
            else f"decoupling: negatives '{policy}' use no public data set; leave it out or choose 'public'"
        )
    if public is not None:
        x, y = tensors(public)
        class_counts(y, decoupling.net.classes)
    if policy == "none":
        return x[:0], y[:0]
    foreign = ~torch.isin(y, torch.tensor(own))
    if policy == "pool":
        foreign &= pool(y, decoupling.negatives.per_class, seed)
    return x[foreign], y[foreign]


def pool(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """``[row]`` whether it is among the rows that are sent to everybody; the same for all sub-models."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for k in range(int(labels.max()) + 1 if len(labels) else 0):
        rows = torch.where(labels == k)[0]
        chosen[rows[torch.randperm(len(rows), generator=generator)[:per_class]]] = True
    return chosen


def relabel(labels: Tensor, decoupling: Decoupling, group: int) -> Tensor:
    """Class numbers to those of a sub-model: own classes in its order from 1, foreign ones 0.

    Without an output "other", under softmax, own classes count from 0.
    """
    first = 1 if decoupling.other or decoupling.loss == "sigmoid" else 0
    table = torch.zeros(decoupling.net.classes, dtype=torch.int64)
    for place, k in enumerate(decoupling.groups[group].classes):
        table[k] = place + first
    return table[labels]


def own_class_bce(outputs: Tensor, labels: Any) -> Tensor:
    """Binary cross-entropy of every own class, summed over classes, the mean over rows.

    Args:
        outputs: (rows, classes) logits.
        labels: (rows,) 0 for none of them, else the output's number from 1.
    """
    wanted = F.one_hot(labels, outputs.shape[1] + 1)[:, 1:].to(outputs.dtype)
    summed = F.binary_cross_entropy_with_logits(outputs, wanted, reduction="sum")
    return summed / len(outputs)
