"""HierTrain's plans give the gradients of one device, whatever cuts and rows, degenerate ones included."""

from __future__ import annotations

import pytest
from cases import MLP
from equality import assignment, largest_difference, of, plan_of, reference

from spanwise.core.plan import Plan, Replica
from spanwise.planner.hiertrain.layout import Layout, Roles
from spanwise.planner.hiertrain.plan import stages_of
from spanwise.runtime.threads import ThreadSession

STEPS = 3
NAMES = ("a", "b", "c")  # the finisher, the short and the long prefix
MODEL, TRACED = of(MLP)
LAYERS = len(TRACED.graph)


def planned(cuts: tuple[int, int], rows: tuple[int, int, int], source: str, micro_batches: int = 1) -> Plan:
    """Machines without rows are left out of the layout, as a planner would."""
    helpers = [j for j in (1, 2) if rows[j]]
    roles = Roles(0, tuple(helpers), starts=rows[0] > 0)
    layout = Layout(roles, tuple(cuts[j - 1] for j in helpers))
    held = (rows[0], *(rows[j] for j in helpers))
    stages = stages_of(layout, held, LAYERS, NAMES, range(len(held)))
    deep = tuple(
        stage.model_copy(update={"warmup": min(micro_batches, len(stages) - number)})
        for number, stage in enumerate(stages)
    )
    return plan_of(TRACED.graph, deep, (Replica(device=source, rows=sum(rows)),), micro_batches)


def difference(plan: Plan, *, plain_mean: bool = False) -> float:
    """Of parameters and losses after a few steps, from plain PyTorch on all rows."""
    work = assignment(MLP, TRACED, plan)
    session = ThreadSession(work, TRACED.parameters | TRACED.buffers, MLP.data())
    try:
        losses = [report.loss for report in session.run(0, STEPS)]
        found = session.snapshot().parameters
    finally:
        session.close()
    expected, right = reference(MLP, MODEL, work, STEPS, ignore_rows=plain_mean)
    far = max(abs(a - b) for a, b in zip(losses, right, strict=True))
    return max(largest_difference(found, expected), far)


@pytest.mark.parametrize("source", ["a", "b", "d"])
@pytest.mark.parametrize(
    ("cuts", "rows"),
    [
        ((1, 3), (4, 5, 3)),
        ((2, 2), (4, 5, 3)),  # both prefixes equally long
        ((1, LAYERS), (4, 5, 3)),  # the long one finishes its own rows
        ((LAYERS, LAYERS), (4, 5, 3)),  # data parallelism
        ((1, 3), (0, 5, 7)),  # the finisher starts none
        ((1, 3), (7, 0, 5)),
        ((1, 3), (7, 5, 0)),
        ((1, 3), (0, 0, 12)),
        ((1, 3), (12, 0, 0)),
    ],
)
def test_gradients_are_those_of_one_device(
    cuts: tuple[int, int], rows: tuple[int, int, int], source: str
) -> None:
    assert difference(planned(cuts, rows, source)) < 1e-12


def test_more_micro_batches_are_exact_too() -> None:
    assert difference(planned((1, 3), (2, 1, 3), "b", 2)) < 1e-12
    assert difference(planned((2, LAYERS), (1, 1, 1), "c", 4)) < 1e-12


def test_the_plain_mean_of_the_machines_own_means_fails() -> None:
    """Negative control: what a public re-implementation does with uneven rows."""
    plan = planned((1, 3), (2, 8, 2), "a")
    assert difference(plan) < 1e-12
    assert difference(plan, plain_mean=True) > 1e-3
