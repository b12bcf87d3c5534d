"""A session: all devices of a plan, ready to step. Threads and processes look the same from here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from spanwise.core.errors import SpanwiseError
from spanwise.core.observed import DeviceStep
from spanwise.core.profile import LinkTimes, StageTimes
from spanwise.lowering import buffer_holders
from spanwise.runtime.device_run import Assignment, Snapshot
from spanwise.runtime.migrate import mean_by_rows
from spanwise.runtime.trained import merged_parameters


@dataclass(frozen=True)
class StepReport:
    """One finished step: the mean loss over the global batch, and when its last device was done.

    Times are ``time.monotonic`` seconds of the coordinator. ``observed`` is empty unless the Assignment asks
    for it.
    """

    step: int
    loss: float
    start: float
    end: float
    observed: tuple[DeviceStep, ...] = ()


@dataclass(frozen=True)
class Switched:
    """What changing to another plan took: bytes between devices, seconds until all were ready to go on.

    ``calibration_s`` is what the portable emulation needed besides, to time the new stages undisturbed.
    """

    moved_bytes: int
    seconds: float
    calibration_s: float = 0.0


@dataclass(frozen=True)
class Probe:
    """A link to be measured between two steps, by messages of these sizes there and a byte back."""

    source: str
    target: str
    sizes: tuple[int, ...]


class Guide(Protocol):
    """Who follows a run: may halt it between two steps, and ask for links to be measured."""

    def wants_halt(self) -> bool:
        """Whether steps that devices do not know of yet should not be begun."""
        ...

    def wanted_probes(self) -> tuple[Probe, ...]:
        """Links to measure, each as soon as its two devices have ended the steps that they know of."""
        ...

    def hesitates_s(self) -> float:
        """For how long no further steps should be begun, as the answer to a probe may change the plan."""
        ...

    def probed(self, probe: Probe, samples: tuple[tuple[int, float], ...]) -> None:
        """(bytes, round-trip seconds) of a probe."""
        ...


@dataclass(frozen=True)
class DeviceSpans:
    """Recorded spans of one device: per step (step, start, end, busy seconds, spans); see Recorder."""

    device: str
    steps: tuple[tuple[int, float, float, float, tuple[tuple[str, str, str, float, float], ...]], ...]
    peak_bytes: int


class Session(Protocol):
    """Devices that hold a plan's parts."""

    def run(self, first: int, count: int, guide: Guide | None = None) -> Iterator[StepReport]:
        """Runs steps and yields each as its last device ends it; raises what went wrong, for all devices.

        With a ``guide``, devices know of a few steps at a time only. It is asked after every report; once it
        wants a halt, the steps they know of are run to their end, and no others.
        """
        ...

    def stage_times(self) -> tuple[StageTimes, ...]:
        """Before any step: each device times its stages, one device after the other."""
        ...

    def switch(self, assignment: Assignment, links: Sequence[LinkTimes] = ()) -> Switched:
        """Goes on under another plan of the same job, between two runs; see ``runtime.migrate``."""
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
        self._open: dict[int, dict[str, StepReport]] = {}

    def add(self, device: str, part: StepReport) -> StepReport | None:
        """The whole once the last device has reported its part; losses are added in device order."""
        found = self._open.setdefault(part.step, {})
        found[device] = part
        if len(found) < len(self._devices):
            return None
        del self._open[part.step]
        parts = [found[name] for name in self._devices]
        return StepReport(
            part.step,
            math.fsum(p.loss for p in parts),
            min(p.start for p in parts),
            max(p.end for p in parts),
            tuple(seen for p in parts for seen in p.observed),
        )


class Horizon:
    """Up to which step devices may go before they hear again; all hear the same.

    Without a ``guide`` that is the last step. With one, they know of as many steps as take ``AHEAD_S`` and of
    two at least: enough that no device ever waits for word, few enough that a halt comes soon.
    """

    AHEAD_S = 0.1
    MOST = 32

    def __init__(self, first: int, count: int, guide: Guide | None) -> None:
        self._last, self._guide = first + count, guide
        self.step = self._last if guide is None else min(self._last, first + 2)

    def held_s(self, report: StepReport | None) -> float:
        """For how long there will be no further step, unless a probe is answered; ``report``: the newest."""
        if self._guide is None or report is None or self.step == self._last:
            return 0.0
        return self._guide.hesitates_s()

    def heard(self, report: StepReport) -> int:
        """Takes a report in; the step to go up to from now on, not included."""
        if self._guide is None:
            return self.step
        if self._guide.wants_halt():
            self._last = self.step
        if self.held_s(report) > 0:
            return self.step
        ahead = min(self.MOST, max(2, math.ceil(self.AHEAD_S / max(report.end - report.start, 1e-6))))
        self.step = max(self.step, min(self._last, report.step + 1 + ahead))
        return self.step


def merge_states(assignment: Assignment, states: Mapping[str, Snapshot]) -> Snapshot:
    """One Snapshot of all devices'.

    Parameters and optimizer state are equal on all holders, so the first one's is taken; of plans whose
    devices train some parameters only each unit comes from a device that trains it. Running statistics
    differ, as each replica has seen its own rows: they are averaged by rows.
    """
    merged = Snapshot()
    plan, program = assignment.plan, assignment.program
    for device, names in program.owned.items():
        if device not in states:
            continue
        state = states[device]
        if not plan.sparse:
            for name in names:
                merged.parameters[name] = state.parameters[name]
            wanted = set(names)
            merged.optimizer |= {k: v for k, v in state.optimizer.items() if k.partition("::")[0] in wanted}
        merged.options = merged.options or state.options
        merged.scheduler = merged.scheduler or state.scheduler
    if plan.sparse:
        merged.parameters, merged.optimizer = merged_parameters(plan, assignment.graph, program, states)
    for name, weights in buffer_holders(assignment.plan, assignment.graph).items():
        if plan.stored_statistics:  # nobody changes them; a mean of equal values may round
            merged.buffers[name] = states[weights[0][0]].buffers[name]
            continue
        merged.buffers[name] = mean_by_rows(
            [(states[device].buffers[name], rows) for device, rows in weights]
        )
    return merged
