"""Layers with batch statistics: no replica of one computes a single row."""

from __future__ import annotations

import pytest

from planner_cases import make_cluster, make_graph, make_job, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.defaults import default_cluster
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.planner import Problem, compare, make_plan
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.build import build
from spanwise.planner.plans.feasible import broken_rule
from spanwise.planner.plans.trial import priced


def problem(
    batch: int, mixing: tuple[int, ...], cluster: Cluster | None = None, **options: object
) -> Problem:
    """Six layers of which some have batch statistics."""
    cluster = cluster or default_cluster()
    plain = make_graph(6)
    layers = tuple(
        layer.model_copy(update={"batch_statistics": i in mixing}) for i, layer in enumerate(plain.layers)
    )
    graph = plain.model_copy(update={"layers": layers})
    return Problem(graph, make_profile(graph, cluster), cluster, make_job(batch, **options))


def fewest_rows(found: Problem, plan: Plan) -> int:
    return min(
        (
            replica.rows
            for stage in plan.stages
            if any(layer.batch_statistics for layer in found.graph.layers[stage.start : stage.stop])
            for replica in stage.replicas
        ),
        default=2,
    )


@pytest.mark.parametrize("mixing", [(0,), (3, 4), (5,), tuple(range(6))])
@pytest.mark.parametrize("options", [{}, {"private": True}, {"private": True, "share_labels": True}])
def test_every_plan_gives_two_rows(mixing: tuple[int, ...], options: dict[str, object]) -> None:
    for batch in (4, 8, 12, 16):
        found = problem(batch, mixing, **options)
        evaluations = compare(found)
        for evaluation in evaluations:
            if evaluation.plan is not None:
                assert fewest_rows(found, evaluation.plan) >= 2
                assert broken_rule(found, evaluation.plan) == ""
            else:
                assert "\n" not in evaluation.reason
        assert evaluations[-1].plan is not None


def test_without_statistics_one_row_is_fine() -> None:
    """Control: the same problem has plans with single rows."""
    plans = [e.plan for e in compare(problem(4, ())) if e.plan is not None]
    assert any(r.rows == 1 for plan in plans for stage in plan.stages for r in stage.replicas)


def test_the_rule_names_device_layers_and_numbers() -> None:
    found = problem(4, (2,))
    good = make_plan(found, "single")
    uneven = (Replica(device="cloud", rows=3), Replica(device="edge", rows=1))
    rows = good.micro_batch_rows * good.micro_batches
    plan = good.model_copy(
        update={
            "micro_batches": 1,
            "micro_batch_rows": rows,
            "sources": found.source_rows(rows),
            "stages": (Stage(start=0, stop=6, replicas=uneven),),
        }
    )
    reason = broken_rule(found, plan)
    assert reason.startswith("edge would compute 1 row of each micro-batch of 4 in layers [0:6), whose batch")
    assert "need 2; raise the batch or use fewer devices" in reason
    elsewhere = (
        Stage(start=0, stop=2, replicas=uneven),
        Stage(start=2, stop=6, replicas=good.stages[0].replicas),
    )
    assert broken_rule(found, plan.model_copy(update={"stages": elsewhere})) == ""


def test_finalists_that_break_it_are_dropped() -> None:
    found = problem(8, (2,), make_cluster(3, 0))
    whole = Span(0, 6, (0, 1), (7, 1))
    with pytest.raises(InfeasibleError, match="d1 would compute 1 row"):
        build(found, "x", Outline(1, (whole,)))
    kept = priced(found, "x", [Outline(1, (whole,)), Outline(1, (Span(0, 6, (0, 1), (6, 2)),))])
    assert [[r.rows for r in entry.plan.stages[0].replicas] for entry in kept] == [[6, 2]]


def test_a_batch_too_small_says_how_many_rows() -> None:
    text = (
        r"^data_parallel: a batch of 4 rows is too small for 4 replicas with batch statistics "
        r"\(layer 'l1'\), each needs 2 rows; raise the batch to 8 or use fewer devices$"
    )
    with pytest.raises(InfeasibleError, match=text):
        make_plan(problem(4, (1,)), "data_parallel")
    one = problem(1, (1,), data_devices=["edge"])
    text = r"a batch of 1 row is too small for a replica with .*, each needs 2 rows; raise the batch to 2$"
    with pytest.raises(InfeasibleError, match=rf"^single: {text}"):
        make_plan(one, "single")
    with pytest.raises(InfeasibleError, match=rf"^auto: no strategy has a plan; hpp: {text}"):
        make_plan(one)


def test_private_shares_are_rounded_up_to_two_rows() -> None:
    cluster = Cluster.parse({**default_cluster().to_data(), "data": {"end-1": 30.0, "end-2": 1.0}})
    found = problem(16, (0,), cluster, private=True)
    assert [source.rows for source in found.source_rows(16)] == [14, 2]
    assert [source.rows for source in problem(16, (), cluster, private=True).source_rows(16)] == [15, 1]
