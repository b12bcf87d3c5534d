"""What spanwise costs where it cannot help: one undelayed device against a plain PyTorch loop.

A plain loop and the executor's `single` plan train the same model on the same rows in turn (A/B alternated,
one thread), so noise of the machine meets both. A second part divides the executor's own time, everything
but compute, by the number of actions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from harness import keep, options, redrawn, summary
from pictures import OURS, canvas

from spanwise.api.planning import choose
from spanwise.api.prepare import Prepared, prepare
from spanwise.api.times import profile_prepared
from spanwise.core.cluster import Cluster
from spanwise.core.job import Job
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.lowering import lower
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.feed import Sampler, read_rows, shard
from spanwise.runtime.pool import Meeting, WorkerPool
from spanwise.runtime.processes import ProcessSession
from spanwise.runtime.session import Session
from spanwise.runtime.threads import ThreadSession

HERE = Path(__file__).resolve().parent
ONE = Cluster.parse({"name": "one", "devices": [{"id": "here", "memory": "8 GiB"}], "data": ["here"]})
MODELS: dict[str, dict[str, Any]] = {
    "mobilenet_v2": {
        "model": {"name": "spanwise.zoo:mobilenet_v2"},
        "data": {"name": "spanwise.zoo.data:digits", "size": 32},
        "batch": 32,
    },
    "resnet18": {
        "model": {"name": "spanwise.zoo:resnet18"},
        "data": {"name": "spanwise.zoo.data:digits", "size": 32},
        "batch": 16,
    },
    "gpt": {
        "model": {
            "name": "spanwise.zoo:gpt",
            "vocab": 128,
            "n_layer": 4,
            "n_head": 4,
            "d_model": 128,
            "seq": 64,
        },
        "data": {"name": "spanwise.zoo.data:synthetic_text", "rows": 512, "seq": 64, "vocab": 128},
        "loss": "spanwise.zoo.losses:language_model_loss",
        "batch": 32,
    },
}


def plain_step(prepared: Prepared, work: Assignment) -> Callable[[int], None]:
    """The loop that people write, on the same rows."""
    import copy

    model = copy.deepcopy(prepared.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sampler: Sampler = work.sampler
    held = shard(len(prepared.train), work.shares, "here")

    def step(index: int) -> None:
        optimizer.zero_grad()
        indices = held[sampler.indices(0, index)]
        for rows in indices:
            x, (y,) = read_rows(prepared.train, rows)
            loss = prepared.loss(model(*x), y) / len(indices)
            loss.backward()
        optimizer.step()

    return step


def compare(name: str, repeats: int, backend: str) -> dict[str, Any]:
    """Samples per second of both, alternated step by step."""
    spec = {"optimizer": {"name": "SGD", "lr": 0.01, "momentum": 0.9}, "seed": 0, **MODELS[name]}
    prepared = prepare(Job.parse(spec))
    times = profile_prepared(prepared, ONE, None)
    plan, _ = choose(prepared.job, ONE, prepared.traced.graph, times, "single")
    program = lower(plan, prepared.traced.graph)
    work = Assignment(
        prepared.job, ONE, prepared.traced.graph, prepared.traced.ops, plan, program, len(prepared.train)
    )
    tensors = prepared.traced.parameters | prepared.traced.buffers
    pool: WorkerPool | None = None
    session: Session
    if backend == "threads":
        session = ThreadSession(work, tensors, prepared.train)
    else:
        pool = WorkerPool(ONE, ("here",), Meeting(), emulate=False)
        session = ProcessSession(pool, work, tensors, None)
    plain = plain_step(prepared, work)
    ours, theirs = [], []
    for index in range(repeats + 2):
        start = time.perf_counter()
        plain(index)
        middle = time.perf_counter()
        list(session.run(index, 1))
        theirs.append(middle - start)
        ours.append(time.perf_counter() - middle)
    session.close()
    if pool is not None:
        pool.close()
    ratios = [t / o for t, o in zip(theirs[2:], ours[2:], strict=True)]
    return {
        "plan": f"{plan.micro_batches} x {plan.micro_batch_rows}",
        "plain_step_s": summary(theirs[2:]),
        "spanwise_step_s": summary(ours[2:]),
        "throughput_ratio": summary(ratios),
    }


def per_action(steps: int) -> dict[str, Any]:
    """Executor time outside compute per action: a pipeline of an empty-ish model on one device."""
    spec = {
        "model": {"name": "spanwise.zoo:mlp", "sizes": [8, 8, 8, 8, 4]},
        "data": {"name": "spanwise.zoo.data:synthetic_vectors", "rows": 512, "features": 8, "classes": 4},
        "batch": 64,
    }
    prepared = prepare(Job.parse(spec))
    graph = prepared.traced.graph
    rows = (Replica(device="here", rows=2),)
    stages = tuple(
        Stage(start=i, stop=i + 1, replicas=rows, warmup=len(graph) - i) for i in range(len(graph))
    )
    plan = Plan(
        strategy="many-actions", graph_digest=graph.digest, micro_batches=32, micro_batch_rows=2,
        sources=rows, stages=stages,
    )  # fmt: skip
    program = lower(plan, graph)
    work = Assignment(prepared.job, ONE, graph, prepared.traced.ops, plan, program, len(prepared.train))
    session = ThreadSession(work, prepared.traced.parameters | prepared.traced.buffers, prepared.train)
    own: list[float] = []
    whole: list[float] = []
    for index in range(steps):
        list(session.run(index, 1))
        _, start, end, busy, _ = session.spans()[0].steps[-1]
        own.append((end - start - busy) / len(program))
        whole.append((end - start) / len(program))
    session.close()
    return {
        "actions": len(program),
        "own_s_per_action": summary(own[1:]),
        "whole_s_per_action_with_compute_and_autograd": summary(whole[1:]),
    }


def draw(data: dict[str, Any], path: Path) -> None:
    """Throughput over that of a plain loop, one dot with its quartiles for every model and backend."""
    found = [(m, b, one["throughput_ratio"]) for m, pair in data["models"].items() for b, one in pair.items()]
    action_us = data["per_action"]["own_s_per_action"]["median"] * 1e6
    with canvas(path, (7.0, 2.6)) as (axis,):
        for place, (_, _, ratio) in enumerate(found):
            low, high = ratio["median"] - ratio["q1"], ratio["q3"] - ratio["median"]
            axis.errorbar(ratio["median"], place, xerr=[[low], [high]], fmt="o", color=OURS, capsize=3)
        axis.axvline(1.0, color="#888888", lw=0.8)
        axis.set_yticks(range(len(found)), [f"{model}, {backend}" for model, backend, _ in found], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0.9, 1.1)
        axis.set_xlabel("throughput over that of a plain PyTorch loop (median, quartiles)")
        axis.set_title(f"1.0 is free; an action costs {action_us:.0f} us", fontsize=10, loc="left")


def main() -> None:
    args = options(__doc__ or "")
    if redrawn(args, HERE, "overhead", draw):
        return
    torch.set_num_threads(1)
    repeats = 4 if args.short else 20
    models = ["gpt"] if args.short else list(MODELS)
    result: dict[str, Any] = {"per_action": per_action(10 if args.short else 50), "models": {}}
    for name in models:
        result["models"][name] = {b: compare(name, repeats, b) for b in ("threads", "processes")}
    keep(args, HERE, "overhead", result, draw=draw)


if __name__ == "__main__":
    main()
