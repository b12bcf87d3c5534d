"""A plan, and the comparison of plans, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan, ServerSync, Stage, Sync
from spanwise.core.units import format_bytes, format_seconds
from spanwise.reporting.record import as_number

if TYPE_CHECKING:
    from rich.table import Table


def describe_plan(plan: Plan, graph: ModelGraph) -> str:
    """A few lines of text: how the batch is cut, then one line per stage and per gradient sum.

    Stages that are cut only where a server's segments end are one line.
    """
    devices, stages = len(plan.devices), len(plan.stages)
    head = (
        f"{plan.strategy}: {count_of(stages, 'stage')} on {count_of(devices, 'device')}, "
        f"{plan.micro_batches} x {plan.micro_batch_rows} = {plan.batch} rows a step "
        f"(micro-batches x rows), {plan.schedule}"
    )
    rows = [_stage_row(first, last, plan, graph) for first, last in _alike(plan)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    sums = [f"  {_sum(sync)}" for sync in plan.syncs]
    wires = [f"{w.precision} precision from {w.source} to {w.target}" for w in plan.wires]
    reduced = [] if plan.exact else [f"  not exact: {', '.join(wires)}"]
    outside = [s.device for s in plan.sources if s.device not in {d for t in plan.stages for d in t.devices}]
    feeds = [f"  {', '.join(outside)}: reads data only"] if outside else []
    return "\n".join([head, *lines, *sums, *reduced, *feeds])


def _sum(sync: Sync | ServerSync) -> str:
    """Who sums the gradients of which layers, and how they travel."""
    layers = ", ".join(layer_range(*r) for r in sync.layers)
    if isinstance(sync, Sync):
        parts = f", in {sync.most_segments} segments" if sync.most_segments > 1 else ""
        return f"sum of gradients of layers {layers} over {', '.join(sync.devices)}{parts}"
    when = "each as soon as it is updated" if sync.as_aggregated else "after all gradients are in"
    return (
        f"{sync.server} updates layers {layers} for {', '.join(sync.devices)}: gradients in "
        f"{count_of(len(sync.pushes), 'segment')}, parameters in {len(sync.pulls)}, {when}"
    )


def layer_range(start: int, stop: int) -> str:
    """Half-open layer range as people count: '3-7', or '3' alone."""
    return str(start) if stop == start + 1 else f"{start}-{stop - 1}"


def layer_names(graph: ModelGraph, stage: Stage) -> str:
    """First and last layer of a stage by name."""
    first, last = graph.layers[stage.start].name, graph.layers[stage.stop - 1].name
    return first if stage.stop == stage.start + 1 else f"{first} .. {last}"


def plan_table(evaluations_rows: Sequence[Mapping[str, object]]) -> Table:
    """Strategies side by side, one row each.

    Keys of a row, all optional but ``strategy``: ``step_time_s``, ``throughput_samples_per_s``, ``speedup``
    (over the best single device), ``stages``, ``micro_batches``, ``micro_batch_rows``, ``devices`` (id to
    ``{"peak_memory_bytes"}``), ``bottleneck``, ``chosen`` (bool) and ``error`` (why there is no plan).
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "strategy",
        "step",
        "samples/s",
        "vs single",
        "stages",
        "M x B",
        "peak memory",
        "bottleneck",
    ):
        number = name in ("step", "samples/s", "vs single", "stages", "M x B")
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in evaluations_rows:
        cells = _cells(row)
        style = "bold green" if row.get("chosen") else "dim" if row.get("error") else ""
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def _cells(row: Mapping[str, object]) -> tuple[str, ...]:
    name = str(row.get("strategy", "?"))
    if row.get("error"):
        return (name, *("-",) * 6, str(row["error"]))
    step, rate = as_number(row.get("step_time_s")), as_number(row.get("throughput_samples_per_s"))
    gain = as_number(row.get("speedup"))
    cut = (row.get("micro_batches"), row.get("micro_batch_rows"))
    return (
        name,
        "-" if step is None else format_seconds(step),
        "-" if rate is None else f"{rate:.4g}",
        "-" if gain is None else f"{gain:.2f}x",
        str(row.get("stages", "-")),
        "-" if None in cut else f"{cut[0]} x {cut[1]}",
        _memory(row.get("devices")),
        str(row.get("bottleneck") or "-"),
    )


def _memory(devices: object) -> str:
    if not isinstance(devices, Mapping) or not devices:
        return "-"
    parts: list[str] = []
    for device, use in cast("Mapping[str, Mapping[str, object]]", devices).items():
        peak = as_number(use.get("peak_memory_bytes"))
        parts.append(f"{device} {'-' if peak is None else format_bytes(peak)}")
    return ", ".join(parts)


def _alike(plan: Plan) -> list[tuple[int, int]]:
    """First and last index of stages in a row that differ in layers only; one by one without a server."""
    out: list[tuple[int, int]] = []
    for index, stage in enumerate(plan.stages):
        before = plan.stages[out[-1][1]] if out else None
        same = before is not None and stage == before.model_copy(
            update={"start": stage.start, "stop": stage.stop}
        )
        out.append((out.pop()[0] if plan.servers and same else index, index))
    return out


def _stage_row(first: int, last: int, plan: Plan, graph: ModelGraph) -> tuple[str, ...]:
    stage = plan.stages[first].model_copy(update={"stop": plan.stages[last].stop})
    state = sum(p.bytes for p in graph.parameters_of(stage.start, stage.stop))
    cut = graph.layers[stage.stop - 1].cut_bytes
    return (
        f"stage {first}" if first == last else f"stages {first}-{last}",
        f"layers {layer_range(stage.start, stage.stop)}",
        layer_names(graph, stage),
        ", ".join(f"{r.device} x {r.rows}" for r in stage.replicas),
        ", ".join(filter(None, (_depth(plan, stage), recompute_text(stage)))),
        f"{format_bytes(state)} of weights",
        f"sends {format_bytes(cut)} a row" if last + 1 < len(plan.stages) else "ends in the loss",
    )


def _depth(plan: Plan, stage: Stage) -> str:
    if plan.schedule == "gpipe":
        return "all forwards first"
    return f"warm-up {min(stage.warmup, plan.micro_batches)}"


def recompute_text(stage: Stage) -> str:
    """'recomputes in 3 parts', with the layers if these are not all; empty if it keeps everything."""
    if not stage.recompute:
        return ""
    ranges = stage.recompute
    whole = sum(b - a for a, b in ranges) == stage.stop - stage.start
    layers = "" if whole else f" layers {', '.join(layer_range(*r) for r in _joined(ranges))}"
    return f"recomputes{layers} in {count_of(len(ranges), 'part')}"


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that touch as one."""
    out: list[tuple[int, int]] = []
    for a, b in ranges:
        if out and out[-1][1] == a:
            a = out.pop()[0]
        out.append((a, b))
    return out


def count_of(number: int, noun: str) -> str:
    """'1 step', '2 steps'."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}es" if noun.endswith("ch") else f"{number} {noun}s"
