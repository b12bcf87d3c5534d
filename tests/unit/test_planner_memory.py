from __future__ import annotations

import re

import numpy as np
import pytest

from planner_cases import make_cluster, make_graph, make_job, make_profile
from spanwise.api.planning import HOLES, HOLES_RUN_AGAIN, predict, tight_devices
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.core.units import parse_bytes
from spanwise.cost.training import stage_bytes
from spanwise.planner import STRATEGIES, Problem, compare, make_plan
from spanwise.planner.facts.tables import Tables
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.build import build
from spanwise.planner.plans.feasible import memory_bytes, shortage


def problem(memory: str, *, devices: int = 3, layers: int = 6, batch: int = 16) -> Problem:
    cluster = make_cluster(devices, 0, memory=memory)
    graph = make_graph(layers, 0, activation=200_000)
    return Problem(graph, make_profile(graph, cluster), cluster, make_job(batch, data_devices=["d0"]))


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
def test_too_little_for_any_plan_tells_where_and_by_how_much(strategy: str) -> None:
    with pytest.raises(InfeasibleError) as caught:
        make_plan(problem("200 KiB"), strategy)
    message = str(caught.value)
    assert message.startswith(f"{strategy}: ")
    match = re.search(
        r"(d\d) needs ([\d.]+ \w+) for .*, its budget is 200.0 KiB, ([\d.]+ \w+) short", message
    )
    assert match is not None, message
    over = parse_bytes(match[2]) - parse_bytes("200 KiB")
    assert parse_bytes(match[3]) == pytest.approx(over, rel=0.1)


def test_every_plan_fits_where_memory_is_scarce() -> None:
    found = problem("24 MiB")
    feasible = 0
    for evaluation in compare(found):
        if evaluation.plan is None or evaluation.timeline is None:
            assert " short" in evaluation.reason
            continue
        feasible += 1
        plan = evaluation.plan
        assert shortage(found, plan.stages, plan.schedule, plan.micro_batches) is None
        for use in evaluation.timeline.devices:
            assert use.peak_memory_bytes <= 24 * 2**20
    assert feasible >= 2


def test_what_does_not_fit_on_one_device_is_distributed() -> None:
    """Between the memory of one device and that of all there is a plan, and single says why not it."""
    for memory in ("4 MiB", "5 MiB", "6 MiB", "8 MiB"):
        by_name = {e.strategy: e for e in compare(problem(memory))}
        if by_name["single"].plan is None and by_name["hpp"].plan is not None:
            assert " short" in by_name["single"].reason
            assert len(by_name["hpp"].plan.devices) > 1
            return
    pytest.fail("no memory budget where only distributing helps")


def test_warm_up_depth_gives_way_to_memory() -> None:
    graph = make_graph(6, 0, activation=400_000)
    spans = tuple(Span(2 * i, 2 * i + 2, (i,)) for i in range(3))

    def planned(memory: str) -> tuple[Problem, Plan]:
        cluster = make_cluster(3, 0, memory=memory)
        found = Problem(graph, make_profile(graph, cluster), cluster, make_job(16, data_devices=["d0"]))
        return found, build(found, "x", Outline(8, spans))

    found, deepest = planned("1 GiB")
    assert [stage.warmup for stage in deepest.stages] == [5, 3, 1]
    budget = 0
    for depth in (4, 3, 2, 1):
        stages = tuple(s.model_copy(update={"warmup": min(s.warmup, depth)}) for s in deepest.stages)
        budget = max(memory_bytes(found, stages, "1f1b", 8).values())
        tight, plan = planned(f"{budget} B")
        depths = [stage.warmup for stage in plan.stages]
        assert depths[0] <= depth
        assert depths == sorted(depths, reverse=True)
        assert shortage(tight, plan.stages, plan.schedule, plan.micro_batches) is None
        assert not any(stage.recompute for stage in plan.stages)
    # The last budget is what depth 1 needs: one byte less and layers run again.
    tight, plan = planned(f"{budget - 1} B")
    assert any(stage.recompute for stage in plan.stages)
    assert shortage(tight, plan.stages, plan.schedule, plan.micro_batches) is None


def test_memory_of_a_device_adds_up_over_its_stages() -> None:
    found = problem("1 GiB")
    stages = (
        Stage(start=0, stop=2, replicas=(Replica(device="d0", rows=4),), warmup=3),
        Stage(start=2, stop=4, replicas=(Replica(device="d1", rows=4),), warmup=2),
        Stage(start=4, stop=6, replicas=(Replica(device="d0", rows=4),), warmup=1),
    )

    def alone(stage: Stage) -> int:
        return stage_bytes(found.graph, stage.start, stage.stop, rows=4, in_flight=stage.warmup,
                           copies=found.copies, synced=False)  # fmt: skip

    used = memory_bytes(found, stages, "1f1b", 4)
    assert used == {"d0": alone(stages[0]) + alone(stages[2]), "d1": alone(stages[1])}
    flooded = memory_bytes(found, stages, "gpipe", 4)
    assert flooded["d0"] > used["d0"]


def test_what_is_summed_needs_a_flat_buffer() -> None:
    """Replicas for all of their parameters, holders of a tied weight for that weight alone."""
    found = problem("1 GiB")
    layers = list(found.graph.layers)
    tied = layers[0].parameters[0]
    layers[5] = layers[5].model_copy(update={"parameters": (*layers[5].parameters, tied)})
    graph = found.graph.model_copy(update={"layers": tuple(layers)})
    tying = Problem(graph, make_profile(graph, found.cluster), found.cluster, found.job)
    stages = (
        Stage(start=0, stop=2, replicas=(Replica(device="d0", rows=4),), warmup=3),
        Stage(start=2, stop=4, replicas=(Replica(device="d1", rows=4),), warmup=2),
        Stage(start=4, stop=6, replicas=(Replica(device="d2", rows=4),), warmup=1),
    )

    def alone(stage: Stage, *, synced: bool = False) -> int:
        rows = stage.replicas[0].rows
        return stage_bytes(graph, stage.start, stage.stop, rows=rows, in_flight=stage.warmup,
                           copies=found.copies, synced=synced)  # fmt: skip

    assert memory_bytes(tying, stages, "1f1b", 4) == {
        "d0": alone(stages[0]) + tied.bytes,
        "d1": alone(stages[1]),
        "d2": alone(stages[2]) + tied.bytes,
    }
    both = (Replica(device="d0", rows=2), Replica(device="d1", rows=2))
    replicated = (
        Stage(start=0, stop=4, replicas=both, warmup=2),
        Stage(start=4, stop=6, replicas=(Replica(device="d2", rows=4),), warmup=1),
    )
    used = memory_bytes(tying, replicated, "1f1b", 4)
    assert used["d0"] == used["d1"] == alone(replicated[0], synced=True)
    assert used["d2"] == alone(replicated[1]) + tied.bytes


def test_tables_count_bytes_as_cost_does() -> None:
    """Tied parameters, buffers and fixed bytes included."""
    cluster = make_cluster(2, 0)
    graph = make_graph(6, 0)
    layers = list(graph.layers)
    tied = layers[0].parameters
    layers[5] = layers[5].model_copy(update={"parameters": (*layers[5].parameters, *tied)})
    layers[2] = layers[2].model_copy(update={"buffer_bytes": 1234, "saved_fixed_bytes": 567})
    graph = graph.model_copy(update={"layers": tuple(layers)})
    tables = Tables.of(graph, make_profile(graph, cluster), cluster, 16, 2)
    for start in range(6):
        for stop in range(start + 1, 7):
            a, b = np.array([start]), np.array([stop])
            for rows, depth, synced in ((1, 1, False), (8, 3, True)):
                fixed = tables.fixed_bytes(a, b, in_flight=depth, synced=synced)[0]
                per_row = tables.row_bytes(a, b, in_flight=depth)[0]
                exact = stage_bytes(graph, start, stop, rows=rows, in_flight=depth, copies=2, synced=synced)
                assert fixed + rows * per_row == exact


def test_tables_interpolate_times_as_the_profile_does() -> None:
    cluster = make_cluster(2, 1)
    graph = make_graph(5, 1)
    profile = make_profile(graph, cluster)
    tables = Tables.of(graph, profile, cluster, 20, 0)
    for d, device in enumerate(cluster.ids):
        for rows in (0, 1, 3, 11, 20):
            assert tables.forward[d, 4, rows] - tables.forward[d, 1, rows] == pytest.approx(
                profile.forward_s(device, 1, 4, rows)
            )
            assert tables.backward[d, 5, rows] == pytest.approx(profile.backward_s(device, 0, 5, rows))


def test_the_shortest_device_is_named() -> None:
    cluster = Cluster.parse(
        {"devices": [{"id": "big", "memory": "1 GiB"}, {"id": "small", "memory": "1 MiB"}], "data": ["big"],
         "links": [{"between": ["site", "site"], "bandwidth": "1 Gbit/s"}]}
    )  # fmt: skip
    graph = make_graph(6)
    found = Problem(graph, make_profile(graph, cluster), cluster, make_job(16))
    with pytest.raises(InfeasibleError, match=r"data_parallel: small needs .* its budget is 1.0 MiB"):
        make_plan(found, "data_parallel")
    assert make_plan(found, "single").devices[0] == "big"


def test_devices_without_room_for_holes_hand_freed_memory_back() -> None:
    """Only these, as it costs time; where layers run again holes are larger."""
    found = problem("1 GiB")
    plan = make_plan(found, "data_parallel")
    timeline = predict(plan, found.graph, found.profile, found.cluster, found.job)
    uses = {use.device: use.peak_memory_bytes for use in timeline.devices}

    def tight(plan: Plan, factor: float) -> set[str]:
        data = found.cluster.to_data()
        devices = [
            {**d, "memory": f"{int(factor * uses[d['id']]) if d['id'] == 'd1' else 2**40} B"}
            for d in data["devices"]
        ]
        cluster = Cluster.parse({**data, "devices": devices})
        return set(tight_devices(plan, cluster, timeline))

    assert len(uses) == 3
    assert tight(plan, 0.9 * HOLES) == {"d1"}
    assert tight(plan, 1.1 * HOLES) == set()
    again = plan.model_copy(update={"stages": (plan.stages[0].model_copy(update={"recompute": ((0, 3),)}),)})
    assert tight(again, 1.1 * HOLES) == {"d1"}
    assert tight(again, 1.1 * HOLES_RUN_AGAIN) == set()
