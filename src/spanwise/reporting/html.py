"""The report page: one file with everything in it."""

from __future__ import annotations

from importlib.resources import files

from spanwise.core.units import format_bytes
from spanwise.reporting.bars import memory_bars, utilization_bars
from spanwise.reporting.curves import Series, chart
from spanwise.reporting.drawing import cluster_drawing
from spanwise.reporting.gantt import gantt
from spanwise.reporting.headline import header, tiles
from spanwise.reporting.markup import Content, Markup, el, join
from spanwise.reporting.origin import how_it_was_made
from spanwise.reporting.record import RunRecord
from spanwise.reporting.stages import stage_map
from spanwise.reporting.text import count_of

_ZOOM = """
for (const box of document.querySelectorAll(".zoom")) {
  const chart = box.closest("section").querySelector(".gantt"), plot = chart.querySelector(".plot");
  box.hidden = false;
  box.addEventListener("click", (event) => {
    const zoom = event.target.dataset.zoom;
    if (!zoom) return;
    const middle = (plot.scrollLeft + plot.clientWidth / 2) / plot.scrollWidth;
    chart.dataset.zoom = zoom;
    plot.scrollLeft = middle * plot.scrollWidth - plot.clientWidth / 2;
    for (const button of box.querySelectorAll("button"))
      button.setAttribute("aria-pressed", button.dataset.zoom === zoom);
  });
}
"""


def page(record: RunRecord) -> str:
    """The whole HTML text; nothing in it refers to another file or host."""
    style = files("spanwise.reporting").joinpath("style.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{record.job.name} – spanwise report"),
        el("style", Markup(style)),
    )
    body = el(
        "main",
        header(record),
        tiles(record),
        _cluster(record),
        _stages(record),
        _timeline(record),
        _use(record),
        _curves(record),
        _devices(record),
        how_it_was_made(record),
        el(
            "footer",
            "Made by spanwise. The same run as a trace: trace.json, for ui.perfetto.dev or chrome://tracing.",
        ),
    )
    return (
        "<!doctype html>\n"
        + el("html", head, el("body", body, el("script", Markup(_ZOOM))), lang="en")
        + "\n"
    )


def section(title: str, sub: str, *content: Content) -> Markup:
    """A titled part of the page."""
    return el("section", el("h2", title), el("p", sub, class_="sub"), *content)


def missing(sentence: str) -> Markup:
    """Says what is not there, and where it would come from."""
    return el("p", sentence, class_="missing")


def _cluster(record: RunRecord) -> Markup:
    title = "Cluster"
    if record.cluster is None:
        return section(title, "", missing("This run has no cluster.json."))
    sub = record.cluster.description or count_of(len(record.cluster.devices), "device")
    drawing = el("div", cluster_drawing(record.cluster, record.plan), class_="drawing")
    return section(title, sub, drawing)


def _stages(record: RunRecord) -> Markup:
    title = "Stages"
    if record.graph is None:
        return section(title, "", missing("This run has no graph.json, so its layers are not known."))
    drawing = el("div", stage_map(record.graph, record.plan, record.profile), class_="drawing")
    if record.plan is None:
        return section(title, "", drawing, missing("This run has no plan.json, so its stages are not known."))
    plan = record.plan
    sub = (
        f"Each step runs {count_of(plan.micro_batches, 'micro-batch')} of "
        f"{count_of(plan.micro_batch_rows, 'row')} through {count_of(len(plan.stages), 'stage')}, "
        f"scheduled {plan.schedule}."
    )
    return section(title, sub, drawing)


def _timeline(record: RunRecord) -> Markup:
    title, sub = (
        "One training step",
        "What every device and link does, predicted above measured, on one time axis.",
    )
    drawn = gantt(record.timelines, record.devices, record.plan)
    if drawn is None:
        return section(
            title, "", missing("This run has no timeline with spans yet; simulate or train it first.")
        )
    absent = [
        name
        for name, timeline in (("predicted", record.simulated), ("measured", record.measured))
        if timeline is None or not timeline.spans
    ]
    note = missing(f"There is no {absent[0]} timeline in this run folder.") if absent else None
    return section(title, sub, drawn, note)


def _use(record: RunRecord) -> Markup:
    title = "Utilisation and memory"
    timelines = [t for t in record.timelines if t.devices]
    if not timelines:
        return section(title, "", missing("No timeline says how devices were used."))
    key = el(
        "div",
        *(
            el("span", el("i", class_=f"swatch {style}"), word, class_="key")
            for style, word, origin in (("fwd", "predicted", "simulated"), ("bwd", "measured", "measured"))
            if any(t.origin == origin for t in timelines)
        ),
        class_="legend",
        style="margin: -8px 0 14px",
    )
    budgets = {d.id: d.memory_bytes for d in record.cluster.devices} if record.cluster is not None else {}
    charts = (utilization_bars(timelines, record.devices), memory_bars(timelines, record.devices, budgets))
    return section(title, "", key, el("div", *charts, class_="pair"))


def _curves(record: RunRecord) -> Markup:
    title = "Training"
    if not record.steps and not record.epochs:
        return section(title, "", missing("This run has no metrics.jsonl yet; it has not trained a step."))
    loss = tuple((float(s.step), s.loss) for s in record.steps if s.loss is not None)
    tested = tuple((float(e.step), e.test_loss) for e in record.epochs if e.test_loss is not None)
    accuracy = tuple((float(e.step), e.accuracy) for e in record.epochs if e.accuracy is not None)
    times = tuple((float(s.step), s.step_time_s * 1e3) for s in record.steps if s.step_time_s is not None)
    predicted = () if record.simulated is None else ((0.0, record.simulated.step_time_s * 1e3),)
    end = float(max([s.step for s in record.steps] + [e.step for e in record.epochs]))
    losses = (Series("training", "train", loss), Series("test", "test", tested, marks=True))
    paces = (Series("measured", "time", times), Series("predicted", "forecast", predicted, level=True))
    charts = [
        chart("Loss", losses, x_end=end),
        chart("Test accuracy", (Series("accuracy", "test", accuracy, marks=True),),
              y_format=lambda v: f"{v:.0%}", y_range=(0.0, 1.0), x_end=end),
        chart("Step time, ms", paces, y_range=(0.0, 0.0), x_end=end),
    ]  # fmt: skip
    drawn = [c for c in charts if c is not None]
    sub = f"{count_of(len(record.steps), 'step')}, {count_of(len(record.epochs), 'evaluation')}."
    return section(title, sub, el("div", *drawn, class_="triple"))


def _devices(record: RunRecord) -> Markup:
    title = "Devices"
    if not record.devices:
        return section(title, "", missing("Neither a cluster, a plan nor a timeline names a device."))
    stages: dict[str, list[str]] = {}
    for index, stage in enumerate(record.plan.stages if record.plan is not None else ()):
        for device in stage.devices:
            stages.setdefault(device, []).append(str(index))
    sides = (record.simulated, record.measured)
    head = el(
        "thead",
        el("tr", el("th"), el("th"), *(el("th", name, colspan="2", class_="group") for name in
            ("utilisation", "peak memory", "sent a step"))),
        el("tr", el("th", "device"), el("th", "stage", class_="words"),
           *(el("th", side) for _ in range(3) for side in ("predicted", "measured"))),
    )  # fmt: skip
    rows: list[Markup] = []
    for device in record.devices:
        uses = [None if t is None else t.device(device) for t in sides]
        cells = [
            *("–" if u is None else f"{u.utilization:.1%}" for u in uses),
            *("–" if u is None else format_bytes(u.peak_memory_bytes) for u in uses),
            *("–" if u is None else format_bytes(u.sent_bytes) for u in uses),
        ]
        first = el("td", device, title=device)
        rows.append(el("tr", first, el("td", ", ".join(stages.get(device, ["–"])), class_="words"),
                       *(el("td", cell) for cell in cells)))  # fmt: skip
    table = el("table", head, el("tbody", join(*rows)))
    return section(title, "", el("div", table, class_="scroll"))
