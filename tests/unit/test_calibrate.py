"""Undisturbed times: one for every kind of work in the Program, nothing of the model changed."""

from __future__ import annotations

import torch
from torch import nn

from spanwise.core.plan import Plan, Replica, Stage
from spanwise.lowering import lower, natural_syncs
from spanwise.ops.stage_module import StageModule
from spanwise.profiler.trace import trace
from spanwise.runtime.calibrate import undisturbed_times

BOTH = (Replica(device="a", rows=2), Replica(device="b", rows=2))


def test_every_kind_of_work_is_timed() -> None:
    """Two stages on both devices, their gradients summed in two segments."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
        nn.Linear(8, 3),
    ).train()  # fmt: skip
    rows = (torch.randn(4, 6),), (torch.randint(3, (4,)),)
    found = trace(model, nn.functional.cross_entropy, *rows, name="model")
    graph = found.graph
    stages = (Stage(start=0, stop=2, replicas=BOTH, warmup=2), Stage(start=2, stop=len(graph), replicas=BOTH))
    (sync,) = natural_syncs(stages, graph)
    plan = Plan(
        strategy="test", graph_digest=graph.digest, micro_batches=2, micro_batch_rows=4, sources=BOTH,
        stages=stages, syncs=(sync.model_copy(update={"segments": 2}),),
    )  # fmt: skip
    program = lower(plan, graph)
    modules = {
        index: StageModule(
            found.ops, graph, s.start, s.stop, parameters=found.parameters, buffers=found.buffers
        )
        for index, s in enumerate(stages)
    }
    before = {name: value.clone() for name, value in found.buffers.items()}
    times = undisturbed_times(plan, graph, program, "a", modules, found.parameters, found.buffers)
    work = {
        (action.work, action.stage)
        for action in program.devices["a"]
        if action.kind.startswith(("forward", "backward"))
    }
    assert {name for name, _ in work} > {"forward", "backward", "backward_input"}
    assert work <= times.keys()
    assert all(seconds > 0 for seconds in times.values())
    assert all(p.grad is None for p in found.parameters.values())
    assert all(torch.equal(value, before[name]) for name, value in found.buffers.items())
