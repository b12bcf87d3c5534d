"""torch.export of model and loss in training mode with a dynamic batch, and its failures in one line."""

from __future__ import annotations

import io
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spanwise.core.errors import ExportError

LossFunction = Callable[[Any, Any], Tensor]

# Rows of the trace. Any number above one would do; three is rarely another size of a model.
TRACE_ROWS = 3


@dataclass(frozen=True)
class Sample:
    """A few rows of inputs and labels."""

    inputs: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """Size of the first dimension."""
        return int(self.inputs[0].shape[0])

    def resized(self, rows: int) -> Sample:
        """Exactly ``rows`` rows, repeating from the first; fresh tensors."""
        index = torch.arange(rows) % self.rows
        return Sample(
            tuple(t.detach()[index.to(t.device)].clone() for t in self.inputs),
            tuple(t.detach()[index.to(t.device)].clone() for t in self.labels),
        )


class ModelWithLoss(nn.Module):
    """The module that is exported: ``(loss, *outputs)`` of inputs and labels."""

    def __init__(self, model: nn.Module, loss: LossFunction, inputs: int) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.count = inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Inputs first, then labels."""
        outputs = self.model(*tensors[: self.count])
        loss = self.loss(outputs, loss_target(tensors[self.count :]))
        return (loss, *(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)))


def loss_target(labels: tuple[Tensor, ...]) -> Any:
    """What the loss gets as second argument: the label tensor, or the tuple if there are none or several."""
    return labels[0] if len(labels) == 1 else labels


def check_sample(name: str, sample: Sample) -> None:
    """Refuses samples whose tensors do not share a batch dimension."""
    if not sample.inputs:
        raise ExportError(f"model '{name}': no inputs given; pass at least one tensor of rows")
    for kind, tensors in (("input", sample.inputs), ("label", sample.labels)):
        for index, tensor in enumerate(tensors):
            if tensor.dim() == 0 or tensor.shape[0] != sample.inputs[0].shape[0] or not tensor.shape[0]:
                raise ExportError(
                    f"model '{name}': {kind} {index} has shape {tuple(tensor.shape)}; the first dimension of "
                    f"every input and label must be the rows, here {tuple(sample.inputs[0].shape)[:1]}"
                )


def export(wrapper: ModelWithLoss, sample: Sample, name: str) -> torch.export.ExportedProgram:
    """Traces the wrapper; the caller has put it into training mode.

    Raises:
        ExportError: with the place in the user's code, the reason and the way out, in one line.
    """
    small = sample.resized(TRACE_ROWS)
    tensors = (*small.inputs, *small.labels)
    batch = torch.export.Dim("batch", min=1)
    shapes = (tuple({0: batch} for _ in tensors),)
    try:
        with silence(), fixed_seed():
            return torch.export.export(wrapper, tensors, dynamic_shapes=shapes)
    except ExportError:
        raise
    except Exception as error:  # torch raises whatever the user's forward raises, and many kinds of its own
        raise ExportError(_explain(error, name)) from None


@contextmanager
def fixed_seed() -> Generator[None]:
    """The same random numbers every time, and afterwards the random state as it was."""
    state = torch.random.get_rng_state()
    torch.random.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


@contextmanager
def silence() -> Generator[None]:
    """No warnings, no log lines and no printed graphs of torch: what matters is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def failure(error: Exception, name: str, what: str) -> str:
    """One line: where in the user's code, which error, and what to do."""
    return (
        f"model '{name}': {_place(error)}{what}: {type(error).__name__}: {_first_line(str(error))}; run "
        "loss(model(*inputs), labels) on the sample to see where"
    )


def _explain(error: Exception, name: str) -> str:
    text, kind = str(error), type(error).__name__
    place = _place(error)
    if "data-dependent" in text or "DataDependent" in kind or "unbacked" in text.lower():
        return (
            f"model '{name}': {place}decides by a tensor's values (data-dependent control flow), which "
            "cannot be traced; use torch.where or masking instead of 'if', 'while', .item() or int() on "
            "tensors"
        )
    if "batch" in text and ("specializ" in text or "constraint" in text.lower()):
        return (
            f"model '{name}': {place}fixes the number of rows to a constant, but every micro-batch has "
            "its own; use x.shape[0] or -1 instead of a number for the batch dimension"
        )
    unsupported = re.search(
        r"(?:torch\.ops\.)?(\w+(?:::|\.)\w+)[^.]*(?:not supported|no fake impl|no meta)", text
    )
    if unsupported or "Unsupported" in kind:
        what = f"operation '{unsupported.group(1)}'" if unsupported else "an operation"
        return (
            f"model '{name}': {place}{what} cannot be exported ({_first_line(text)}); replace it by torch "
            "operations"
        )
    return failure(error, name, "fails during export")


def _place(error: Exception) -> str:
    """The last line of the user's own code in the traceback."""
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = frame.filename.replace("\\", "/")
        if _is_own_code(path):
            found = f"{path.rsplit('/', 1)[-1]}, line {frame.lineno} ('{frame.line}') "
    return found


def traced_place(stack: str) -> str:
    """The same from the ``stack_trace`` that torch keeps with every traced operation."""
    found = ""
    for path, line in re.findall(r'File "([^"]+)", line (\d+)', stack):
        if _is_own_code(path):
            found = f"{path.rsplit('/', 1)[-1]}, line {line}: "
    return found


def _is_own_code(path: str) -> bool:
    return not ("/torch/" in path or path.startswith("<") or "/spanwise/profiler/" in path)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"
