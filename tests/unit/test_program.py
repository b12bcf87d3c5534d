from __future__ import annotations

import pytest

from plan_cases import chain, plan, stage
from spanwise.core.errors import PlanError
from spanwise.core.program import Action, Program, ProgramFile, parse_actions
from spanwise.lowering import lower

FORMS = {
    "load m0 [0:4)": Action("load", micro_batch=0, rows=(0, 4)),
    "forward s0 m1 [0:8)": Action("forward", 0, 1, (0, 8)),
    "backward s12 m0 [3:5)": Action("backward", 12, 0, (3, 5)),
    "send activation s0 m1 [2:5) to edge-1.lan #7 1200B": Action(
        "send", 0, 1, (2, 5), payload="activation", peer="edge-1.lan", transfer=7, nbytes=1200
    ),
    "recv gradient s0 m1 [2:5) from b #8 96B": Action(
        "recv", 0, 1, (2, 5), payload="gradient", peer="b", transfer=8, nbytes=96
    ),
    "send input m1 [2:5) to b #0 36B": Action(
        "send", -1, 1, (2, 5), payload="input", peer="b", transfer=0, nbytes=36
    ),
    "recv label m1 [2:5) from b #0 36B": Action(
        "recv", -1, 1, (2, 5), payload="label", peer="b", transfer=0, nbytes=36
    ),
    "reduce y2.1 40B over a,b_1,c": Action("reduce", sync=2, segment=1, nbytes=40, members=("a", "b_1", "c")),
    "backward_weight s2 m1 [2:5)": Action("backward_weight", 2, 1, (2, 5)),
    "backward_weight s2 m[1:4) [2:5)": Action("backward_weight", 2, 1, (2, 5), at_once=3),
    "backward_weight s2 m[1:4) [2:5) layers [6:8)": Action(
        "backward_weight", 2, 1, (2, 5), layers=(6, 8), at_once=3
    ),
    "norm over a,b": Action("norm", members=("a", "b")),
    "step": Action("step"),
}


@pytest.mark.parametrize(("text", "action"), FORMS.items(), ids=str)
def test_text_form(text: str, action: Action) -> None:
    assert str(action) == text
    assert Action.parse(text) == action


@pytest.mark.parametrize(
    "text",
    [
        "", "steps", "forward s0 m1", "forward s0 m1 [0:8]", "forward s-1 m1 [0:8)", " step", "step ",
        "send tensor s0 m1 [2:5) to b #7 1200B", "send activation s0 m1 [2:5) to b 1200B",
        "send activation s0 m1 [2:5) to b #7 1200", "reduce y2 40B over a,b", "norm over", "load [0:4)",
        "forward s0 m[1:3) [0:8)", "backward_input s0 m[1:3) [0:8)", "backward_weight s0 m[1:3] [0:8)",
        "send activation s0 m1 [2:5) from b #7 1200B", "recv activation s0 m1 [2:5) to b #7 1200B",
    ],
)  # fmt: skip
def test_what_is_not_an_action(text: str) -> None:
    with pytest.raises(PlanError, match="not an action; write it like 'forward s0 m1"):
        Action.parse(text)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_several_micro_batches_are_more_than_one(stop: int) -> None:
    with pytest.raises(PlanError, match=rf"micro-batches \[1:{stop}\) are not several; write one like m1"):
        Action.parse(f"backward_weight s0 m[1:{stop}) [0:8)")


@pytest.fixture
def program() -> Program:
    graph = chain(3)
    return lower(plan(graph, stage(0, 1, "a:3 b:5", 2), stage(1, 3, "c:8")), graph, clip=True)


def test_a_program_as_text(program: Program) -> None:
    assert parse_actions(str(program)) == program.devices
    assert len(program) == sum(len(actions) for actions in program.devices.values())


def test_a_program_as_a_file(program: Program) -> None:
    file = ProgramFile.of(program)
    assert ProgramFile.from_json(file.to_json()) == file
    assert file.program() == program


def test_a_device_without_actions_survives_as_text() -> None:
    text = str(Program({"a": (), "b": (Action("step"),)}))
    assert parse_actions(text) == {"a": (), "b": (Action("step"),)}


def test_text_that_is_not_a_program() -> None:
    with pytest.raises(PlanError, match="'step' stands before any device"):
        parse_actions("  step\n")
    with pytest.raises(PlanError, match="'hop': not an action"):
        parse_actions("a:\n  hop\n")
    with pytest.raises(PlanError, match="device 'a' is listed twice"):
        parse_actions("a:\n  step\na:\n  step\n")
