"""Programs of eight plans as text, so that a change of lowering shows as a diff."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from plan_cases import chain, plan, stage
from server_cases import served, server_plan
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.program import parse_actions
from spanwise.lowering import lower
from spanwise.planner.segments.chain import Cuts


def in_segments(found: Plan, count: int) -> Plan:
    return found.model_copy(
        update={"syncs": tuple(sync.model_copy(update={"segments": count}) for sync in found.syncs)}
    )


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
    "program-zero-bubble": (
        plan(
            GRAPH,
            stage(0, 2, "a:1 b:3", 2).model_copy(update={"order": "F0 F1 I0 F2 I1 W0 I2 W1 W2"}),
            stage(2, 4, "c:4", 1).model_copy(update={"order": "F0 I0 F1 I1 W0 F2 I2 W1 W2"}),
            micro_batches=3,
            schedule="zero_bubble",
        ),
        GRAPH,
    ),
    "program-segments": (in_segments(plan(GRAPH, stage(0, 4, "a:3 b:5")), 2), GRAPH),
    "program-server": (
        server_plan(GRAPH, {"a": 3, "b": 5}, served(["a", "b"], Cuts((1, 3, 4), (2, 4)))),
        GRAPH,
    ),
    "program-duplex": (
        server_plan(TIED, {"a": 3, "b": 5}, served(["a", "b"], Cuts((1, 4), (2, 3, 4)), order=(1, 0))),
        TIED,
    ),
    "program-tied": (
        plan(TIED, stage(0, 2, "a:1 b:3", 2), stage(2, 4, "c:4"), sources="d:4"),
        TIED,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_program(name: str, golden: Callable[[str, str], None]) -> None:
    found, graph = CASES[name]
    program = lower(found, graph, clip=name in ("program-hybrid", "program-server"))
    assert parse_actions(str(program)) == program.devices
    golden(name, str(program))
