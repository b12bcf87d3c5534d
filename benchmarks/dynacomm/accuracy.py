"""Test accuracy after every epoch under every strategy over a server, against one device on the same rows."""

from __future__ import annotations

from typing import Any

from spanwise.api.planning import choose
from spanwise.api.prepare import Prepared, prepare
from spanwise.core.cluster import Cluster
from spanwise.core.job import Job
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.core.profile import DeviceTimes, LayerTimes, Profile, TimeTable
from spanwise.lowering import lower
from spanwise.planner import SERVER_STRATEGIES
from spanwise.runtime.device_run import Assignment, Snapshot
from spanwise.runtime.evaluate import evaluate
from spanwise.runtime.threads import ThreadSession
from spanwise.runtime.training import load_into

FLOPS_PER_S = 1e9  # which segments come out matters here, not how long they take


def accuracy(cluster: Cluster, epochs: int) -> dict[str, Any]:
    """Losses and accuracies by strategy, and whether accuracies and parameters have the same bits.

    A server adds its devices' gradients up in order, one device its micro-batches': with as many of these as
    there are devices, and the same rows in each, the arithmetic is the same. Losses are only reported, and
    added up in float64 over devices where one device adds in float32.
    """
    devices = len(cluster.ids) - 1
    cluster = cluster.model_copy(update={"data": "everywhere"})  # so that one device draws the same rows
    job = Job.parse(
        {
            "name": "digits", "model": "spanwise.zoo:lenet5", "epochs": epochs, "batch": 16 * devices,
            "data": {"name": "spanwise.zoo:digits", "channels": 1},
            "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        }
    )  # fmt: skip
    prepared = prepare(job)
    graph = prepared.traced.graph
    plans = {
        name: choose(job, cluster, graph, _times(prepared, cluster), name)[0] for name in SERVER_STRATEGIES
    }
    alone = (Replica(device=cluster.ids[0], rows=16),)
    plans["one device"] = Plan(
        strategy="one device", graph_digest=graph.digest, micro_batches=devices, micro_batch_rows=16,
        sources=alone, stages=(Stage(start=0, stop=len(graph), replicas=alone),), schedule="gpipe",
    )  # fmt: skip
    found = {name: _trained(prepared, cluster, plan, epochs) for name, plan in plans.items()}
    curve, weights = found["one device"]
    same = {
        name: [at["accuracy"] for at in own] == [at["accuracy"] for at in curve]
        and all(own_weights[k].equal(v) for k, v in weights.items())
        for name, (own, own_weights) in found.items()
    }
    return {"curves": {name: own for name, (own, _) in found.items()}, "same_bits": same}


def _trained(
    prepared: Prepared, cluster: Cluster, plan: Plan, epochs: int
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Loss of every step's last epoch and accuracy behind every epoch; the parameters in the end."""
    traced = prepared.traced
    tensors = {k: v.detach().clone() for k, v in traced.parameters.items()} | dict(traced.buffers)
    program = lower(plan, traced.graph)
    work = Assignment(prepared.job, cluster, traced.graph, traced.ops, plan, program, len(prepared.train))
    session = ThreadSession(work, tensors, prepared.train)
    kept = Snapshot()
    curve: list[dict[str, float]] = []
    try:
        each = work.sampler.steps_per_epoch
        for epoch in range(epochs):
            reports = list(session.run(epoch * each, each))
            kept = session.snapshot()
            scored = prepare(prepared.job)
            load_into(scored.model, kept)
            assert scored.test is not None
            score = evaluate(scored.model, scored.loss, scored.test, traced.graph)
            curve.append({"loss": reports[-1].loss, "accuracy": score.accuracy or 0.0})
    finally:
        session.close()
    return curve, dict(kept.parameters)


def _times(prepared: Prepared, cluster: Cluster) -> Profile:
    """Layer times by FLOP."""
    graph = prepared.traced.graph
    layers = tuple(
        LayerTimes(
            forward_s=(layer.forward_flops / FLOPS_PER_S,), backward_s=(layer.backward_flops / FLOPS_PER_S,)
        )
        for layer in graph.layers
    )
    table = TimeTable(rows=(1,), layers=layers, provenance="analytic")
    devices = tuple(DeviceTimes(device=device) for device in cluster.ids)
    return Profile(graph_digest=graph.digest, tables=(table,), devices=devices)
