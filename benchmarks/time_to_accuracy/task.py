"""The task that every system trains: model, rows, optimizer, one pass over rows, evaluation, and the clock.

A task is a folder: ``task.json``, ``test.pt`` and one ``rows-I.pt`` for each device, all written by
``run.py`` before anything starts. DDP ranks and Flower's apps import this file; spanwise is handed the same
numbers as a job. Nothing here knows which system is training.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spanwise.ops.allocator import keep_freed_memory

Rows = tuple[Tensor, Tensor]  # inputs and labels
POLL_S = 0.02
SET_UP_S = 240.0
EVALUATION_ROWS = 256


@dataclass(frozen=True)
class Task:
    """What is trained and when it is over.

    Attributes:
        model: factory and its arguments, as in a job file.
        optimizer: class of ``torch.optim`` and its arguments.
        devices: in the order of the cluster file; device i holds rows i, i + n, i + 2n, ...
        rows_a_step: rows of one optimizer step on one DDP rank; spanwise's batch is that times the devices.
        local_batch: rows of one optimizer step of a Flower client.
        local_epochs: passes of a Flower client over its rows in one round.
        target: test accuracy, as a share.
        limit_s: seconds of training after which a run counts as not having reached the target.
        passes: most epochs or rounds.
    """

    folder: Path
    model: dict[str, Any]
    optimizer: dict[str, Any]
    clip_norm: float
    seed: int
    devices: tuple[str, ...]
    rows_a_step: int
    local_batch: int
    local_epochs: int
    target: float
    limit_s: float
    passes: int

    def save(self) -> None:
        """Writes ``task.json``."""
        data = {k: v for k, v in asdict(self).items() if k != "folder"}
        (self.folder / "task.json").write_text(json.dumps(data), encoding="utf-8")

    @staticmethod
    def load(folder: str | Path) -> Task:
        """The task of a folder."""
        data = json.loads((Path(folder) / "task.json").read_text(encoding="utf-8"))
        return Task(folder=Path(folder), **data | {"devices": tuple(data["devices"])})

    def build_model(self) -> nn.Module:
        """The model with the weights that the seed gives: the same in every system."""
        arguments = dict(self.model)
        module, _, factory = arguments.pop("name").partition(":")
        torch.manual_seed(self.seed)
        return getattr(importlib.import_module(module), factory)(**arguments)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimizer."""
        arguments = dict(self.optimizer)
        return getattr(torch.optim, arguments.pop("name"))(model.parameters(), **arguments)

    def rows(self, device: int) -> Rows:
        """The training rows that a device holds."""
        return torch.load(self.folder / f"rows-{device}.pt", weights_only=True)

    def test_rows(self) -> Rows:
        """The test set."""
        return torch.load(self.folder / "test.pt", weights_only=True)

    def order(self, count: int, device: int, epoch: int) -> Tensor:
        """A permutation of a device's rows, another one each epoch."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 1009 + device)
        return torch.randperm(count, generator=generator)


def set_up_process() -> None:
    """One thread and glibc's allocator told to keep freed memory, as in spanwise's workers."""
    torch.set_num_threads(1)
    keep_freed_memory()


def train_pass(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, rows: Rows, order: Tensor, *, batch: int,
    steps: int,
) -> float:  # fmt: skip
    """One pass over rows in the given order; returns the mean loss. ``model`` may be wrapped by DDP."""
    x, y = rows
    model.train()
    losses: list[float] = []
    for step in range(steps):
        chosen = order[step * batch : (step + 1) * batch]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), task.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return math.fsum(losses) / len(losses)


def warm_up(task: Task, rows: Rows, batch: int) -> None:
    """Two steps on a copy that is thrown away: a first step sets up kernels, which is not training."""
    state = torch.random.get_rng_state()
    model = task.build_model()
    order = torch.arange(len(rows[1])).repeat(2)
    train_pass(model, task.build_optimizer(model), task, rows, order, batch=batch, steps=2)
    torch.random.set_rng_state(state)


def evaluate(model: nn.Module, test: Rows) -> tuple[float, float]:
    """Accuracy and mean loss on the test set, in evaluation mode; the model's mode is put back."""
    x, y = test
    training = model.training
    model.eval()
    right, total = 0, 0.0
    with torch.inference_mode():
        for at in range(0, len(y), EVALUATION_ROWS):
            outputs, labels = model(x[at : at + EVALUATION_ROWS]), y[at : at + EVALUATION_ROWS]
            total += nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
            right += int((outputs.argmax(1) == labels).sum())
    model.train(training)
    return right / len(y), total / len(y)


@dataclass
class Curve:
    """Test accuracy against seconds of training. The clock stands while anything is evaluated."""

    path: Path
    target: float
    limit_s: float
    passes: int
    points: list[dict[str, Any]] = field(default_factory=list)
    trained_s: float = 0.0
    _since: float | None = None

    @classmethod
    def of(cls, task: Task) -> Curve:
        """An empty curve, kept as ``curve.json`` in the task's folder."""
        return cls(task.folder / "curve.json", task.target, task.limit_s, task.passes)

    def start(self) -> None:
        """Training goes on from now."""
        self._since = time.monotonic()

    def stop(self, at: float | None = None) -> None:
        """Training stands still since now, or since ``at`` on the monotonic clock."""
        if self._since is not None:
            self.trained_s += (time.monotonic() if at is None else at) - self._since
        self._since = None

    def add(self, accuracy: float, loss: float, **more: Any) -> bool:
        """One evaluation after the pass that has just ended; returns whether the run is over."""
        self.points.append(
            {
                "pass": len(self.points) + 1,
                "seconds": round(self.trained_s, 4),
                "accuracy": accuracy,
                "loss": loss,
            }
            | more
        )
        reached = next((p for p in self.points if p["accuracy"] >= self.target), None)
        over = reached is not None or self.trained_s >= self.limit_s or len(self.points) >= self.passes
        write(self.path, {"over": over, "reached": reached, "points": self.points})
        return over


def write(path: Path, data: dict[str, Any]) -> None:
    """A whole file or none."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data), encoding="utf-8")
    os.replace(part, path)


def meet(task: Task, name: str) -> None:
    """Says that this process is ready and waits until ``run.py`` lets all go.

    Raises:
        TimeoutError: nobody let it go within ``SET_UP_S``.
    """
    (task.folder / f"ready-{name}").touch()
    end = time.monotonic() + SET_UP_S
    while not (task.folder / "go").exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{name}: no 'go' within {SET_UP_S:g} s of being ready")
        time.sleep(POLL_S)


def process_age_s() -> float:
    """Seconds since this process was started, by Linux."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    up_s = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    return up_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")
