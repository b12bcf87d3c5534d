"""Simulated against measured step time in the lab, over clusters, models and strategies.

Layers are timed once on this machine, links are those of the cluster file; nothing is fitted to the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arena import CLUSTERS, Arena, middle, predicted_s, prepared_job, shape
from harness import cache_of, keep, need_lab
from models import RECIPES
from pictures import GREY, canvas

from spanwise.api.planning import choose
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError, SpanwiseError

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = ("spantrain-7-env1", "edge-lan", "two-site-wan")
STRATEGIES = ("hpp", "pipeline", "gpipe", "weighted_data_parallel", "single")
BATCH = 32
ENOUGH_S = 6.0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="one cluster, one model; results are not kept")
    parser.add_argument("--out", type=Path, default=None, help="raw JSON file")
    parser.add_argument("--environments", nargs="*", default=list(ENVIRONMENTS))
    parser.add_argument("--models", nargs="*", default=list(RECIPES))
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES))
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--cache", type=Path, default=None, help="folder of profiles")
    args = parser.parse_args()
    if args.short:
        args.environments, args.models = [ENVIRONMENTS[0]], ["gpt"]
        args.strategies = ["hpp", "single"]
    return args


def combinations(arena: Arena, model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every strategy of one model on one cluster. Plans that are the same are run once."""
    prepared = prepared_job(model, args.batch)
    times = arena.profile(prepared, cache_of(args))
    rows: list[dict[str, Any]] = []
    for strategy in args.strategies:
        try:
            plan, _ = choose(prepared.job, arena.cluster, prepared.traced.graph, times, strategy)
        except InfeasibleError as error:
            print(f"{arena.cluster.name} {model} {strategy}: no plan: {error}", flush=True)
            continue
        same = shape(plan)
        if any(row["shape"] == same for row in rows):
            continue
        expected = predicted_s(prepared, plan, times, arena.cluster)
        count = max(3, min(12, round(ENOUGH_S / expected)))
        try:
            one = arena.plan(prepared, plan, steps=count)
        except SpanwiseError as error:
            print(f"{arena.cluster.name} {model} {strategy}: {error}", flush=True)
            continue
        found = middle(one.step_s)
        rows.append(
            {
                "cluster": arena.cluster.name, "model": model, "strategy": strategy, "batch": args.batch,
                "shape": same, "predicted_s": expected, "measured_s": found, "step_s": one.step_s,
                "error": expected / found - 1, "devices": one.devices, "plan": plan.to_data(),
            }
        )  # fmt: skip
        print(
            f"{arena.cluster.name} {model} {strategy}: {expected:.3f} s predicted, {found:.3f} s measured, "
            f"{expected / found - 1:+.1%}", flush=True,
        )  # fmt: skip
    return rows


def errors_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far predictions are off over all combinations."""
    errors = sorted(abs(row["error"]) for row in rows)
    return {
        "combinations": len(rows),
        "median_absolute_error": statistics.median(errors),
        "p95_absolute_error": quantile(errors, 0.95),
        "largest_absolute_error": errors[-1],
        "mean_error": statistics.mean(row["error"] for row in rows),
    }


def quantile(values: list[float], part: float) -> float:
    """Linear interpolation between order statistics."""
    return statistics.quantiles(values, n=100, method="inclusive")[round(part * 100) - 1]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured over predicted, one dot a combination, with a band of 20 %."""
    low = min(min(r["predicted_s"], r["measured_s"]) for r in rows) * 0.8
    high = max(max(r["predicted_s"], r["measured_s"]) for r in rows) * 1.25
    with canvas(path, (6.2, 5.6)) as (axis,):
        axis.fill_between([low, high], [low * 0.8, high * 0.8], [low * 1.2, high * 1.2], color=GREY, lw=0)
        axis.plot([low, high], [low, high], color="#888888", lw=0.8)
        for strategy in dict.fromkeys(r["strategy"] for r in rows):
            mine = [r for r in rows if r["strategy"] == strategy]
            axis.plot([r["predicted_s"] for r in mine], [r["measured_s"] for r in mine], "o", ms=5, alpha=0.8,
                      label=strategy)  # fmt: skip
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high),
                 xlabel="predicted step time, s", ylabel="measured step time, s")  # fmt: skip
        axis.set_title(f"{len(rows)} combinations; grey: within 20 %", fontsize=10, loc="left")
        axis.legend(frameon=False, fontsize=8)


def main() -> None:
    args = options()
    need_lab(args)
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for name in args.environments:
        cluster = Cluster.load(CLUSTERS / f"{name}.toml")
        with Arena(cluster, ()) as arena:
            for model in args.models:
                rows += combinations(arena, model, args)
                if args.out is not None:
                    args.out.with_suffix(".partial.json").write_text(json.dumps(rows))
    result = errors_of(rows) | {"seconds": time.monotonic() - began, "rows": rows}
    if args.short:
        print({key: value for key, value in result.items() if key != "rows"})
        return
    keep(args, HERE, "prediction", result, quiet=True)
    draw(rows, HERE / "prediction.svg")


if __name__ == "__main__":
    main()
