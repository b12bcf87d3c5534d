"""The top of the page: what ran, and the four numbers that matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from spanwise.core.units import format_seconds
from spanwise.reporting.markup import Content, Markup, el, join
from spanwise.reporting.metrics import error_ratio
from spanwise.reporting.record import RunRecord, as_number

_CLOSE = 0.15  # the error that the project promises on its default cluster


def header(record: RunRecord) -> Markup:
    """Title and one sentence."""
    plan, cluster = record.plan, record.cluster
    strategy = plan.strategy if plan is not None else str(record.summary.get("strategy", "no plan"))
    model = record.graph.name if record.graph is not None else record.job.model.name
    where = f" on cluster {cluster.name}" if cluster is not None else ""
    words = [f"{model}{where}", f"strategy {strategy}"]
    if plan is not None:
        words.append(f"{len(plan.devices)} of {max(len(record.devices), len(plan.devices))} devices used")
        words.append(f"{plan.batch} rows a step")
    return el("header", el("h1", record.job.name), el("p", " · ".join(words), class_="lead"))


def tiles(record: RunRecord) -> Markup:
    """Step time, throughput, accuracy and loss."""
    predicted, measured = _step_times(record)
    return el(
        "div",
        _step_tile(predicted, measured),
        _rate_tile(record, predicted, measured),
        _accuracy_tile(record),
        _loss_tile(record),
        class_="tiles",
    )


def _step_times(record: RunRecord) -> tuple[float | None, float | None]:
    """Predicted and measured step time: from the timelines, else from summary.json."""
    sides: list[float | None] = []
    for timeline, key in ((record.simulated, "predicted"), (record.measured, "measured")):
        nested = record.summary.get(key)
        told = cast("Mapping[str, Any]", nested).get("step_time_s") if isinstance(nested, Mapping) else None
        sides.append(timeline.step_time_s if timeline is not None else as_number(told))
    return sides[0], sides[1]


def _step_tile(predicted: float | None, measured: float | None) -> Markup:
    error = error_ratio(predicted, measured)
    if measured is None and predicted is None:
        return _tile("Step time", "–", "neither predicted nor measured yet")
    if measured is None or predicted is None:
        value, word = (predicted, "measured") if measured is None else (measured, "predicted")
        known = "predicted" if measured is None else "measured"
        return _tile(f"Step time, {known}", format_seconds(value or 0.0), f"not {word}")
    verdict = None
    if error is not None:
        way = "shorter" if error < 0 else "longer"
        style = "good" if abs(error) <= _CLOSE else "bad"
        verdict = join(", ", el("span", f"{abs(error):.1%} {way} than measured", class_=style))
    return _tile(
        "Step time, measured",
        format_seconds(measured),
        join(f"predicted {format_seconds(predicted)}", verdict),
    )


def _rate_tile(record: RunRecord, predicted: float | None, measured: float | None) -> Markup:
    batch = record.plan.batch if record.plan is not None else record.job.batch
    rates = [batch / t if t else None for t in (predicted, measured)]
    told = as_number(record.summary.get("throughput_samples_per_s"))
    shown = told if told is not None else rates[1] if rates[1] is not None else rates[0]
    if shown is None:
        return _tile("Throughput", "–", "neither predicted nor measured yet")
    if rates[1] is None and told is None:
        return _tile("Throughput, predicted", _rate(shown), "not measured")
    return _tile(
        "Throughput, measured",
        _rate(shown),
        f"predicted {rates[0]:.4g}" if rates[0] is not None else "not predicted",
    )


def _accuracy_tile(record: RunRecord) -> Markup:
    reached = [(e.epoch, e.accuracy) for e in record.epochs if e.accuracy is not None]
    told = as_number(record.summary.get("accuracy"))
    final = told if told is not None else reached[-1][1] if reached else None
    if final is None:
        return _tile("Test accuracy", "–", "not evaluated")
    if not reached:
        return _tile("Test accuracy", f"{final:.1%}", "")
    epoch, best = max(reached, key=lambda pair: pair[1])
    return _tile("Test accuracy", f"{final:.1%}", f"best {best:.1%}, epoch {epoch}")


def _loss_tile(record: RunRecord) -> Markup:
    losses = [s.loss for s in record.steps if s.loss is not None]
    told = as_number(record.summary.get("loss"))
    final = told if told is not None else losses[-1] if losses else None
    if final is None:
        return _tile("Loss", "–", "no step trained")
    return _tile("Loss", f"{final:.4g}", f"started at {losses[0]:.4g}" if losses else "")


def _rate(value: float) -> Markup:
    return join(f"{value:.4g} ", el("small", "samples/s"))


def _tile(what: str, value: Content, more: Content) -> Markup:
    return el(
        "div",
        el("div", what, class_="what"),
        el("div", value, class_="value"),
        el("div", more, class_="more"),
        class_="tile",
    )
