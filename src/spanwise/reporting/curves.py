"""Line charts with axes: loss, accuracy and step time over the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spanwise.reporting.axis import Axis, axis
from spanwise.reporting.markup import Markup, el, join, line, svg, text

Point = tuple[float, float]
MOST_POINTS = 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 20.0, 40.0, 38.0


@dataclass(frozen=True, slots=True)
class Series:
    """A named line; ``marks`` draws every point, ``level`` is one horizontal line at its first y."""

    name: str
    style: str
    points: tuple[Point, ...]
    marks: bool = False
    level: bool = False


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbouring points as one: mean x, least, mean and greatest y."""

    x: float
    low: float
    mean: float
    high: float


def buckets(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[Bucket, ...]:
    """At most ``most`` groups of consecutive points, of equal size but for one point."""
    count = min(most, len(points))
    out: list[Bucket] = []
    for index in range(count):
        group = points[index * len(points) // count : (index + 1) * len(points) // count]
        ys = [y for _, y in group]
        out.append(Bucket(sum(x for x, _ in group) / len(group), min(ys), sum(ys) / len(ys), max(ys)))
    return tuple(out)


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_title: str = "step",
    y_format: Callable[[float], str] | None = None,
    y_range: tuple[float, float] | None = None,
    x_end: float | None = None,
    width: float = 372.0,
    height: float = 250.0,
) -> Markup | None:
    """A chart of the series that have points; None if none has.

    Lines of more than ``MOST_POINTS`` points are drawn as the mean of their neighbours in a band from
    least to greatest. ``y_range`` is what the y axis shows at least,
    ``x_end`` where the x axis ends.
    """
    series = [s for s in series if s.points]
    moving = [s for s in series if not s.level]
    if not moving:
        return None
    last = x_end if x_end is not None else max(x for s in moving for x, _ in s.points)
    ys = [y for s in series for _, y in s.points] + list(y_range or ())
    x_axis = axis(0.0, last, 5, whole=True, tight=True)
    y_axis = axis(min(ys), max(ys), 5)
    plot = _Plot(x_axis, y_axis, width, height)
    parts = [text(0, 13, title, class_="chart-title"), _frame(plot, x_title, y_format or y_axis.label)]
    parts += [_series(s, plot) for s in series]
    return svg(width, height, *parts, _legend(series), label=f"{title} over {x_title}")


@dataclass(frozen=True, slots=True)
class _Plot:
    x_axis: Axis
    y_axis: Axis
    width: float
    height: float

    def x(self, value: float) -> float:
        return _LEFT + self.x_axis.at(value) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.height - _BOTTOM - self.y_axis.at(value) * (self.height - _BOTTOM - _TOP)


def _frame(plot: _Plot, x_title: str, y_label: Callable[[float], str]) -> Markup:
    base = plot.height - _BOTTOM
    parts: list[Markup] = []
    for tick in plot.y_axis.ticks:
        y = plot.y(tick)
        parts.append(line(_LEFT, y, plot.width - _RIGHT, y, "grid" if tick != plot.y_axis.low else "rule"))
        parts.append(text(_LEFT - 7, y + 4, y_label(tick), class_="tick", text_anchor="end"))
    for tick in plot.x_axis.ticks:
        x = plot.x(tick)
        parts.append(line(x, base, x, base + 4, "rule"))
        parts.append(text(x, base + 17, plot.x_axis.label(tick), class_="tick", text_anchor="middle"))
    parts.append(text((_LEFT + plot.width - _RIGHT) / 2, plot.height - 4, x_title, class_="axis-title",
                      text_anchor="middle"))  # fmt: skip
    return join(*parts)


def _series(series: Series, plot: _Plot) -> Markup:
    if series.level:
        y = plot.y(series.points[0][1])
        return line(_LEFT, y, plot.width - _RIGHT, y, f"curve level {series.style}")
    groups = buckets(series.points)
    band = None
    if len(groups) < len(series.points):
        upper = [f"{plot.x(g.x):.1f},{plot.y(g.high):.1f}" for g in groups]
        lower = [f"{plot.x(g.x):.1f},{plot.y(g.low):.1f}" for g in reversed(groups)]
        band = el("polygon", points=" ".join(upper + lower), class_=f"spread {series.style}")
    path = " ".join(f"{plot.x(g.x):.1f},{plot.y(g.mean):.1f}" for g in groups)
    curve = el("polyline", points=path, class_=f"curve {series.style}")
    dots = [_dot(series, g, plot) for g in groups if series.marks or len(groups) == 1]
    return join(band, curve, *dots)


def _dot(series: Series, group: Bucket, plot: _Plot) -> Markup:
    title = el("title", f"{series.name}: {group.mean:.4g} at {group.x:g}")
    return el("circle", title, cx=plot.x(group.x), cy=plot.y(group.mean), r=3, class_=f"dot {series.style}")


def _legend(series: Sequence[Series]) -> Markup | None:
    """Names under the title; a single line needs none."""
    if len(series) < 2:
        return None
    parts: list[Markup] = []
    x = 0.0
    for one in series:
        parts.append(line(x, 26, x + 14, 26, f"curve {one.style}{' level' if one.level else ''}"))
        parts.append(text(x + 19, 30, one.name, class_="tick"))
        x += 19 + 6.1 * len(one.name) + 14
    return join(*parts)
