"""DSparse on seven devices of unequal memory: bytes, traffic, time and accuracy against dense training.

Every plan runs in a lab of its own with fresh workers, so that its peak is its own: sparse ones under the
budgets of the cluster file, dense ones with room. Accuracy is trained on threads of this process, by the same
plans and the same runtime, without the pace of the devices.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from arena import CLUSTERS, Arena
from contestants import CONTESTANTS, DENSE, SUBJECT, TRAINED_SHARE, Contestant, with_room
from digits import PRETRAINED_EPOCHS, Scale, data, job, prepared, pretrained
from harness import Cells, keep, parser
from tables import main as show
from tables import tables

from spanwise.api.planning import predict
from spanwise.api.prepare import Prepared
from spanwise.api.scores import scores
from spanwise.core.cluster import Cluster
from spanwise.core.errors import SpanwiseError
from spanwise.core.importance import Importance
from spanwise.core.job import Job
from spanwise.core.plan import Plan
from spanwise.core.profile import DeviceTimes, Profile
from spanwise.lab import reason_against
from spanwise.lowering import lower, units_of
from spanwise.planner import Problem
from spanwise.profiler.scale import analytic_table
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.evaluate import evaluate
from spanwise.runtime.measure import step_times
from spanwise.runtime.processes import ProcessSession
from spanwise.runtime.threads import ThreadSession
from spanwise.runtime.training import load_into

HERE = Path(__file__).resolve().parent
ROWS = 32  # of each device in a step
COLLECTIVES = ("reduce", "average", "broadcast")
FEW_ROWS = 2
OVERHEAD = "overhead"  # a cell: what a worker holds besides tensors, once it has trained
LAB = (
    DENSE, "dense_by_tensor", "dense_micro_batch", "dense_recompute", SUBJECT, "dsparse_wide",
    "dsparse_stored", "dsparse_lazy", "dsparse_grouped", "dsparse_masked", "same_for_all", "last_k",
)  # fmt: skip
ACCURACY = {
    "pretrained": (DENSE, SUBJECT, "dsparse_stored", "dsparse_wide", "dsparse_lazy", "same_for_all", "last_k",
                   "shifts_only", "random"),
    "skewed": (DENSE, SUBJECT, "dsparse_wide", "last_k"),
    "scratch": (DENSE, "dsparse_wide"),
}  # fmt: skip


def options() -> argparse.Namespace:
    found = parser(__doc__ or "")
    found.add_argument("--lab", nargs="*", choices=list(CONTESTANTS), default=list(LAB))
    found.add_argument("--settings", nargs="*", choices=list(ACCURACY), default=list(ACCURACY))
    found.add_argument("--plans", nargs="*", choices=list(CONTESTANTS), help="only these in trainings")
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--epochs", type=int, default=10)
    found.add_argument("--lr", type=float, default=0.02)
    found.add_argument("--stored-lr", type=float, default=0.005, help="with stored statistics")
    found.add_argument("--pretrained-epochs", type=int, default=PRETRAINED_EPOCHS)
    found.add_argument("--steps", type=int, default=4, help="timed steps of a plan")
    found.add_argument("--cache", type=Path, default=None, help="folder of profiles and trained models")
    found.add_argument(
        "--cifar", type=Path, default=None, help="folder of CIFAR-10's files, in place of digits"
    )
    args = found.parse_args()
    wanted = args.plans or list(CONTESTANTS)
    args.scale = Scale(cifar=args.cifar)
    args.contestants = {k: tuple(n for n in names if n in wanted) for k, names in ACCURACY.items()}
    if args.short:
        args.scale = Scale(0.25, 16, args.cifar)
        args.pretrained_epochs, args.epochs, args.seeds = 2, 1, 1
        args.lab, args.settings, args.steps = [SUBJECT], ["pretrained"], 1
        args.contestants = {"pretrained": (DENSE, SUBJECT)}
    return args


def cluster_of(args: argparse.Namespace) -> Cluster:
    """The cluster file; a small model gets budgets that are as tight for it."""
    cluster = Cluster.load(CLUSTERS / "dsparse-7.toml")
    if not args.short:
        return cluster
    devices = tuple(d.model_copy(update={"memory_bytes": d.memory_bytes // 12}) for d in cluster.devices)
    return cluster.model_copy(update={"devices": devices})


def job_of(args: argparse.Namespace, one: Contestant, rows: int, seed: int, epochs: int) -> Job:
    """Rows a device; stored statistics take a smaller step, or training diverges."""
    lr = args.stored_lr if one.stored else args.lr
    batch = rows * len(cluster_of(args).devices)
    return job(batch, seed, lr, epochs, stored=one.stored, trained_share=TRAINED_SHARE)


def problem_of(found: Prepared, times: Profile, cluster: Cluster, importance: Importance | None) -> Problem:
    return Problem(
        graph=found.traced.graph, profile=times, cluster=cluster, job=found.job, importance=importance
    )


def analytic(found: Prepared, cluster: Cluster) -> Profile:
    """Times by FLOPs: accuracy does not depend on them, and a short run takes none."""
    table = analytic_table(found.traced.graph, 2e10, 1e10)
    factors = tuple(DeviceTimes(device=d.id, factor=1 / cluster.core_share) for d in cluster.devices)
    return Profile(graph_digest=found.traced.graph.digest, tables=(table,), devices=factors)


def union_share(found: Prepared, plan: Plan) -> float:
    """Share of the model's bytes that anyone trains."""
    if not plan.sparse:
        return 1.0
    graph = found.traced.graph
    return sum(u.nbytes for u in units_of(plan, graph) if u.trainers) / graph.parameter_bytes


def measured(found: Prepared, plan: Plan, times: Profile, cluster: Cluster, steps: int) -> dict[str, Any]:
    """One plan in a lab of its own: step, aggregation, bytes sent and the peaks of its devices, beside those
    predicted.
    """
    graph = found.traced.graph
    expected = predict(plan, graph, times, cluster, found.job)
    own: dict[str, Any] = {
        "by_layers_s": expected.step_time_s, "union": union_share(found, plan),
        "predicted_bytes": {u.device: u.peak_memory_bytes for u in expected.devices},
        "predicted_sent": {u.device: u.sent_bytes for u in expected.devices},
        "ways": [[len(g.trainers), g.way, g.refresh_every] for g in plan.groups],
    }  # fmt: skip
    assignment = Assignment(
        found.job, cluster, graph, found.traced.ops, plan, lower(plan, graph), len(found.train)
    )
    tensors = {k: v.detach() for k, v in found.traced.parameters.items()} | dict(found.traced.buffers)
    with Arena(cluster, [], huge_pages=plan.sparse) as arena:
        idle = {d: psutil.Process(pid).memory_info().rss for d, pid in arena.pool.process_ids.items()}
        started = {d: arena.lab.peak_memory_bytes(d) for d in cluster.ids}
        with arena.lab.eased():
            session = ProcessSession(arena.pool, assignment, tensors, found.train)
            if plan.sparse:  # as ``train`` does
                times = times.model_copy(update={"stages": session.stage_times()})
                expected = predict(plan, graph, times, cluster, found.job)
        list(session.run(0, 1))
        before = arena.lab.sent_bytes()
        reports = list(session.run(1, steps + 1))  # a step counts from the end of the one before
        after = arena.lab.sent_bytes()
        seconds = step_times(reports, skip=0)
        peaks = {d: arena.lab.peak_memory_bytes(d) for d in cluster.ids}
        waits = [aggregation_s(spans.steps) for spans in session.spans()]
    return own | {
        "predicted_s": expected.step_time_s,
        "step_s": seconds,
        "aggregation_s": min((statistics.median(w) for w in waits if w), default=0.0),
        "sent_bytes": {d: (after[d] - before[d]) / (steps + 1) for d in cluster.ids},
        "peak_bytes": {d: peaks[d] - idle[d] for d in cluster.ids},
        "worker_bytes": {d: {"started": started[d], "peak": peaks[d]} for d in cluster.ids},
    }


def overhead_bytes(
    args: argparse.Namespace, model: Any, cluster: Cluster, importance: Importance | None
) -> dict[str, float]:
    """By device: what a worker takes to train besides tensors.

    Kernels that are compiled, connections, orders, what the allocator cannot use. All layers are trained on
    few rows; from the peak goes what was predicted.
    """
    one = CONTESTANTS["dsparse_wide"]
    few = prepared(model, job_of(args, one, FEW_ROWS, 0, 1), data(args.scale, turned=True))
    times = analytic(few, cluster)
    plan = one.make(problem_of(few, times, cluster, importance))
    cell = measured(few, plan, times, cluster, 1)
    return {d: cell["peak_bytes"][d] - cell["predicted_bytes"][d] for d in cluster.ids}


def aggregation_s(steps: Sequence[tuple[Any, ...]]) -> list[float]:
    """Seconds of each recorded step that a device waited for collectives.

    The least over all devices is what aggregation takes: the device that computes longest waits for nobody.
    """
    return [
        sum(b - a for _, kind, text, a, b in spans if kind == "wait" and text.startswith(COLLECTIVES))
        for *_, spans in steps
    ]  # fmt: skip


def lab_cells(args: argparse.Namespace, kept: Cells) -> None:
    """Every plan once; the profile is taken once and kept among the cells."""
    done = {c["lab"] for c in kept.found if "lab" in c}
    todo = [name for name in args.lab if name not in done]
    reason = reason_against()
    if not todo or reason:
        print(f"lab: {reason or 'nothing left'}", flush=True)
        return
    cluster = cluster_of(args)
    model = pretrained(args.scale, 0, args.pretrained_epochs, args.cache)
    sets = data(args.scale, turned=True)
    found = prepared(model, job_of(args, CONTESTANTS[SUBJECT], ROWS, 0, 1), sets)
    times = analytic(found, cluster) if args.short else profile(args, kept, found, with_room(cluster))
    importance = scores(found, SUBJECT)
    if not args.short and not any(OVERHEAD in c for c in kept.found):
        kept.add({OVERHEAD: overhead_bytes(args, model, with_room(cluster), importance)})
    for name in todo:
        began, one = time.monotonic(), CONTESTANTS[name]
        where = with_room(cluster) if one.roomy else cluster
        try:
            own = replace(found, job=job_of(args, one, ROWS, 0, 1))
            known = scores(own, SUBJECT) if one.stored else importance
            plan = one.make(problem_of(own, times, where, known))
            cell = measured(own, plan, times, where, args.steps) | {"plan": plan.digest}
        except SpanwiseError as error:
            cell = {"error": f"{type(error).__name__}: {error}"}
        kept.add({"lab": name, **cell})
        text = cell.get("error") or f"{statistics.median(cell['step_s']):.2f} s a step"
        print(f"lab, {name}: {text} ({time.monotonic() - began:.0f} s)", flush=True)


def profile(args: argparse.Namespace, kept: Cells, found: Prepared, cluster: Cluster) -> Profile:
    """Of all devices under their shares; from the cells of a run that was cut off."""
    before = next((c["profile"] for c in kept.found if "profile" in c), None)
    if before is not None:
        return Profile.parse(before)
    with Arena(cluster, []) as arena:
        times = arena.profile(found, args.cache)
    kept.add({"profile": times.to_data()})
    return times


def trained(found: Prepared, plan: Plan, cluster: Cluster, epochs: int) -> list[dict[str, float]]:
    """Loss and accuracy on the test set after every epoch; threads of this process."""
    graph, traced = found.traced.graph, found.traced
    assignment = Assignment(found.job, cluster, graph, traced.ops, plan, lower(plan, graph), len(found.train))
    tensors = {k: v.detach().clone() for k, v in traced.parameters.items()}
    tensors |= {k: v.clone() for k, v in traced.buffers.items()}
    session = ThreadSession(assignment, tensors, found.train)
    curve: list[dict[str, float]] = []
    per_epoch = assignment.sampler.steps_per_epoch
    try:
        for epoch in range(epochs):
            losses = [report.loss for report in session.run(epoch * per_epoch, per_epoch)]
            load_into(found.model, session.snapshot())
            assert found.test is not None
            score = evaluate(found.model, found.loss, found.test, graph)
            curve.append(
                {"loss": statistics.fmean(losses), "test_loss": score.loss, "accuracy": score.accuracy or 0.0}
            )
    finally:
        session.close()
    return curve


def accuracy_cells(args: argparse.Namespace, kept: Cells) -> None:
    """Every setting, seed and contestant."""
    done = {(c["setting"], c["seed"], c["name"]) for c in kept.found if "setting" in c}
    torch.set_num_threads(1)
    for setting in args.settings:
        for name in args.contestants[setting]:
            for seed in range(args.seeds):
                if (setting, seed, name) not in done:
                    began = time.monotonic()
                    cell = accuracy(args, setting, seed, name)
                    kept.add({"setting": setting, "seed": seed, "name": name, **cell})
                    last = cell["curve"][-1]["accuracy"] if cell.get("curve") else cell["error"]
                    print(
                        f"{setting}, seed {seed}, {name}: {last} ({time.monotonic() - began:.0f} s)",
                        flush=True,
                    )


def accuracy(args: argparse.Namespace, setting: str, seed: int, name: str) -> dict[str, Any]:
    """One run from the same start; the model is loaded anew, as a run leaves its weights in it."""
    scratch, cluster = setting == "scratch", cluster_of(args)
    if setting == "skewed":
        cluster = Cluster.parse({**cluster.to_data(), "data": list(cluster.ids)})
    model = args.scale.model(seed) if scratch else pretrained(
        args.scale, seed, args.pretrained_epochs, args.cache
    )  # fmt: skip
    epochs = args.epochs * (3 if scratch else 1)
    sets = data(
        args.scale, turned=not scratch, skewed_over=len(cluster.devices) if setting == "skewed" else 0
    )
    one = CONTESTANTS[name]
    found = prepared(model, job_of(args, one, ROWS, seed, epochs), sets)
    try:
        start = evaluate(found.model, found.loss, sets[1], found.traced.graph).accuracy
        importance = (
            None if one.roomy else scores(found, "dsparse_magnitude" if name == "magnitude" else SUBJECT)
        )
        where = with_room(cluster) if one.roomy else cluster
        plan = one.make(problem_of(found, analytic(found, cluster), where, importance))
        return {
            "start": start, "union": union_share(found, plan), "curve": trained(found, plan, where, epochs)
        }  # fmt: skip
    except SpanwiseError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def report(kept: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cells by kind."""
    return {
        "lab": [c for c in kept if "lab" in c],
        OVERHEAD: next((c[OVERHEAD] for c in kept if OVERHEAD in c), {}),
        "accuracy": [c for c in kept if "setting" in c],
    }


def main() -> None:
    args = options()
    if args.redraw:
        show()
        return
    kept = Cells(args)
    left = sum(len(args.contestants[s]) * args.seeds for s in args.settings)
    if not args.short:
        print(f"about {len(args.lab)} plans in the lab and {left} trainings", flush=True)
    lab_cells(args, kept)
    accuracy_cells(args, kept)
    found = report(kept.found)
    print("\n".join(tables(found)))
    keep(args, HERE, "dsparse", found, quiet=True)


if __name__ == "__main__":
    main()
