"""The default cluster: every strategy's predicted and measured step time, and `auto` against one device.

Each strategy trains the same job (MobileNetV2 on digits) on the emulated cluster with worker processes. Runs
are interleaved in rounds, so slow drift of the machine meets all strategies.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import cache_of, keep, options, redrawn
from pictures import OURS, PLAIN, bars, canvas

from spanwise import api
from spanwise.api.planning import choose, predict
from spanwise.api.prepare import prepare
from spanwise.api.run import TrainOptions, run_job
from spanwise.api.times import profile_prepared
from spanwise.core.defaults import default_cluster

HERE = Path(__file__).resolve().parent
JOB = HERE.parents[1] / "examples" / "digits.toml"
STRATEGIES = ("single", "hpp", "pipeline", "gpipe", "data_parallel")
SHORT = ("single",)  # and what `auto` chooses


def draw(data: dict[str, Any], path: Path) -> None:
    """Measured step times as bars, predictions as dots on them."""
    rows = sorted(data["strategies"].items(), key=lambda entry: entry[1]["median_step_time_s"])
    seconds = [row["median_step_time_s"] for _, row in rows]
    single = data["strategies"]["single"]["median_step_time_s"]
    with canvas(path, (7.0, 2.6)) as (axis,):
        texts = [f"  {s:.2f} s, {single / s:.2f}x one device" for s in seconds]
        bars(axis, [name for name, _ in rows], seconds, texts)
        predicted = [row["predicted_step_time_s"] for _, row in rows]
        axis.plot(predicted, range(len(rows)), "o", color=OURS, label="predicted")
        axis.barh([0], [0], color=PLAIN, label="measured")
        axis.set(xlabel="seconds a step, batch 128", xlim=(0, 1.3 * max(seconds)))
        axis.legend(frameon=False, fontsize=8, loc="upper right")


def main() -> None:
    args = options(__doc__ or "")
    if redrawn(args, HERE, "default_cluster", draw):
        return
    strategies, steps, rounds = (SHORT, 4, 1) if args.short else (STRATEGIES, 7, 2)
    cluster = default_cluster()
    job = api.load_job(JOB, (f"steps={steps}", "batch=128", "checkpoint_every=0"))
    prepared = prepare(job)
    times = profile_prepared(prepared, cluster, cache_of(args))
    graph = prepared.traced.graph
    plans = {name: choose(job, cluster, graph, times, name)[0] for name in strategies}
    auto, _ = choose(job, cluster, graph, times, "auto")
    plans.setdefault(auto.strategy, auto)
    predicted = {name: predict(plan, graph, times, cluster, job).step_time_s for name, plan in plans.items()}
    measured: dict[str, list[float]] = {name: [] for name in plans}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for name, plan in plans.items():
                run = Path(folder) / f"{name}-{turn}"
                # Profiles are measured once: every round is held against the same prediction.
                outcome = run_job(
                    job, cluster, TrainOptions(run=run, plan=plan, prepared=prepared, times=times)
                )
                measured[name].append(outcome.measured.step_time_s)
                print(
                    f"{name}: {predicted[name]:.3f} s predicted, {measured[name][-1]:.3f} s measured",
                    flush=True,
                )
    rows: dict[str, Any] = {}
    for name in plans:
        middle = statistics.median(measured[name])
        rows[name] = {
            "predicted_step_time_s": predicted[name],
            "measured_step_time_s": measured[name],
            "median_step_time_s": middle,
            "throughput_samples_per_s": job.batch / middle,
            "error": predicted[name] / middle - 1,
        }
    errors = [abs(row["error"]) for row in rows.values()]
    result = {
        "strategies": rows,
        "auto": auto.strategy,
        "auto_over_single": rows["single"]["median_step_time_s"] / rows[auto.strategy]["median_step_time_s"],
        "median_absolute_error": statistics.median(errors),
        "largest_absolute_error": max(errors),
    }
    keep(args, HERE, "default_cluster", result, draw=draw)


if __name__ == "__main__":
    main()
