"""Utilisation and memory of every device: predicted above measured, memory as a share of its budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spanwise.core.timeline import DeviceUse, Timeline
from spanwise.core.units import format_bytes
from spanwise.reporting.markup import Markup, el, fit, join, line, svg, text

WIDTH = 560.0
_NAME = 122.0


@dataclass(frozen=True, slots=True)
class _Measure:
    """What a bar shows: its length as a fraction, and the words behind it."""

    fraction: Callable[[DeviceUse], float]
    words: Callable[[DeviceUse], str]
    room: float

    @property
    def bar(self) -> float:
        """Length of a full bar: what names and words leave over."""
        return WIDTH - _NAME - self.room


def utilization_bars(timelines: Sequence[Timeline], devices: Sequence[str]) -> Markup:
    """Busy share of the step time."""
    measure = _Measure(lambda use: min(1.0, use.utilization), lambda use: f"{use.utilization:.0%}", 52.0)
    return _bars("Share of the step spent computing", timelines, devices, lambda _: measure)


def memory_bars(timelines: Sequence[Timeline], devices: Sequence[str], budgets: dict[str, int]) -> Markup:
    """Peak tensor bytes against the budget; without a cluster, against the greatest peak."""
    greatest = max((u.peak_memory_bytes for t in timelines for u in t.devices), default=1) or 1

    def measure(device: str) -> _Measure:
        budget = budgets.get(device)
        tail = "" if budget is None else f" of {format_bytes(budget)}"
        return _Measure(
            lambda use: use.peak_memory_bytes / (budget or greatest),
            lambda use: f"{format_bytes(use.peak_memory_bytes)}{tail}",
            150.0,
        )

    title = "Peak tensor memory, as a share of each device's budget" if budgets else "Peak tensor memory"
    return _bars(title, timelines, devices, measure)


def _bars(
    title: str, timelines: Sequence[Timeline], devices: Sequence[str], measure: Callable[[str], _Measure]
) -> Markup:
    pitch = 14 * len(timelines) + 12
    top = 30.0
    height = top + pitch * len(devices) + 18
    parts = [text(0, 13, title, class_="chart-title")]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _NAME + tick * measure("").bar
        parts.append(line(x, top - 4, x, height - 16, "grid"))
        parts.append(text(x, height - 2, f"{tick:.0%}", class_="tick", text_anchor="middle"))
    for index, device in enumerate(devices):
        y = top + pitch * index
        name = fit(device, _NAME - 10, 12)
        parts.append(el("g", el("title", device), text(0, y + pitch / 2 - 2, name, class_="replica")))
        for row, timeline in enumerate(timelines):
            parts.append(_bar(timeline, device, measure(device), y + 14 * row))
    return svg(WIDTH, height, *parts, label=title)


def _bar(timeline: Timeline, device: str, measure: _Measure, y: float) -> Markup:
    use = timeline.device(device)
    fraction = measure.fraction(use)
    word = "predicted" if timeline.origin == "simulated" else "measured"
    over = " over" if fraction > 1.0005 else ""
    width = min(1.0, fraction) * measure.bar
    title = el("title", f"{device}, {word}: {measure.words(use)}")
    return join(
        el("rect", x=_NAME, y=y, width=measure.bar, height=11, class_="track"),
        el("rect", title, x=_NAME, y=y, width=width, height=11, class_=f"side {word}{over}"),
        text(_NAME + measure.bar + 10, y + 10, f"{measure.words(use)}{' !' if over else ''}", class_="tick"),
    )
