"""Loss and accuracy of the whole model on held-out rows, on the coordinator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spanwise.core.model import ModelGraph
from spanwise.runtime.feed import Rows, cast, read_rows

_ROWS = 256


@dataclass(frozen=True)
class Score:
    """Mean loss per row, and the share of rows (or tokens) whose largest output is the label.

    ``accuracy`` is None where outputs and labels do not compare like that.
    """

    loss: float
    accuracy: float | None


def evaluate(model: nn.Module, loss: Callable[[Any, Any], Tensor], data: Rows, graph: ModelGraph) -> Score:
    """Evaluates in eval mode without gradients; the model's mode is restored."""
    training = model.training
    model.eval()
    total, right, counted = 0.0, 0, 0
    try:
        with torch.inference_mode():
            for start in range(0, len(data), _ROWS):
                indices = torch.arange(start, min(start + _ROWS, len(data)))
                inputs, labels = read_rows(data, indices)
                inputs, labels = cast(inputs, graph.inputs), cast(labels, graph.labels)
                outputs = model(*inputs)
                target: Any = labels[0] if len(labels) == 1 else labels
                total += float(loss(outputs, target)) * len(indices)
                hits = _hits(outputs, labels)
                if hits is not None:
                    right, counted = right + hits[0], counted + hits[1]
    finally:
        model.train(training)
    return Score(total / len(data), right / counted if counted else None)


def _hits(outputs: Any, labels: tuple[Tensor, ...]) -> tuple[int, int] | None:
    if not isinstance(outputs, Tensor) or len(labels) != 1 or labels[0].is_floating_point():
        return None
    guess = outputs.argmax(-1)
    if guess.shape != labels[0].shape:
        return None
    return int((guess == labels[0]).sum()), guess.numel()
