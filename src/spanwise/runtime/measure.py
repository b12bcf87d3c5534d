"""Recorded spans to a measured Timeline, in the same shape as a simulated one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from spanwise.core.program import COLLECTIVES, Program
from spanwise.core.timeline import DeviceUse, Span, Timeline
from spanwise.cost.sparse import collective_sent
from spanwise.runtime.session import DeviceSpans, StepReport


def step_times(reports: Sequence[StepReport], *, skip: int = 1) -> list[float]:
    """Seconds from the end of each step to the end of the next, without the first ``skip``.

    A run pauses for checkpoints and evaluations: after a pause, a step counts from its own start.
    """
    times: list[float] = []
    for before, after in pairwise(reports):
        if after.step == before.step + 1:
            times.append(after.end - max(before.end, after.start))
    if not times and reports:
        times = [reports[0].end - reports[0].start]
    return times[skip:] if len(times) > skip else times


def measured_timeline(
    recorded: Sequence[DeviceSpans], reports: Sequence[StepReport], program: Program
) -> Timeline:
    """The Timeline of the last recorded steps; its step time is the median over the whole run."""
    times = step_times(reports)
    step_s = median(times) if times else 0.0
    first = min((s[1] for spans in recorded for s in spans.steps), default=0.0)
    spans: list[Span] = []
    uses: list[DeviceUse] = []
    for device in recorded:
        for step, _, _, _, entries in device.steps:
            spans += [
                Span(lane=lane, kind=kind, action=text, start_s=a - first, end_s=b - first, step=step)
                for lane, kind, text, a, b in entries
            ]
        busy = median([s[3] for s in device.steps]) if device.steps else 0.0
        uses.append(
            DeviceUse(
                device=device.device,
                busy_s=busy,
                utilization=busy / step_s if step_s else 0.0,
                peak_memory_bytes=device.peak_bytes,
                sent_bytes=sent_bytes(program, device.device),
            )
        )
    spans.sort(key=lambda span: (span.lane, span.start_s))
    return Timeline(origin="measured", step_time_s=step_s, spans=tuple(spans), devices=tuple(uses))


def sent_bytes(program: Program, device: str) -> int:
    """Bytes that a device sends in a step: its messages, and its edge of every ring and chain."""
    total = 0.0
    for action in program.devices.get(device, ()):
        if action.kind == "send":
            total += action.nbytes
        elif action.kind in COLLECTIVES:
            total += collective_sent(action, device)[1]
    return round(total)
