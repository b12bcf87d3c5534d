"""Predicted and measured step on one time axis: per lane a predicted row above a measured row."""

from __future__ import annotations

from dataclasses import dataclass

from spanwise.core.plan import Plan
from spanwise.core.timeline import Timeline
from spanwise.core.units import format_seconds
from spanwise.reporting.axis import Axis, axis, time_unit
from spanwise.reporting.markup import Markup, el, fit, join, line, text
from spanwise.reporting.step import Bar, StepView, merge, step_view

PLOT_WIDTH = 980.0  # of the drawing area on a wide screen, in px: only decides which numbers fit
GUTTER = 200
ZOOMS = (1, 2, 4, 8)
LEGEND = (
    ("fwd", "forward"), ("bwd", "backward"), ("wgt", "weight gradients"), ("upd", "optimizer step"),
    ("wait", "waiting"),
    ("act", "activations"), ("grad", "gradients"), ("inp", "inputs and labels"), ("red", "gradient sum"),
    ("other", "other message"),
)  # fmt: skip
MOST_LINKS = 24
_TOP = 30
_LEAST = 0.0012  # of the axis: a shorter bar is drawn this long, to be seen at all
_THIN = frozenset(("red",))  # runs beside compute on a device lane: drawn as a strip under it


@dataclass(frozen=True, slots=True)
class _Lane:
    """A row pair of the drawing."""

    name: str
    top: float
    row: float
    gap: float
    is_link: bool


def gantt(timelines: tuple[Timeline, ...], devices: tuple[str, ...], plan: Plan | None) -> Markup | None:
    """The chart, or None if no timeline has spans."""
    views = [(t.origin, view) for t in timelines if (view := step_view(t)) is not None]
    if not views:
        return None
    lanes, left_out, height = _layout([view for _, view in views], devices)
    longest = max(max(view.end_s, view.step_time_s) for _, view in views) * 1.01 or 1.0
    first_link = next((lane.top for lane in lanes if lane.is_link), None)
    rule = None
    if first_link is not None:
        rule = el("line", x1=0, x2="100%", y1=first_link - 9, y2=first_link - 9, class_="rule")
    bars = [
        _row(view, lane, longest, lane.top + index * (lane.row + lane.gap))
        for lane in lanes
        for index, (_, view) in enumerate(views)
    ]
    total = height + 20.0 * len(views) + 6
    plot = el(
        "svg",
        _grid(longest, height),
        rule,
        *bars,
        _boundaries(views, longest, height),
        width="100%",
        height=total,
        role="img",
        aria_label="Gantt chart of one training step, predicted above measured",
    )
    gutter = _gutter(lanes, [origin for origin, _ in views], plan, total)
    return join(
        _controls(views),
        el("div", gutter, el("div", plot, class_="plot"), class_="gantt", data_zoom="1"),
        _note(views, left_out),
    )


def _layout(views: list[StepView], devices: tuple[str, ...]) -> tuple[list[_Lane], int, float]:
    """Lanes top to bottom, how many link lanes were left out, and the height they take."""
    used = {lane for view in views for lane in view.lanes}
    rank = {device: index for index, device in enumerate(devices)}
    computing = sorted((n for n in used if ">" not in n), key=lambda n: (rank.get(n, len(rank)), n))
    links = [n for n in used if ">" in n]
    busiest = sorted(links, key=lambda n: (-_busy(views, n), n))[:MOST_LINKS]

    def ends(name: str) -> tuple[int, int, str]:
        a, _, b = name.partition(">")
        return rank.get(a, len(rank)), rank.get(b, len(rank)), name

    lanes: list[_Lane] = []
    y = float(_TOP + 8)
    rows = len(views)
    for name in computing:
        lanes.append(_Lane(name, y, 18, 2, is_link=False))
        y += rows * 20 + 12
    y += 6 if busiest else 0
    for name in sorted(busiest, key=ends):
        lanes.append(_Lane(name, y, 10, 2, is_link=True))
        y += rows * 12 + 9
    return lanes, len(links) - len(busiest), y


def _busy(views: list[StepView], lane: str) -> float:
    return sum(bar.end_s - bar.start_s for view in views for bar in view.lanes.get(lane, ()))


def _grid(longest_s: float, height: float) -> Markup:
    """Time axis: few ticks at first, more when zoomed in."""
    factor, unit = time_unit(longest_s)
    coarse, fine = (axis(0.0, longest_s * factor, count, tight=True) for count in (10, 50))
    parts = [_tick(coarse, tick, unit, height, None) for tick in coarse.ticks]
    between = [t for t in fine.ticks if min(abs(t - c) for c in coarse.ticks) > 1e-6 * coarse.high]
    parts += [_tick(fine, tick, unit, height, "z4") for tick in between]
    return join(*parts)


def _tick(scale: Axis, tick: float, unit: str, height: float, zoom: str | None) -> Markup:
    x = _percent(scale.at(tick))
    label = f"0 {unit}" if tick == 0 else scale.label(tick)
    anchor = "start" if tick == 0 else "end" if scale.at(tick) > 0.985 else "middle"
    return join(
        el("line", x1=x, x2=x, y1=_TOP - 6, y2=height, class_=f"grid {zoom or ''}".strip()),
        el("text", label, x=x, y=_TOP - 13, class_=f"tick {zoom or ''}".strip(), text_anchor=anchor),
    )


def _boundaries(views: list[tuple[str, StepView]], longest: float, height: float) -> Markup:
    """Where the next step begins: in steady state everything repeats a step time later."""
    parts: list[Markup] = []
    for index, (origin, view) in enumerate(views):
        word = "predicted" if origin == "simulated" else "measured"
        at = _percent(view.step_time_s / longest)
        y = height + 20.0 * index + 14
        parts.append(el("line", x1=at, x2=at, y1=_TOP - 6, y2=y + 4, class_=f"edge {word}"))
        label = f"next step starts, {word}: {format_seconds(view.step_time_s)}"
        near_start = view.step_time_s < longest * 0.3
        parts.append(
            el("text", label, x=at, y=y, dx=6 if near_start else -6, class_=f"edge-label {word}",
               text_anchor="start" if near_start else "end")
        )  # fmt: skip
    return join(*parts)


def _row(view: StepView, lane: _Lane, longest: float, y: float) -> Markup:
    bars = merge(view.lanes.get(lane.name, ()), longest * 0.0008)
    track = el("rect", x=0, y=y, width="100%", height=lane.row, class_="track")
    zooms = {} if lane.is_link else _label_zooms(bars, longest)
    return join(track, *(_bar(bar, lane, longest, y) for bar in bars), *_labels(bars, zooms, longest, y + 13))


def _bar(bar: Bar, lane: _Lane, longest: float, y: float) -> Markup | None:
    seconds = bar.end_s - bar.start_s
    if seconds <= 0:
        return None
    thin = not lane.is_link and bar.style in _THIN
    top, height = (y + lane.row - 4, 4.0) if thin else (y, lane.row)
    title = f"{bar.title}\n{format_seconds(seconds)}, from {format_seconds(bar.start_s)}"
    return el(
        "rect",
        el("title", title),
        x=_percent(bar.start_s / longest),
        y=top,
        width=_percent(max(seconds / longest, _LEAST)),
        height=height,
        class_=f"bar {bar.style}{' tiny' if seconds / longest < 3 * _LEAST else ''}",
    )


def _label_zooms(bars: tuple[Bar, ...], longest: float) -> dict[str, int]:
    """Zoom level from which on numbers fit most bars of a colour, so that a row has all or none."""
    out: dict[str, int] = {}
    for style in {bar.style for bar in bars}:
        own = [bar for bar in bars if bar.style == style and bar.micro_batch is not None]
        if own:
            lengths = sorted(bar.end_s - bar.start_s for bar in own)
            digits = max(len(str(bar.micro_batch)) for bar in own)
            out[style] = _zoom(lengths[len(lengths) // 4] / longest, digits)
    return out


def _zoom(fraction: float, digits: int) -> int:
    """Least zoom level at which so many digits fit into that fraction of the axis; 0 if none."""
    needed = 7 * digits + 4
    return next((z for z in ZOOMS if fraction * PLOT_WIDTH * z >= needed), 0)


def _labels(bars: tuple[Bar, ...], zooms: dict[str, int], longest: float, y: float) -> list[Markup]:
    """Micro-batch numbers in the middle of their bars."""
    out: list[Markup] = []
    for bar in bars:
        if bar.micro_batch is None or not zooms.get(bar.style):
            continue
        own = _zoom((bar.end_s - bar.start_s) / longest, len(str(bar.micro_batch)))
        if own:
            x = _percent((bar.start_s + bar.end_s) / 2 / longest)
            level = max(own, zooms[bar.style])
            out.append(el("text", str(bar.micro_batch), x=x, y=y, class_=f"number {bar.style} z{level}"))
    return out


def _gutter(lanes: list[_Lane], origins: list[str], plan: Plan | None, height: float) -> Markup:
    parts: list[Markup] = []
    stages = _stages_of(plan)
    for lane in lanes:
        if lane.is_link:
            middle = lane.top + (len(origins) * 12 - 2) / 2 + 4
            parts.append(
                text(0, middle, fit(lane.name.replace(">", " → "), GUTTER - 10, 11), class_="link-name")
            )
            continue
        own = stages.get(lane.name, [])
        for index, stage in enumerate(own[:3]):
            parts.append(el("rect", x=index * 6, y=lane.top, width=4, height=len(origins) * 20 - 2,
                            rx=1, class_=f"s{stage % 8}"))  # fmt: skip
        parts.append(
            text(max(1, len(own[:3])) * 6 + 4, lane.top + 13, fit(lane.name, 112, 12.5), class_="lane-name")
        )
        for index, origin in enumerate(origins):
            word = "predicted" if origin == "simulated" else "measured"
            parts.append(
                text(GUTTER - 12, lane.top + index * 20 + 13, word, class_="origin", text_anchor="end")
            )
    first_link = next((lane for lane in lanes if lane.is_link), None)
    if first_link is not None:
        parts.append(line(0, first_link.top - 9, GUTTER, first_link.top - 9, "rule"))
    return el("svg", *parts, width=GUTTER, height=height, class_="gutter", aria_hidden="true")


def _stages_of(plan: Plan | None) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, stage in enumerate(plan.stages if plan is not None else ()):
        for device in stage.devices:
            found.setdefault(device, []).append(index)
    return found


def _controls(views: list[tuple[str, StepView]]) -> Markup:
    used = {bar.style for _, view in views for bars in view.lanes.values() for bar in bars}
    legend = [
        el("span", el("i", class_=f"swatch {style}"), name, class_="key")
        for style, name in LEGEND
        if style in used
    ]
    buttons = [
        el(
            "button",
            f"{zoom}×",
            type="button",
            data_zoom=str(zoom),
            aria_pressed="true" if zoom == 1 else "false",
        )
        for zoom in ZOOMS
    ]
    zoom = el("div", "zoom", *buttons, class_="zoom", hidden="")
    return el("div", el("div", *legend, class_="legend"), zoom, class_="controls")


def _note(views: list[tuple[str, StepView]], left_out: int) -> Markup:
    words = [
        f"{'predicted' if origin == 'simulated' else 'measured'} is step {view.step} of its timeline"
        for origin, view in views
    ]
    note = f"Time 0 is the first action of the step: {', '.join(words)}. "
    note += "Numbers are micro-batches; hover over a bar for its action and time."
    if left_out:
        note += f" {left_out} link lanes with less traffic are left out; trace.json has them all."
    return el("p", note, class_="note")


def _percent(fraction: float) -> str:
    return f"{100 * max(0.0, fraction):.3f}%"
