"""Undisturbed times: one for every kind of work in the Program, nothing of the model changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spanwise.core.plan import Plan, Replica, ScheduleName, Stage
from spanwise.lowering import lower, natural_syncs
from spanwise.ops.stage_module import StageModule
from spanwise.profiler.trace import trace
from spanwise.runtime.calibrate import undisturbed_times

BOTH = (Replica(device="a", rows=2), Replica(device="b", rows=2))


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_every_kind_of_work_is_timed(schedule: ScheduleName) -> None:
    """Two stages, gradients summed in two segments: whole backwards, or halves, two weight halves at once."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
        nn.Linear(8, 3),
    ).train()  # fmt: skip
    rows = (torch.randn(4, 6),), (torch.randint(3, (4,)),)
    found = trace(model, nn.functional.cross_entropy, *rows, name="model")
    graph = found.graph
    cut, others, order = 2, BOTH, None
    if schedule == "zero_bubble":
        cut, order = len(graph) - 2, "F0 I0 W0 F1 F2 I1 I2 W1 W2"
        others = tuple(Replica(device=d, rows=2) for d in ("c", "d"))
    stages = (
        Stage(start=0, stop=cut, replicas=BOTH, warmup=2, order=order),
        Stage(start=cut, stop=len(graph), replicas=others, warmup=2, order=order),
    )
    syncs = (sync.model_copy(update={"segments": 2}) for sync in natural_syncs(stages, graph))
    plan = Plan(
        strategy="test", graph_digest=graph.digest, micro_batches=3, micro_batch_rows=4, sources=BOTH,
        stages=stages, schedule=schedule, syncs=tuple(syncs),
    )  # fmt: skip
    program = lower(plan, graph)
    modules = {
        index: StageModule(
            found.ops, graph, s.start, s.stop, parameters=found.parameters, buffers=found.buffers
        )
        for index, s in enumerate(stages)
        if "a" in s.devices
    }
    before = {name: value.clone() for name, value in found.buffers.items()}
    times = undisturbed_times(plan, graph, program, "a", modules, found.parameters, found.buffers)
    work = {
        (action.work, action.stage)
        for action in program.devices["a"]
        if action.kind.startswith(("forward", "backward"))
    }
    names = {name for name, _ in work}
    if schedule == "1f1b":
        assert names > {"forward", "backward", "backward_input"}
    else:
        assert names > {"forward", "backward_input", "backward_weight"}
        assert any(name.startswith("backward_weight of 2 [") for name in names)
    assert work <= times.keys()
    assert all(seconds > 0 for seconds in times.values())
    assert all(p.grad is None for p in found.parameters.values())
    assert all(torch.equal(value, before[name]) for name, value in found.buffers.items())
