"""What a person sees in the terminal."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from spanwise.core.units import format_bytes, format_rate, format_seconds
from spanwise.reporting import describe_plan

if TYPE_CHECKING:
    from spanwise.api.advice import Answer
    from spanwise.core.cluster import Cluster
    from spanwise.core.model import ModelGraph
    from spanwise.core.plan import Plan
    from spanwise.core.profile import Profile
    from spanwise.core.timeline import Timeline
    from spanwise.planner import Evaluation, WhatIf
    from spanwise.planner.adapting.adaptation import Adaptation
    from spanwise.runtime.evaluate import Score
    from spanwise.runtime.pool import WorkerPool
    from spanwise.runtime.session import StepReport


_PIPED_COLUMNS = 120  # a file or pipe has no width of its own


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPED_COLUMNS)


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in columns:
        right = justify == "r"
        table.add_column(name, justify="right" if right else "left", no_wrap=right or not name)
    return table


def show_doctor(found: dict[str, Any]) -> None:
    """``spanwise doctor``."""
    table = _table(("", "l"), ("", "l"))
    table.add_row("spanwise", f"{found['spanwise']} on Python {found['python']}, {found['platform']}")
    libraries = ", ".join(f"{k} {v}" for k, v in found["libraries"].items() if v)
    table.add_row("libraries", libraries)
    table.add_row("cores", f"{found['usable_cores']} usable of {found['cores']}")
    limit = found["memory_limit_bytes"]
    table.add_row(
        "memory",
        f"{format_bytes(found['memory_bytes'])}, {format_bytes(found['available_memory_bytes'])} available"
        + (f", limited to {format_bytes(limit)}" if limit else ""),
    )
    table.add_row("accelerators", ", ".join(found["accelerators"]) or "none")
    for way, answer in found["emulation"].items():
        table.add_row(f"emulation: {way.replace('_', ' ')}", answer)
    _console().print(table)


def show_profile(graph: ModelGraph, times: Profile) -> None:
    """``spanwise profile``: one row a layer, times at one row count of the first table."""
    table_times = times.tables[0]
    at = len(table_times.rows) - 1
    rows = table_times.rows[at]
    table = _table(("layer", "r"), ("name", "l"), ("MFLOP/row", "r"), ("forward", "r"), ("backward", "r"),
                   ("spread", "r"), ("weights", "r"), ("saved/row", "r"), ("cut/row", "r"))  # fmt: skip
    for index, (layer, seconds) in enumerate(zip(graph.layers, table_times.layers, strict=True)):
        table.add_row(
            str(index),
            layer.name,
            f"{(layer.forward_flops + layer.backward_flops) / 1e6:.2f}",
            format_seconds(seconds.forward_s[at]),
            format_seconds(seconds.backward_s[at]),
            f"{seconds.spread:.0%}",
            format_bytes(layer.parameter_bytes),
            format_bytes(layer.saved_bytes),
            format_bytes(layer.cut_bytes) if layer.outputs else "-",
        )
    console = _console()
    console.print(table)
    console.print(f"\ntimes: {table_times.provenance}, {rows} rows, {table_times.environment}")
    for entry in times.devices:
        console.print(f"  {entry.device}: table {entry.table} x {entry.factor:.3g}")
    for link in times.links:
        rate = format_rate(link.bandwidth_bytes_per_s)
        console.print(f"  {link.source} > {link.target}: {rate}, {format_seconds(link.latency_s)}")


def show_plans(found: Answer, graph: ModelGraph, cluster: Cluster) -> None:
    """``spanwise plan``: every strategy, the winner, why, and whether distributing pays."""
    console = _console()
    _show_evaluations(console, found.evaluations, cluster, found.advice.single_step_time_s)
    console.print(f"\n[bold]{found.plan.strategy}[/bold]")
    console.print(describe_plan(found.plan, graph), markup=False)
    console.print(f"\nbottleneck: {found.bottleneck}", markup=False)
    least = format_seconds(found.bound.step_time_s)
    console.print(
        f"lower bound: {least} a step for any plan, by {found.bound.term}; this one is {found.gap:.1%} above",
        markup=False,
    )
    for device, reason in found.left_out.items():
        console.print(f"left out: {device}, {reason}", markup=False)
    if found.baselines:
        _show_baselines(console, found)
    if found.what_if is not None:
        _show_what_if(console, found.what_if)
    console.print(found.advice.sentence, style="bold", markup=False)


_DEVICE_COLUMNS = 8  # more devices than this do not fit on a line


def _show_evaluations(
    console: Console, evaluations: tuple[Evaluation, ...], cluster: Cluster, single_s: float | None
) -> None:
    shown = cluster.ids if len(cluster.ids) <= _DEVICE_COLUMNS else ()
    memory = [(device, "r") for device in shown] or [("most", "r")]
    table = _table(
        ("strategy", "l"), ("step", "r"), ("gain", "r"), ("stages", "r"), ("M x rows", "r"), *memory
    )
    table.columns[0].no_wrap = True
    table.padding = (0, 1, 0, 0)
    ranked = sorted(evaluations, key=lambda e: e.timeline.step_time_s if e.timeline else float("inf"))
    for entry in ranked:
        if entry.plan is None or entry.timeline is None:
            continue
        seconds = entry.timeline.step_time_s
        peaks = [entry.timeline.device(d).peak_memory_bytes for d in shown] or [
            max(use.peak_memory_bytes for use in entry.timeline.devices)
        ]
        table.add_row(
            entry.strategy,
            format_seconds(seconds),
            f"{single_s / seconds:.2f}x" if single_s else "-",
            str(len(entry.plan.stages)),
            f"{entry.plan.micro_batches} x {entry.plan.micro_batch_rows}",
            *(f"{peak / 2**20:.0f}" if peak else "-" for peak in peaks),
        )
    console.print(table)
    console.print("[dim]gain: over the best single device; last columns: peak memory per device in MiB[/dim]")
    for entry in ranked:
        if entry.plan is None:
            console.print(f"{entry.strategy}: no plan. {entry.reason}", markup=False)


def _show_baselines(console: Console, found: Answer) -> None:
    """Planners of others beside the fastest strategy of ours."""
    best = next(e for e in found.evaluations if e.strategy == found.advice.winner)
    table = _table(("baseline", "l"), ("step", "r"), ("ratio", "r"), ("M x rows", "r"), ("stages", "l"))
    for entry in (best, *found.baselines):
        ratio = found.ratio(entry)
        if entry.plan is None or entry.timeline is None or ratio is None:
            continue
        stages = " | ".join(
            f"[{s.start}:{s.stop}) {' '.join(f'{r.device}:{r.rows}' for r in s.replicas)}"
            for s in entry.plan.stages
        )
        size = f"{entry.plan.micro_batches} x {entry.plan.micro_batch_rows}"
        seconds = format_seconds(entry.timeline.step_time_s)
        table.add_row(entry.strategy, seconds, f"{ratio:.2f}", size, escape(stages))
    console.print()
    console.print(table)
    for entry in found.baselines:
        if entry.plan is None:
            console.print(f"{entry.strategy}: no plan. {entry.reason}", markup=False)
    console.print("[dim]ratio: step time over that of the fastest strategy; stages: layers and rows[/dim]\n")


def _show_what_if(console: Console, what_if: WhatIf) -> None:
    """What each change of the cluster would give."""
    table = _table(("change", "l"), ("step", "r"), ("ratio", "r"), ("strategy", "l"))
    for entry in what_if.found:
        table.add_row(entry.change, format_seconds(entry.step_time_s), f"{entry.ratio:.2f}x", entry.strategy)
    console.print()
    console.print(table)
    for left in what_if.untried:
        console.print(f"not planned: {left.change}; {left.reason}", markup=False)
    console.print("[dim]ratio: today's step time over that with the change, planned again[/dim]\n")


def show_timeline(timeline: Timeline) -> None:
    """``spanwise simulate``."""
    console = _console()
    console.print(f"step time {format_seconds(timeline.step_time_s)} ({timeline.origin})")
    table = _table(
        ("device", "l"), ("busy", "r"), ("utilization", "r"), ("peak memory", "r"), ("sent/step", "r")
    )
    for use in timeline.devices:
        table.add_row(
            use.device,
            format_seconds(use.busy_s),
            f"{use.utilization:.0%}",
            format_bytes(use.peak_memory_bytes),
            format_bytes(use.sent_bytes),
        )
    console.print(table)


def show_outcome(summary: dict[str, Any], report: Path) -> None:
    """The last lines of ``spanwise train``."""
    console = _console()
    predicted, measured = summary["predicted"]["step_time_s"], summary["step_time_s"]
    error = f"{predicted / measured - 1:+.1%}" if measured else "-"
    console.print(
        f"step time: predicted {format_seconds(predicted)}, measured {format_seconds(measured)} ({error}); "
        f"{summary['throughput_samples_per_s']:.0f} samples/s"
    )
    for change in summary["adaptations"]:
        console.print(_adaptation(change), markup=False)
    if summary["accuracy"] is not None:
        console.print(f"test accuracy {summary['accuracy']:.1%}, test loss {summary['test_loss']:.3f}")
    console.print(f"report: {report}", markup=False)


def show_decoupled(summary: dict[str, Any]) -> None:
    """``spanwise decouple``: one row a device."""
    table = _table(("device", "l"), ("classes", "l"), ("share", "r"), ("less compute", "r"),
                   ("predicted", "r"), ("measured", "r"), ("sent", "r"), ("own classes", "r"))  # fmt: skip
    for device, found in summary["devices"].items():
        own = found["accuracy_own_classes"]
        measured = "lost" if found["measured_s"] is None else format_seconds(found["measured_s"])
        table.add_row(
            device, ",".join(map(str, found["classes"])), f"{found['share']:.0%}",
            f"{found['saving_per_sample']:.1f}x", format_seconds(found["predicted_s"]), measured,
            format_bytes(found["sent_bytes"]), "" if own is None else f"{own:.1%}",
        )  # fmt: skip
    console = _console()
    console.print(table)
    console.print(f"negatives {summary['negatives']}: {summary['privacy']}")
    if summary["missing_classes"]:
        console.print(f"missing classes: {', '.join(map(str, summary['missing_classes']))}")
    if "accuracy" in summary:
        console.print(
            f"merged accuracy {summary['accuracy']:.1%} "
            f"({summary['accuracy_without_read_out']:.1%} by plain logits)"
        )
    if summary.get("tuned_accuracy") is not None:
        console.print(f"after fine-tuning {summary['tuned_accuracy']:.1%}")


def _adaptation(change: dict[str, Any]) -> str:
    realised = change["realised_gain"]
    gained = "not known" if realised is None else f"{realised:+.0%}"
    return (
        f"step {change['step']}: {change['reason']}; new {change['kind']}, "
        f"{format_bytes(change['moved_bytes'])} moved in {format_seconds(change['seconds'])}; "
        f"gain predicted {change['predicted_gain']:+.0%}, realised {gained}"
        f"{', undone' if change['undone'] else ''}"
    )


class RunConsole:
    """Tells a run's phases, plan and progress. ``quiet`` keeps standard output for JSON."""

    def __init__(self, *, quiet: bool = False, show_token: bool = True) -> None:
        self._show_token = show_token
        self._console = Console(stderr=quiet, quiet=quiet, highlight=False)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._predicted_s = 0.0
        self._batch = 0

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_stage(self, text: str) -> None:
        """The run enters a new phase."""
        self._console.print(f"[dim]{text}[/dim]")

    def on_meeting(self, pool: WorkerPool) -> None:
        """Says how to start workers by hand."""
        if pool.same_clock:
            return
        endpoint = f"{pool.coordinator.host}:{pool.coordinator.port}"
        self._console.print(
            f"workers may join; on each device:\n  spanwise worker --join {endpoint} --device ID",
            markup=False,
        )
        token = f"  with SPANWISE_TOKEN={pool.token}" if self._show_token else "  with the same --token-file"
        self._console.print(token, markup=False)

    def on_plan(
        self, plan: Plan, graph: ModelGraph, evaluations: tuple[Evaluation, ...], predicted: Timeline
    ) -> None:
        """Shows what will run."""
        self._predicted_s, self._batch = predicted.step_time_s, plan.batch
        self._console.print(f"\n[bold]{plan.strategy}[/bold]")
        self._console.print(describe_plan(plan, graph), markup=False)
        for entry in evaluations:
            said = format_seconds(entry.timeline.step_time_s) if entry.timeline else entry.reason
            self._console.print(f"  {entry.strategy:24s} {said}", markup=False)
        self._console.print(f"predicted step time {format_seconds(predicted.step_time_s)}\n")

    def on_change(self, plan: Plan, graph: ModelGraph, record: Adaptation) -> None:
        """Shows the new plan and why; what it gives is not known yet."""
        self._console.print(f"\n{_adaptation(record.to_data())}", markup=False)
        self._console.print(describe_plan(plan, graph), markup=False)

    def on_step(self, report: StepReport, step_time_s: float, total_steps: int) -> None:
        """Moves the bar."""
        if self._task is None:
            self._task = self._progress.add_task("training", total=total_steps, speed="")
        speed = (
            f"loss {report.loss:.3f}  {self._batch / step_time_s:.0f} samples/s  "
            f"step {format_seconds(step_time_s)} (predicted {format_seconds(self._predicted_s)})"
        )
        self._progress.update(self._task, completed=report.step + 1, speed=speed)

    def on_epoch(self, epoch: int, score: Score | None, loss: float) -> None:
        """One line an epoch."""
        text = f"epoch {epoch + 1}: training loss {loss:.3f}"
        if score is not None:
            text += f", test loss {score.loss:.3f}"
            if score.accuracy is not None:
                text += f", test accuracy {score.accuracy:.1%}"
        self._console.print(text)
