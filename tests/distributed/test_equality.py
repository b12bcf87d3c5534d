"""The equality ladder: (a) one device, (b) threads, (c) gloo processes, (d) the order of actions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import ALL, BATCH_STATISTICS, GPT, GPT2, MLP
from equality import (
    Case,
    assignment,
    cluster,
    largest_difference,
    of,
    plan_of,
    random_plan,
    reference,
)

from spanwise.core.plan import Plan, Replica, Stage, Wire
from spanwise.core.precision import Precision
from spanwise.cost.halves import portions
from spanwise.runtime import executor
from spanwise.runtime.device_run import Snapshot
from spanwise.runtime.pool import WorkerPool
from spanwise.runtime.processes import ProcessSession
from spanwise.runtime.session import StepReport
from spanwise.runtime.threads import ThreadSession


def plan_for(case: Case, seed: int) -> Plan:
    same = case.name in BATCH_STATISTICS
    return random_plan(of(case)[1].graph, case.batch, seed, same_slices=same, least=case.slice_rows)


def on_threads(case: Case, plan: Plan, **more: Any) -> tuple[Snapshot, list[StepReport]]:
    _, source = of(case)
    work = assignment(case, source, plan)
    session = ThreadSession(work, source.parameters | source.buffers, case.data(), **more)
    try:
        return_value = list(session.run(0, case.steps))
        return session.snapshot(), return_value
    finally:
        session.close()


def difference(case: Case, plan: Plan, found: Snapshot, losses: list[float], **how: Any) -> float:
    model, source = of(case)
    expected, expected_losses = reference(case, model, assignment(case, source, plan), case.steps, **how)
    kept = {k: expected[k] for k in found.parameters}
    far = max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True))
    return max(largest_difference(found.parameters, kept), far)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ALL)
def test_random_plans_on_threads_equal_plain_pytorch(name: str, seed: int) -> None:
    case = ALL[name]
    plan = plan_for(case, seed)
    found, reports = on_threads(case, plan)
    assert difference(case, plan, found, [r.loss for r in reports]) < 1e-10


@pytest.mark.parametrize("name", ALL)
def test_float32_stays_within_1e_4(name: str) -> None:
    case = replace(ALL[name], dtype="float32")
    plan = plan_for(case, 3)
    found, reports = on_threads(case, plan)
    assert difference(case, plan, found, [r.loss for r in reports]) < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_one_device_equals_plain_pytorch(name: str) -> None:
    case = ALL[name]
    graph = of(case)[1].graph
    one = (Replica(device="a", rows=case.batch // 2),)
    plan = plan_of(graph, (Stage(start=0, stop=len(graph), replicas=one),), one, 2)
    found, reports = on_threads(case, plan)
    assert difference(case, plan, found, [r.loss for r in reports]) < 1e-12


@pytest.mark.parametrize("seed", range(20, 26))
@pytest.mark.parametrize("name", ALL)
def test_gloo_processes_equal_plain_pytorch(pool: WorkerPool, name: str, seed: int) -> None:
    case = ALL[name]
    _, source = of(case)
    plan = plan_for(case, seed)
    session = ProcessSession(
        pool, assignment(case, source, plan), source.parameters | source.buffers, case.data()
    )
    losses = [report.loss for report in session.run(0, case.steps)]
    assert difference(case, plan, session.snapshot(), losses) < 1e-10


def test_ignoring_rows_in_the_weighting_fails() -> None:
    """Negative control: replicas of 6 and 2 rows averaged as equals are far from the right gradient."""
    graph = of(MLP)[1].graph
    uneven = (Replica(device="a", rows=10), Replica(device="b", rows=2))
    plan = plan_of(graph, (Stage(start=0, stop=len(graph), replicas=uneven),), uneven, 1)
    found, reports = on_threads(MLP, plan)
    losses = [r.loss for r in reports]
    assert difference(MLP, plan, found, losses) < 1e-12
    assert difference(MLP, plan, found, losses, ignore_rows=True) > 1e-3


def test_replicas_end_with_the_same_bits(pool: WorkerPool) -> None:
    _, source = of(GPT)
    three = tuple(Replica(device=d, rows=n) for d, n in (("a", 5), ("b", 4), ("c", 3)))
    plan = plan_of(source.graph, (Stage(start=0, stop=len(source.graph), replicas=three),), three, 1)
    work = assignment(GPT, source, plan)
    session = ThreadSession(work, source.parameters | source.buffers, GPT.data())
    list(session.run(0, 3))
    states = [run.state().parameters for run in session._runs.values()]
    session.close()
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, other[name]) for other in states[1:])


@pytest.mark.parametrize("case", [MLP, GPT2], ids=lambda case: case.name)
def test_weight_halves_at_once_equal_plain_pytorch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in parts, for sums in segments, and with layers run again; a weight tied over both stages.

    The layers of the second model are too small for it, and are made to.
    """
    _, source = of(case)
    graph, half = source.graph, len(source.graph) // 2
    both, others = (tuple(Replica(device=d, rows=1) for d in pair) for pair in ("ab", "cd"))
    order = "F0 F1 F2 I0 I1 W0 W1 I2 F3 F4 F5 I3 I4 I5 W2 W3 W4 W5"
    stages = (
        Stage(start=0, stop=half, replicas=both, warmup=3, order=order, recompute=((1, half),)),
        Stage(start=half, stop=len(graph), replicas=others, warmup=3, order=order),
    )
    plan = plan_of(graph, stages, both, 6, "zero_bubble", 2)
    work = [a for a in assignment(case, source, plan).program.devices["a"] if a.at_once > 1]
    assert {(a.at_once, a.layers is not None) for a in work} == {(2, False), (4, True)}
    if case is GPT2:
        monkeypatch.setattr(executor, "portions", lambda _layer, _rows, count: (1, count - 1))
    else:
        assert (4,) in {portions(layer, 1, 4) for layer in graph.layers}
    found, reports = on_threads(case, plan)
    assert difference(case, plan, found, [r.loss for r in reports]) < 1e-10


@pytest.mark.parametrize("seed", range(4))
def test_recorded_order_is_the_program(seed: int) -> None:
    case = GPT
    _, source = of(case)
    work = assignment(case, source, random_plan(source.graph, case.batch, seed))
    session = ThreadSession(work, source.parameters | source.buffers, case.data())
    list(session.run(0, 2))
    spans = session.spans()
    session.close()
    for device in spans:
        compute = [
            str(a) for a in work.program.devices[device.device] if a.kind in ("forward", "backward", "step")
        ]
        for _, start, end, busy, entries in device.steps:
            done = [e for e in entries if e[1] in ("forward", "backward", "step")]
            assert [e[2] for e in done] == compute
            assert all(a <= b for a, b in zip([e[3] for e in done], [e[3] for e in done][1:], strict=False))
            assert 0 <= busy <= end - start + 1e-6


def test_gradient_norm_is_global_across_stages() -> None:
    """With a tight clip a stage-local norm would give other parameters."""
    graph = of(GPT)[1].graph
    stages = (
        Stage(start=0, stop=4, replicas=(Replica(device="a", rows=6),), warmup=2),
        Stage(start=4, stop=len(graph), replicas=(Replica(device="b", rows=6),), warmup=1),
    )
    plan = plan_of(graph, stages, (Replica(device="a", rows=6),), 2)
    found, reports = on_threads(GPT, plan)
    assert difference(GPT, plan, found, [r.loss for r in reports]) < 1e-12
    unclipped = replace(GPT, clip_norm=None)
    other, _ = on_threads(unclipped, plan)
    assert largest_difference(found.parameters, other.parameters) > 1e-6


def test_cluster_names_the_data_devices() -> None:
    assert [s.device for s in cluster(("b", "c")).data_shares] == ["b", "c"]


@pytest.mark.parametrize(("precision", "least", "most"), [("half", 1e-9, 1e-3), ("int8", 1e-6, 3e-2)])
@pytest.mark.parametrize("case", [MLP, GPT], ids=lambda case: case.name)
def test_reduced_precision_on_a_link_is_close_and_not_exact(
    case: Case, precision: Precision, least: float, most: float
) -> None:
    _, source = of(case)
    half = len(source.graph) // 2
    stages = (
        Stage(start=0, stop=half, replicas=(Replica(device="a", rows=4),), warmup=2),
        Stage(
            start=half, stop=len(source.graph),
            replicas=(Replica(device="b", rows=1), Replica(device="c", rows=3)),
        ),
    )  # fmt: skip
    exact = plan_of(source.graph, stages, stages[0].replicas, case.batch // 4)
    wires = tuple(Wire(source=x, target=y, precision=precision) for x, y in (("a", "c"), ("c", "a")))
    reduced = exact.model_copy(update={"wires": wires})
    assert exact.exact
    assert not reduced.exact
    for plan, low, high in ((exact, -1.0, 1e-10), (reduced, least, most)):
        found, reports = on_threads(case, plan)
        assert low < difference(case, plan, found, [r.loss for r in reports]) < high
