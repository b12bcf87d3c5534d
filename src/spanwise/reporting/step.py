"""One step cut out of a timeline, with its start at zero."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from spanwise.core.timeline import Span, Timeline

_MICRO_BATCH = re.compile(r" m\[?(\d+)[ :]")  # of several at once the first
_PAYLOADS = ("activation", "gradient", "input", "label", "push", "pull")
_CLASSES = {
    "forward": "fwd",
    "backward": "bwd",
    "backward_input": "bwd",
    "backward_weight": "wgt",
    "step": "upd",
    "update": "upd",
    "norm": "upd",
    "wait": "wait",
    "reduce": "red",
    "average": "red",
    "broadcast": "red",
    "activation": "act",
    "gradient": "grad",
    "push": "red",
    "pull": "act",
    "input": "inp",
    "label": "inp",
    "load": "inp",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A span as it is drawn: ``style`` is a colour class, ``count`` how many spans were merged into it."""

    style: str
    title: str
    start_s: float
    end_s: float
    micro_batch: int | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class StepView:
    """The bars of one step by lane; ``end_s`` is when the last of them ends."""

    step: int
    step_time_s: float
    lanes: dict[str, tuple[Bar, ...]]
    end_s: float


def step_view(timeline: Timeline) -> StepView | None:
    """The step to show: the last one simulated, or the measured one closest to the median step time.

    It starts where its first action starts; a wait that began in the step before is cut there. None if
    the timeline holds no spans.
    """
    windows = _windows(timeline.spans)
    if not windows:
        return None
    chosen = max(windows)
    if timeline.origin == "measured":
        # The later of two that are equally typical: it is further from the start-up.
        chosen = min(windows, key=lambda k: (abs(_length(windows[k]) - timeline.step_time_s), -k))
    start, end = windows[chosen]
    lanes: dict[str, list[Bar]] = {}
    for span in sorted(timeline.spans, key=lambda s: (s.start_s, s.end_s)):
        if span.step == chosen and span.end_s > start:
            lanes.setdefault(span.lane, []).append(_bar(span, start))
    return StepView(chosen, timeline.step_time_s, {k: tuple(v) for k, v in lanes.items()}, end - start)


def merge(bars: Iterable[Bar], least_s: float) -> tuple[Bar, ...]:
    """Neighbours of one colour that are too short to see become one bar, so that the page stays small."""
    out: list[Bar] = []
    for bar in bars:
        last = out[-1] if out else None
        short = bar.end_s - bar.start_s < least_s
        if (
            last is not None
            and short
            and last.style == bar.style
            and bar.start_s - last.end_s < least_s
            and (last.count > 1 or last.end_s - last.start_s < least_s)
        ):
            count = last.count + bar.count
            end = max(last.end_s, bar.end_s)
            out[-1] = Bar(bar.style, f"{count} short spans", last.start_s, end, None, count)
        else:
            out.append(bar)
    return tuple(out)


def _windows(spans: Iterable[Span]) -> dict[int, tuple[float, float]]:
    """Start and end of every step; waits do not count, they reach back into the step before."""
    windows: dict[int, tuple[float, float]] = {}
    for span in spans:
        if span.kind != "wait":
            start, end = windows.get(span.step, (span.start_s, span.end_s))
            windows[span.step] = min(start, span.start_s), max(end, span.end_s)
    return windows


def _length(window: tuple[float, float]) -> float:
    return window[1] - window[0]


def _bar(span: Span, zero_s: float) -> Bar:
    match = _MICRO_BATCH.search(span.action)
    waits = span.kind == "wait"
    return Bar(
        _style(span),
        f"wait for {span.action}" if waits else span.action,
        max(0.0, span.start_s - zero_s),
        span.end_s - zero_s,
        int(match.group(1)) if match is not None and not waits else None,
    )


def _style(span: Span) -> str:
    if span.kind in _CLASSES:
        return _CLASSES[span.kind]
    words = span.action.split(" ", 2)
    payload = next((w for w in words[:2] if w in _PAYLOADS), None)
    return "other" if payload is None else _CLASSES[payload]
