"""Single rules of lowering and of its proof, each broken on purpose: chance need not find them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plan_cases import chain, plan, spec, stage
from spanwise.core.errors import PlanError
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.program import Action, Program
from spanwise.lowering import check, lower

GRAPH = chain(4)
HYBRID = plan(GRAPH, stage(0, 2, "a:3 b:5", 2), stage(2, 4, "c:6 d:2"), micro_batches=3)


def before_first_forward(found: Plan, kind: str) -> int:
    """Actions of a kind that the first device takes ahead of all compute."""
    actions = lower(found, GRAPH).devices["a"]
    first = next(i for i, action in enumerate(actions) if action.kind == "forward")
    return sum(action.kind == kind for action in actions[:first])


@pytest.mark.parametrize(("warmup", "micro_batches", "ahead"), [(1, 6, 2), (3, 6, 4), (6, 6, 6), (1, 1, 1)])
def test_a_source_that_computes_loads_one_more_than_its_warm_up(
    warmup: int, micro_batches: int, ahead: int
) -> None:
    found = plan(GRAPH, stage(0, 2, "a:8", warmup), stage(2, 4, "b:8"), micro_batches=micro_batches)
    assert before_first_forward(found, "load") == ahead


def test_gradients_come_back_only_for_what_has_one() -> None:
    """A mask that crosses the cut is sent forth with the activations; nothing comes back for it."""
    mask = spec("mask", 5, dtype="int64", item_bytes=8)
    layers = (*GRAPH.layers[:1], GRAPH.layers[1].model_copy(update={"outputs": (spec("x1", 4), mask)}))
    graph = ModelGraph(name="masked", source_digest="0", layers=(*layers, *GRAPH.layers[2:]),
                       inputs=GRAPH.inputs, labels=GRAPH.labels)  # fmt: skip
    program = lower(plan(graph, stage(0, 2, "a:8"), stage(2, 4, "b:8")), graph)
    sent = {
        action.payload: action.nbytes
        for actions in program.devices.values()
        for action in actions
        if action.kind == "send" and action.payload in ("activation", "gradient")
    }
    assert sent == {"activation": 8 * (4 * 4 + 5 * 8), "gradient": 8 * 4 * 4}


def changed(program: Program, device: str, old: Action, new: Action) -> Program:
    actions = tuple(new if action == old else action for action in program.devices[device])
    assert actions != program.devices[device]
    return replace(program, devices={**program.devices, device: actions})


@pytest.mark.parametrize("kind", ["send", "recv"])
def test_a_transfer_names_the_device_at_its_other_end(kind: str) -> None:
    program = lower(HYBRID, GRAPH)
    check(program, HYBRID)
    device = "a" if kind == "send" else "c"
    action = next(a for a in program.devices[device] if a.kind == kind)
    with pytest.raises(PlanError, match="do not match"):
        check(changed(program, device, action, replace(action, peer="d")), HYBRID)


def test_a_sum_waits_for_the_last_gradient() -> None:
    """Begun one backward too early it would sum incomplete gradients, and nothing would hang."""
    program = lower(HYBRID, GRAPH)
    actions = list(program.devices["a"])
    at = next(i for i, action in enumerate(actions) if action.kind == "reduce")
    last = max(i for i, action in enumerate(actions) if action.kind == "backward")
    assert last < at
    actions.insert(last, actions.pop(at))
    with pytest.raises(PlanError, match=r"'reduce .* on a stands in the wrong place"):
        check(replace(program, devices={**program.devices, "a": tuple(actions)}), HYBRID)
