"""A session: all devices of a plan, ready to step. Threads and processes look the same from here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from spanwise.core.errors import SpanwiseError
from spanwise.runtime.device_run import Assignment, Snapshot


@dataclass(frozen=True)
class StepReport:
    """One finished step: the mean loss over the global batch, and when its last device was done.

    Times are ``time.monotonic`` seconds of the coordinator.
    """

    step: int
    loss: float
    start: float
    end: float


@dataclass(frozen=True)
class DeviceSpans:
    """Recorded spans of one device: per step (step, start, end, busy seconds, spans); see Recorder."""

    device: str
    steps: tuple[tuple[int, float, float, float, tuple[tuple[str, str, str, float, float], ...]], ...]
    peak_bytes: int


class Session(Protocol):
    """Devices that hold a plan's parts."""

    def run(self, first: int, count: int) -> Iterator[StepReport]:
        """Runs steps and yields each as its last device ends it; raises what went wrong, for all devices."""
        ...

    def snapshot(self) -> Snapshot:
        """All state after the last step."""
        ...

    def spans(self) -> tuple[DeviceSpans, ...]:
        """What the devices recorded of the last steps."""
        ...

    def fail(self, error: SpanwiseError) -> None:
        """Ends the run on all devices, with this as the reason."""
        ...

    def close(self) -> None:
        """Ends all devices."""
        ...


class StepGatherer:
    """Turns reports of single devices into StepReports."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        self._devices = devices
        self._open: dict[int, dict[str, tuple[float, float, float]]] = {}

    def add(self, device: str, step: int, loss: float, start: float, end: float) -> StepReport | None:
        """The StepReport once the last device has reported; losses are added in device order."""
        found = self._open.setdefault(step, {})
        found[device] = (loss, start, end)
        if len(found) < len(self._devices):
            return None
        del self._open[step]
        values = [found[name] for name in self._devices]
        total = math.fsum(loss for loss, _, _ in values)
        return StepReport(step, total, min(s for _, s, _ in values), max(e for _, _, e in values))


def merge_states(assignment: Assignment, states: Mapping[str, Snapshot]) -> Snapshot:
    """One Snapshot of all devices'.

    Parameters and optimizer state are equal on all holders, so the first one's is taken. Running
    statistics differ, as each replica has seen its own rows: they are averaged by rows.
    """
    merged = Snapshot()
    for device, names in assignment.program.owned.items():
        if device not in states:
            continue
        state = states[device]
        for name in names:
            merged.parameters[name] = state.parameters[name]
        wanted = set(names)
        merged.optimizer |= {k: v for k, v in state.optimizer.items() if k.partition("::")[0] in wanted}
        merged.options = merged.options or state.options
        merged.scheduler = merged.scheduler or state.scheduler
    for name, weights in _buffer_weights(assignment).items():
        values = [(states[device].buffers[name], rows) for device, rows in weights]
        merged.buffers[name] = _mean(values)
    return merged


def _buffer_weights(assignment: Assignment) -> dict[str, list[tuple[str, int]]]:
    out: dict[str, list[tuple[str, int]]] = {}
    for stage in assignment.plan.stages:
        for layer in assignment.graph.layers[stage.start : stage.stop]:
            for name in layer.buffers:
                if name not in out:
                    out[name] = [(replica.device, replica.rows) for replica in stage.replicas]
    return out


def _mean(values: list[tuple[Tensor, int]]) -> Tensor:
    first = values[0][0]
    if len(values) == 1 or not first.is_floating_point():
        return first
    total = sum(rows for _, rows in values)
    mean = sum((value.double() * (rows / total) for value, rows in values), start=first.double() * 0)
    return mean.to(first.dtype)
