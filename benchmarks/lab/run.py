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
from harness import keep, need_lab, options

from spanwise.api.planning import choose
from spanwise.api.run import TrainOptions, run_job
from spanwise.api.times import profile_prepared
from spanwise.core.cluster import Cluster
from spanwise.lab import Lab
from spanwise.lab.check import check

NAME = "spantrain-7-env1"
MODEL, BATCH = "mobilenet_v2", 64


def main() -> None:
    args = options(__doc__ or "")
    need_lab(args)
    cluster = Cluster.load(CLUSTERS / f"{NAME}.toml")
    with Lab(cluster) as lab:
        findings = list(check(lab))
    for finding in findings:
        print(finding.line, flush=True)
    steps, runs = (4, 2) if args.short else (14, 3)
    prepared = prepared_job(MODEL, BATCH)
    prepared = dataclasses.replace(prepared, job=prepared.job.model_copy(update={"steps": steps}))
    times = profile_prepared(prepared, cluster, None)
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
        "cluster": NAME, "model": MODEL, "batch": BATCH, "steps": steps, "median_step_s": medians,
        "largest_difference": max(abs(value / middle - 1) for value in medians),
        "spread": max(medians) / min(medians) - 1,
        "check": [dataclasses.asdict(finding) for finding in findings],
        "check_ok": sum(f.ok for f in findings), "check_all": len(findings),
    }  # fmt: skip
    print({key: value for key, value in result.items() if key != "check"})
    keep(args, Path(__file__).parent, "lab", result, quiet=True)


if __name__ == "__main__":
    main()
