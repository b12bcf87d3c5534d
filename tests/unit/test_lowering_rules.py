"""Single rules of lowering and of its proof, each broken on purpose: chance need not find them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plan_cases import chain, plan, spec, stage
from spanwise.core.errors import PlanError
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan, ScheduleName, Stage
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
    check(program, HYBRID, GRAPH)
    device = "a" if kind == "send" else "c"
    action = next(a for a in program.devices[device] if a.kind == kind)
    with pytest.raises(PlanError, match="do not match"):
        check(changed(program, device, action, action._replace(peer="d")), HYBRID, GRAPH)


def test_a_sum_waits_for_the_last_gradient() -> None:
    """Begun one backward too early it would sum incomplete gradients, and nothing would hang."""
    program = lower(HYBRID, GRAPH)
    actions = list(program.devices["a"])
    at = next(i for i, action in enumerate(actions) if action.kind == "reduce")
    last = max(i for i, action in enumerate(actions) if action.kind == "backward")
    assert last < at
    actions.insert(last, actions.pop(at))
    with pytest.raises(PlanError, match=r"'reduce .* on a stands in the wrong place"):
        check(replace(program, devices={**program.devices, "a": tuple(actions)}), HYBRID, GRAPH)


def in_halves(*orders: str) -> Plan:
    """Two stages of one device each with these orders, on 2 micro-batches."""
    stages = [stage(0, 2, "a:3 b:5", 2), stage(2, 4, "c:8", 2)]
    with_orders = [
        Stage.parse({**s.to_data(), "order": order}) for s, order in zip(stages, orders, strict=True)
    ]
    return Plan.parse({**plan(GRAPH, *stages).to_data(), "stages": with_orders, "schedule": "zero_bubble"})


HALVES = in_halves("F0 F1 I0 W0 I1 W1", "F0 I0 F1 W0 I1 W1")
JOINED = in_halves("F0 F1 I0 I1 W0 W1", "F0 I0 F1 W0 I1 W1")


def test_gradients_leave_after_the_input_half_and_are_summed_after_the_last_weight_half() -> None:
    texts = {d: [str(a) for a in actions] for d, actions in lower(HALVES, GRAPH).devices.items()}
    assert texts["a"][-8:] == [
        "recv gradient s0 m0 [0:3) from c #4 48B", "backward_input s0 m0 [0:3)",
        "backward_weight s0 m0 [0:3)",
        "recv gradient s0 m1 [0:3) from c #5 48B", "backward_input s0 m1 [0:3)",
        "backward_weight s0 m1 [0:3)",
        "reduce y0.0 12B over a,b", "step",
    ]  # fmt: skip
    at = texts["c"].index("backward_input s1 m0 [0:8)")
    assert [text.split()[0] for text in texts["c"][at + 1 : at + 3]] == ["send", "send"]
    assert texts["c"].index("backward_weight s1 m0 [0:8)") > at + 3


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (
            "backward_weight s0 m1 [0:3)",
            "backward_weight s0 m0 [0:3)",
            "does not go on where its backward is",
        ),
        (
            "backward_weight s0 m1 [0:3)",
            "backward s0 m1 [0:3)",
            "'backward_input s0 m1 .*' on a has no weight half",
        ),
        (
            "backward_weight s0 m1 [0:3)",
            "backward_weight s0 m1 [0:2)",
            "does not go on where its backward is",
        ),
    ],
)
def test_both_halves_of_every_backward_are_asked_for(old: str, new: str, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        check(changed(lower(HALVES, GRAPH), "a", Action.parse(old), Action.parse(new)), HALVES, GRAPH)


def test_weight_halves_next_to_each_other_are_one() -> None:
    texts = [str(a) for a in lower(JOINED, GRAPH).devices["a"]]
    assert texts[-4:] == [
        "backward_input s0 m1 [0:3)", "backward_weight s0 m[0:2) [0:3)", "reduce y0.0 12B over a,b", "step",
    ]  # fmt: skip


def test_weight_halves_at_once_go_in_parts_if_the_last_micro_batch_is_among_them() -> None:
    """Parameters of layers 0 and 1 have 4 and 8 bytes: two segments."""
    syncs = tuple(sync.model_copy(update={"ends": (1, 2)}) for sync in JOINED.syncs)
    found = JOINED.model_copy(update={"syncs": syncs})
    texts = [str(a) for a in lower(found, GRAPH).devices["b"]]
    assert texts[-5:] == [
        "backward_weight s0 m[0:2) [3:8) layers [1:2)", "reduce y0.1 8B over a,b",
        "backward_weight s0 m[0:2) [3:8) layers [0:1)", "reduce y0.0 4B over a,b", "step",
    ]  # fmt: skip
    program = lower(found, GRAPH)
    old = Action.parse("backward_weight s0 m[0:2) [3:8) layers [0:1)")
    with pytest.raises(PlanError, match=r"'backward_input s0 m1 .*' on b has no weight half"):
        check(changed(program, "b", old, old._replace(at_once=1)), found, GRAPH)


@pytest.mark.parametrize(
    ("new", "why"),
    [
        ("m0", "'backward_input s0 m1 .*' on a has no weight half"),
        ("m1", "'backward_input s0 m0 .*' on a has no weight half"),
        ("m[0:3)", "does not go on where its backward is, of micro-batch 2"),
        ("m[1:3)", "does not go on where its backward is, of micro-batch 2"),
    ],
)
def test_weight_halves_at_once_leave_no_micro_batch_out_and_add_none(new: str, why: str) -> None:
    old = Action.parse("backward_weight s0 m[0:2) [0:3)")
    wrong = changed(lower(JOINED, GRAPH), "a", old, Action.parse(f"backward_weight s0 {new} [0:3)"))
    with pytest.raises(PlanError, match=why):
        check(wrong, JOINED, GRAPH)


def test_only_weight_halves_are_done_at_once() -> None:
    old = Action.parse("backward_input s0 m1 [0:3)")
    with pytest.raises(PlanError, match=r"is '.*' in the plan|is done twice|stands in the wrong place"):
        check(changed(lower(HALVES, GRAPH), "a", old, old._replace(at_once=2)), HALVES, GRAPH)


def test_a_weight_half_follows_its_input_half() -> None:
    program = lower(HALVES, GRAPH)
    first, second = Action.parse("backward_input s0 m0 [0:3)"), Action.parse("backward_weight s0 m0 [0:3)")
    swap = {first: second, second: first}
    actions = tuple(swap.get(action, action) for action in program.devices["a"])
    with pytest.raises(PlanError, match="does not go on where its backward is"):
        check(replace(program, devices={**program.devices, "a": actions}), HALVES, GRAPH)


@pytest.mark.parametrize(
    ("orders", "why"),
    [
        (("F0 F1 I0 I1 W0 W1", "F0 I0 W0"), "stage 1: order: 1 entries F for 2 micro-batches"),
        (("F0 F1 I0 I1 W0 W1", "F0 F1 W0 I0 I1 W1"), "stage 1: order: 'W0' stands before I0"),
        (("F0 F1 I0 I1 W0 W1", None), "stage 1 has no order"),
    ],
)
def test_a_plan_refuses_orders_that_do_not_fit(orders: tuple[str, ...], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        in_halves(*orders)


def test_a_plan_refuses_an_order_that_runs_further_ahead_than_its_warm_up_or_has_no_use() -> None:
    ahead = {**HALVES.to_data(), "stages": [s.model_copy(update={"warmup": 1}) for s in HALVES.stages]}
    with pytest.raises(PlanError, match="runs 2 forwards ahead, its warm-up depth is 1"):
        Plan.parse(ahead)
    with pytest.raises(PlanError, match="has an order, which 1f1b makes itself"):
        Plan.parse({**HALVES.to_data(), "schedule": "1f1b"})


def test_orders_that_wait_for_each_other_are_refused() -> None:
    """The first stage wants all gradients before its second forward, the second both inputs first."""
    with pytest.raises(PlanError, match="it never ends"):
        lower(in_halves("F0 I0 F1 I1 W0 W1", "F0 F1 I0 I1 W0 W1"), GRAPH)


def test_a_device_with_two_stages_takes_their_halves_in_a_possible_order() -> None:
    stages = [stage(0, 2, "a:8", 2), stage(2, 3, "b:8", 2), stage(3, 4, "a:8", 2)]
    order = "F0 F1 I0 I1 W0 W1"
    found = Plan.parse(
        {**plan(GRAPH, *stages).to_data(), "schedule": "zero_bubble",
         "stages": [{**s.to_data(), "order": order} for s in stages]}
    )  # fmt: skip
    computed = [str(a) for a in lower(found, GRAPH).devices["a"] if a.stage >= 0 and not a.payload]
    assert len(computed) == 12
    assert computed.index("backward_input s2 m0 [0:8)") < computed.index("backward_input s0 m0 [0:8)")


def in_segments(count: int, schedule: ScheduleName = "1f1b") -> Plan:
    """The whole model on two devices, gradients summed in so many segments."""
    found = plan(GRAPH, stage(0, 4, "a:3 b:5", 2), schedule=schedule)
    return found.model_copy(update={"syncs": (found.syncs[0].model_copy(update={"segments": count}),)})


def test_segments_are_summed_as_soon_as_the_last_micro_batch_has_left_their_gradients() -> None:
    """Parameters have 4, 8, 12 and 16 bytes, so that the first of two segments ends with layer 2."""
    texts = [str(action) for action in lower(in_segments(2), GRAPH).devices["a"]]
    assert texts[-8:] == [
        "forward s0 m1 [0:3)", "backward s0 m0 [0:3)", "backward_input s0 m1 [0:3)",
        "backward_weight s0 m1 [0:3) layers [3:4)", "reduce y0.1 16B over a,b",
        "backward_weight s0 m1 [0:3) layers [0:3)", "reduce y0.0 24B over a,b", "step",
    ]  # fmt: skip


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_parts_of_a_backward_pass_the_check(count: int, schedule: ScheduleName) -> None:
    found = in_segments(count, schedule)
    program = lower(found, GRAPH)
    kinds = [action.kind for action in program.devices["a"]]
    segments = len(program.buckets[0])
    assert min(count, 2) <= segments <= count
    assert kinds.count("reduce") == segments
    assert kinds.count("backward_weight") == (segments if count > 1 else 0)


def test_a_segment_is_not_summed_before_its_gradients_are_there() -> None:
    found = in_segments(2)
    program = lower(found, GRAPH)
    actions = list(program.devices["a"])
    at = next(i for i, action in enumerate(actions) if action.kind == "reduce")
    actions[at], actions[at - 1] = actions[at - 1], actions[at]
    with pytest.raises(PlanError, match=r"'reduce y0\.1 16B over a,b' on a stands in the wrong place"):
        check(replace(program, devices={**program.devices, "a": tuple(actions)}), found, GRAPH)


@pytest.mark.parametrize(
    ("old", "new"),
    [("layers [3:4)", "layers [2:4)"), ("layers [0:3)", "layers [0:2)"), ("layers [3:4)", "layers [0:3)")],
)
def test_parts_leave_nothing_out_and_do_nothing_twice(old: str, new: str) -> None:
    found = in_segments(2)
    program = lower(found, GRAPH)
    text = "backward_weight s0 m1 [0:3) "
    wrong = changed(program, "a", Action.parse(text + old), Action.parse(text + new))
    with pytest.raises(PlanError, match="does not go on where its backward is"):
        check(wrong, found, GRAPH)
