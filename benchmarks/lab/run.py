"""Whether the lab can be trusted: its check on `spantrain-7`, and one plan in three labs by turns."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arena import CLUSTERS, prepared_job
from harness import cache_of, keep, need_lab, options, redrawn
from pictures import GREY, OURS, canvas

from spanwise.api.planning import choose
from spanwise.api.run import TrainOptions, run_job
from spanwise.api.times import profile_prepared
from spanwise.core.cluster import Cluster
from spanwise.lab import Lab
from spanwise.lab.check import check

HERE = Path(__file__).resolve().parent
NAME = "spantrain-7-env1"
MODEL, BATCH = "mobilenet_v2", 64


def draw(data: dict[str, Any], path: Path) -> None:
    """Measured over expected for everything that is checked, one row a kind, with the band of 10 %."""
    numbers = [f for f in data["check"] if f["expected"] and f["measured"] and f["what"] != "rtt"]
    kinds = list(dict.fromkeys(f["what"] for f in numbers))
    trips = [f for f in data["check"] if f["what"] == "rtt"]
    with canvas(path, (8.0, 2.6), (1, 2)) as (left, right):
        left.axvspan(0.9, 1.1, color=GREY, lw=0)
        for f in numbers:
            left.plot(f["measured"] / f["expected"], kinds.index(f["what"]), "o", color=OURS, ms=4, alpha=0.7)
        left.set_yticks(range(len(kinds)), kinds, fontsize=8)
        left.set(xlim=(0.8, 1.2), ylim=(-0.6, len(kinds) - 0.4), xlabel="measured over cluster file")
        right.plot([1e3 * f["expected"] for f in trips], [1e3 * f["measured"] for f in trips], "o",
                   color=OURS, ms=4, alpha=0.7)  # fmt: skip
        most = 1.2e3 * max(f["expected"] for f in trips)
        right.fill_between([0, most], [-1, 0.9 * most - 1], [1, 1.1 * most + 1], color=GREY, lw=0, zorder=0)
        right.set(
            xlim=(0, most), ylim=(0, most * 1.2), xlabel="round trip by the file, ms", ylabel="measured, ms"
        )
        left.set_title(
            f"{data['check_ok']} of {data['check_all']} within tolerance (grey)", fontsize=10, loc="left"
        )


def main() -> None:
    args = options(__doc__ or "")
    if redrawn(args, HERE, "lab", draw):
        return
    need_lab(args)
    cluster = Cluster.load(CLUSTERS / f"{NAME}.toml")
    with Lab(cluster) as lab:
        findings = list(check(lab))
    for finding in findings:
        print(finding.line, flush=True)
    steps, runs, model = (4, 1, "gpt") if args.short else (14, 3, MODEL)
    prepared = prepared_job(model, BATCH)
    prepared = dataclasses.replace(prepared, job=prepared.job.model_copy(update={"steps": steps}))
    times = profile_prepared(prepared, cluster, cache_of(args))
    plan, _ = choose(prepared.job, cluster, prepared.traced.graph, times, "hpp")
    medians: list[float] = []
    for turn in range(runs):
        with tempfile.TemporaryDirectory() as folder, Lab(cluster) as lab:
            settings = TrainOptions(
                run=Path(folder) / "run", plan=plan, prepared=prepared, times=times, lab=lab
            )
            medians.append(run_job(prepared.job, cluster, settings).measured.step_time_s)
        print(f"lab {turn + 1}: median step {medians[-1]:.3f} s", flush=True)
    middle = statistics.median(medians)
    result: dict[str, Any] = {
        "cluster": NAME, "model": model, "batch": BATCH, "steps": steps, "median_step_s": medians,
        "largest_difference": max(abs(value / middle - 1) for value in medians),
        "spread": max(medians) / min(medians) - 1,
        "check": [dataclasses.asdict(finding) for finding in findings],
        "check_ok": sum(f.ok for f in findings), "check_all": len(findings),
    }  # fmt: skip
    print({key: value for key, value in result.items() if key != "check"})
    keep(args, HERE, "lab", result, quiet=True, draw=draw)


if __name__ == "__main__":
    main()
