"""Programs of four plans as text, so that a change of lowering shows as a diff."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from plan_cases import chain, plan, stage
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.program import parse_actions
from spanwise.lowering import lower

GRAPH, TIED = chain(4), chain(4, tied=(0, 3))
CASES: dict[str, tuple[Plan, ModelGraph]] = {
    "program-single": (plan(GRAPH, stage(0, 4, "a:8")), GRAPH),
    "program-hybrid": (
        plan(GRAPH, stage(0, 2, "end-1:3 end-2:5", 3), stage(2, 4, "edge:6 cloud:2", 1), micro_batches=3),
        GRAPH,
    ),
    "program-u-shape": (
        plan(
            GRAPH, stage(0, 1, "end:4", 2), stage(1, 3, "cloud:4", 2), stage(3, 4, "end:4"), micro_batches=3
        ),
        GRAPH,
    ),
    "program-tied": (
        plan(TIED, stage(0, 2, "a:1 b:3", 2), stage(2, 4, "c:4"), sources="d:4"),
        TIED,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_program(name: str, golden: Callable[[str, str], None]) -> None:
    found, graph = CASES[name]
    program = lower(found, graph, clip=name == "program-hybrid")
    assert parse_actions(str(program)) == program.devices
    golden(name, str(program))
