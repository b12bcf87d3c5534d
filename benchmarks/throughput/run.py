"""Samples per second in the lab: spanwise against PyTorch's own engines, on the same devices.

Every cell is one cluster, model and global batch. Its contestants take turns in rounds, so slow drift of the
machine meets all of them; the median step of all rounds counts. `auto` is what spanwise would run: the plan
that `train --tries` settles on. What it has seen until then counts for nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arena import (
    CLUSTERS,
    Arena,
    Measurement,
    failed,
    middle,
    predicted_s,
    prepared_job,
    shape,
    step_s,
    trials,
)
from harness import Cells, cache_of, keep, need_lab
from losses import losses
from models import RECIPES
from table import draw, summarize

from spanwise.api.planning import choose, choose_for
from spanwise.core.cluster import Cluster
from spanwise.core.errors import SpanwiseError
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.planner import Problem

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = ("spantrain-7-env1", "spantrain-7-env2", "two-site-wan")
BATCHES = (32, 128)
SLOW = ("fsdp2",)  # one timed step in the first round
LONG_STEP_S = 2.5  # of one device: longer steps are timed once in the first round
LONG_S = 8.0  # a step that is worth leaving out where it cannot matter


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="one cell, one round; results are not kept")
    parser.add_argument("--out", type=Path, default=None, help="raw JSON file")
    parser.add_argument("--environments", nargs="*", default=list(ENVIRONMENTS))
    parser.add_argument("--models", nargs="*", default=list(RECIPES))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tries", type=int, default=3, help="plans that spanwise tries first")
    parser.add_argument("--peers", nargs="*", default=None, help="only these; default: all")
    parser.add_argument("--also", nargs="*", default=[], help="further strategies, with the smallest batch")
    parser.add_argument("--cache", type=Path, default=None, help="folder of profiles")
    args = parser.parse_args()
    if args.short:
        args.environments, args.models, args.batches, args.rounds = ["home"], ["gpt"], [32], 1
        args.peers, args.tries = ["ddp", "1f1b", "single"], 1
    return args


def contestants(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """The peers on this cluster, as keyword arguments of ``Arena.peer``."""
    ids = list(cluster.ids)
    fastest = max(cluster.devices, key=lambda d: d.speed)
    cloud = [d.id for d in cluster.devices if d.tier == "cloud"] or [fastest.id]
    away = [d.id for d in cluster.devices if d.id not in cloud]
    return {
        "ddp": {"peer": "ddp", "ranks": ids},
        "ddp_5mb": {"peer": "ddp", "ranks": ids, "options": {"bucket_cap_mb": 5}},
        "fsdp2": {"peer": "fsdp2", "ranks": ids},
        "gpipe": {"peer": "gpipe", "ranks": ids},
        "gpipe_m32": {"peer": "gpipe", "ranks": ids, "options": {"micro_batches": 32}},
        "1f1b": {"peer": "1f1b", "ranks": ids},
        "1f1b_m32": {"peer": "1f1b", "ranks": ids, "options": {"micro_batches": 32}},
        "single": {"peer": "single", "ranks": [fastest.id]},
        "cloud_only": {"peer": "cloud_only", "ranks": [*cloud, *away], "data_devices": away},
    }


def cell(
    arena: Arena, model: str, batch: int, args: argparse.Namespace, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """All contestants on one cluster, model and batch; ``earlier`` is the cell of the smaller batch."""
    prepared = prepared_job(model, batch)
    times = arena.profile(prepared, cache_of(args))
    problem = Problem(prepared.traced.graph, times, arena.cluster, prepared.job)
    first, evaluations = choose_for(problem, "auto")
    tryout = arena.tried(prepared, problem, first, args.tries)
    plan = tryout.running
    expected = predicted_s(prepared, plan, times, arena.cluster)
    expects = {e.strategy: e.timeline.step_time_s for e in evaluations if e.timeline}
    found: dict[str, list[Measurement]] = {}
    peers = {k: v for k, v in contestants(arena.cluster).items() if args.peers is None or k in args.peers}
    for name, how in peers.items():
        reason = _behind(name, earlier, batch / expected)
        if name.endswith("_m32") and batch < 4 * 32:
            reason = "not run: fewer than 4 rows a micro-batch"
        if not reason and name == "ddp_5mb" and expects.get("data_parallel", 0.0) > LONG_S:
            reason = "not run: bytes decide here, not buckets"
        if not reason:
            found[name] = [arena.peer(model=model, batch=batch, **_steps(name, expects), **how)]
        else:
            found[name] = [failed(reason)]
        _say(arena, model, batch, name, found[name][0])
    found["auto"] = [arena.attempt(prepared, plan, steps=3)]
    _say(arena, model, batch, f"auto ({plan.strategy}, predicted {expected:.3f} s)", found["auto"][0])
    ran = [name for name in peers if found[name][0].step_s]
    best = min(ran, key=lambda n: middle(found[n][0].step_s), default="")
    for _ in range(args.rounds - 1):  # who is second is settled: first and second take turns again
        if best:
            found[best].append(arena.peer(model=model, batch=batch, steps=3, **peers[best]))
            _say(arena, model, batch, best, found[best][-1])
        found["auto"].append(arena.attempt(prepared, plan, steps=5))
        _say(arena, model, batch, "auto", found["auto"][-1])
    return {
        "cluster": arena.cluster.name,
        "model": model,
        "batch": batch,
        "auto_strategy": plan.strategy,
        "predicted_step_time_s": expected,
        "losses_s": losses(prepared, plan, times, arena.cluster),
        "plan": plan.to_data(),
        "tried": trials(tryout),
        "predictions": expects,
        "plans": _others(arena, prepared, times, plan, args.also if batch == min(args.batches) else ()),
        "rounds": {name: [m.data() for m in rounds] for name, rounds in found.items()},
    }


def _steps(name: str, expects: dict[str, float]) -> dict[str, int]:
    """Timed steps and warm-up of a peer in the first round, fewer where a step is long."""
    if name.startswith(("ddp", "fsdp")) and expects.get("data_parallel", 0.0) > LONG_S:
        # Its bytes take so long that what the first step costs once is small.
        return {"steps": 1, "warmup": 0}
    return {"steps": 1 if name in SLOW or expects["single"] > LONG_STEP_S else 2}


def _others(
    arena: Arena, prepared: Any, times: Profile, auto: Plan, strategies: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Plans of further strategies, for the prediction table: each shape once."""
    rows: dict[str, dict[str, Any]] = {}
    seen = {shape(auto)}
    for strategy in strategies:
        try:
            plan, _ = choose(prepared.job, arena.cluster, prepared.traced.graph, times, strategy)
            if shape(plan) in seen:
                continue
            seen.add(shape(plan))
            one = arena.plan(prepared, plan, steps=4)
        except SpanwiseError as error:
            print(f"{strategy}: {error}", flush=True)
            continue
        expected = predicted_s(prepared, plan, times, arena.cluster)
        rows[strategy] = {"predicted_s": expected, "step_s": one.step_s, "plan": plan.to_data()}
        _say(arena, prepared.job.name, prepared.job.batch, f"{strategy}, predicted {expected:.3f} s", one)
    return rows


def _behind(name: str, earlier: dict[str, Any] | None, target: float) -> str:
    """Why a peer need not run a larger batch: it could not win even if that took no longer than the smaller.

    Also the bucket size of DDP that lost with the smaller batch: its docs say to take the better one.
    """
    seconds = {n: step_s(rounds) for n, rounds in (earlier or {"rounds": {}})["rounds"].items()}
    mine = seconds.get(name)
    if mine is None:
        return ""
    if name.startswith("ddp"):
        other = seconds.get("ddp" if name == "ddp_5mb" else "ddp_5mb")
        if other is not None and other < mine:
            return "not run: the other bucket size was faster with the smaller batch"
    most = max(BATCHES) / mine
    if mine > LONG_S and most < 0.8 * target:
        return f"not run: {mine:.1f} s a step with the smaller batch, so at most {most:.1f} samples/s here"
    return ""


def _say(arena: Arena, model: str, batch: int, name: str, one: Measurement) -> None:
    text = one.error[:160] if one.error else f"{middle(one.step_s):.3f} s"
    print(f"{arena.cluster.name} {model} {batch}: {name}: {text}", flush=True)


def main() -> None:
    args = options()
    need_lab(args)
    kept = Cells(args)
    cells = kept.found
    began = time.monotonic()
    for name in args.environments:
        done = {(c["model"], c["batch"]): c for c in cells if c["cluster"] == name}
        todo = {m: [b for b in args.batches if (m, b) not in done] for m in args.models}
        models = [m for m in args.models if todo[m]]
        if not models:
            continue
        with Arena(Cluster.load(CLUSTERS / f"{name}.toml"), models) as arena:
            for model in models:
                earlier = done.get((model, min(args.batches)))
                for batch in todo[model]:
                    earlier = cell(arena, model, batch, args, earlier)
                    kept.add(earlier)
    result = {"seconds": time.monotonic() - began, "cells": cells}
    rows = summarize(cells)
    for row in rows:
        print(row["text"])
    if args.short:
        return
    keep(args, HERE, "throughput", result, quiet=True)
    draw(rows, HERE / "throughput.svg")


if __name__ == "__main__":
    main()
