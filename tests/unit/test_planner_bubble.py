"""Backwards in halves and gradient sums in segments: chosen where they pay and fit memory."""

from __future__ import annotations

import pytest

from planner_cases import make_graph, make_job, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.order import joined
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.planner import Problem, make_plan
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.bubble import FIRST, likely_variants, zero_bubble_variants
from spanwise.planner.plans.feasible import kept, memory_bytes
from spanwise.planner.plans.halved import halved
from spanwise.planner.plans.pace import pace_s
from spanwise.planner.plans.trial import priced, timeline
from spanwise.planner.plans.variants import segmented

LAYERS = 12


def problem(
    *, memory: str = "1 GiB", bandwidth: str = "1 Gbit/s", halves: tuple[float, float] | None = None
) -> Problem:
    """Three equal devices on a switch; ``halves`` are the parts of a backward that its halves take."""
    graph = make_graph(LAYERS, activation=100_000, parameters=50_000)
    layers = tuple(
        layer.model_copy(update={"deferred_bytes": layer.saved_bytes // 2}) for layer in graph.layers
    )
    graph = graph.model_copy(update={"layers": layers})
    machines = Cluster.parse(
        {
            "devices": [{"id": f"d{i}", "memory": memory} for i in range(3)],
            "links": [{"between": ["site", "site"], "bandwidth": bandwidth, "latency": "0.1 ms"}],
            "data": ["d0"],
        }
    )
    return Problem(graph, with_halves(make_profile(graph, machines), halves), machines, make_job(32))


def with_halves(profile: Profile, parts: tuple[float, float] | None) -> Profile:
    if parts is None:
        return profile
    (table,) = profile.tables
    layers = tuple(
        layer.model_copy(
            update={
                "backward_input_s": tuple(parts[0] * b for b in layer.backward_s),
                "backward_weight_s": tuple(parts[1] * b for b in layer.backward_s),
            }
        )
        for layer in table.layers
    )
    return profile.model_copy(update={"tables": (table.model_copy(update={"layers": layers}),)})


def one_f_one_b(found: Problem, micro_batches: int = 8) -> Plan:
    """Three stages of four layers each."""
    spans = tuple(Span(4 * i, 4 * i + 4, (i,)) for i in range(3))
    return priced(found, "test", [Outline(micro_batches, spans)])[0].plan


def test_halves_are_chosen_where_they_fill_waits() -> None:
    found = problem()
    plan = one_f_one_b(found)
    best = halved(found, [plan])[0]
    assert best.schedule == "zero_bubble"
    assert timeline(found, best).step_time_s < 0.95 * timeline(found, plan).step_time_s
    assert make_plan(found, "pipeline").schedule == "zero_bubble"


def test_halves_that_cost_more_than_the_waits_are_not_chosen() -> None:
    """Negative control: a backward whose halves together take half as long again."""
    found = problem(halves=(0.75, 0.75))
    plan = one_f_one_b(found)
    assert halved(found, [plan])[0] == plan
    assert make_plan(found, "pipeline").schedule == "1f1b"


def test_variants_are_valid_plans_and_keep_no_more_than_the_formula_says() -> None:
    found = problem()
    variants = list(zero_bubble_variants(found, one_f_one_b(found)))
    assert len(variants) == 3  # the plan's own warm-up depths are the deep ones
    for variant in variants:
        assert Plan.from_json(variant.to_json()) == variant
        needed = memory_bytes(found, variant.stages, variant.schedule, variant.micro_batches)
        for use in timeline(found, variant).devices:
            assert use.peak_memory_bytes <= needed[use.device]


def test_memory_bounds_what_is_kept_until_the_weight_halves() -> None:
    """With less and less memory fewer micro-batches are kept, and no plan ever peaks above its budget."""
    plan = one_f_one_b(problem(), 16)
    roomy = max(memory_bytes(problem(), plan.stages, "1f1b", plan.micro_batches).values())
    most: list[int] = []
    for part in (2.0, 1.0, 0.9, 0.7):
        found = problem(memory=f"{int(part * roomy)} B")
        variants = list(zero_bubble_variants(found, one_f_one_b(found, 16)))
        for variant in variants:
            for use in timeline(found, variant).devices:
                assert use.peak_memory_bytes <= found.cluster.device(use.device).memory_bytes
        kept_by_stage = [kept(s, v.schedule, v.micro_batches) for v in variants for s in v.stages]
        most.append(sum(max(sum(k) for k in each) for each in kept_by_stage) // len(variants))
    assert most == sorted(most, reverse=True)
    assert most[0] > most[-1]


def flat(memory: tuple[int, ...] = (2**30,) * 3, *, parameters: int = 2_000_000) -> Problem:
    """Weight halves that take the same time whatever the rows; large weights, which join them."""
    cluster = problem().cluster
    devices = tuple(
        device.model_copy(update={"memory_bytes": nbytes})
        for device, nbytes in zip(cluster.devices, memory, strict=True)
    )
    cluster = cluster.model_copy(update={"devices": devices})
    graph = make_graph(LAYERS, activation=2_000, parameters=parameters)
    layers = tuple(layer.model_copy(update={"deferred_bytes": layer.saved_bytes}) for layer in graph.layers)
    graph = graph.model_copy(update={"layers": layers})
    profile = make_profile(graph, cluster)
    (table,) = profile.tables
    table = table.model_copy(
        update={
            "layers": tuple(
                times.model_copy(
                    update={
                        "backward_input_s": tuple(b / 2 for b in times.backward_s),
                        "backward_weight_s": (times.backward_s[2],) * len(table.rows),
                    }
                )
                for times in table.layers
            )
        }
    )
    profile = profile.model_copy(update={"tables": (table,)})
    return Problem(graph, profile, cluster, make_job(32))


def most_at_once(plan: Plan) -> int:
    return max(count for stage in plan.stages for _, count in joined(stage.ops))


def test_weight_halves_are_done_at_once_where_that_pays() -> None:
    """Held back on purpose; one by one, with the same model, they are not."""
    found = flat()
    plan = one_f_one_b(found)
    joining, held, *rest = zero_bubble_variants(found, plan)
    assert most_at_once(joining) > 4
    assert timeline(found, joining).step_time_s < 0.9 * min(timeline(found, v).step_time_s for v in rest)
    assert pace_s(found, joining) == pytest.approx(timeline(found, joining).step_time_s, rel=0.02)
    best = halved(found, [plan])[0]
    assert timeline(found, best).step_time_s <= timeline(found, joining).step_time_s
    assert best in (joining, held)
    little = flat(parameters=20)  # copies would be larger than the weights
    assert len([*likely_variants(little, one_f_one_b(little))]) == FIRST


def test_weight_halves_at_once_keep_to_the_memory() -> None:
    roomy = one_f_one_b(flat(), 16)
    needed = memory_bytes(flat(), roomy.stages, "1f1b", roomy.micro_batches)
    labels = 16 * 2 * 8  # that wait at the last stage come on top
    counts: list[int] = []
    for part in (2.0, 1.0):
        found = flat(tuple(int(part * needed[device]) + labels for device in roomy.devices))
        variants = list(likely_variants(found, one_f_one_b(found, 16)))
        counts.append(most_at_once(variants[0]))
        for variant in variants:
            most = memory_bytes(found, variant.stages, variant.schedule, variant.micro_batches)
            for use in timeline(found, variant).devices:
                assert use.peak_memory_bytes <= most[use.device] + labels
                assert most[use.device] <= found.cluster.device(use.device).memory_bytes
    assert counts[0] > counts[1]


def test_a_single_stage_waits_for_nobody() -> None:
    found = problem()
    plan = priced(found, "test", [Outline(4, (Span(0, LAYERS, (0,)),))])[0].plan
    assert list(zero_bubble_variants(found, plan)) == []


@pytest.mark.parametrize("bandwidth", ["200 Mbit/s", "10 Gbit/s"])
def test_gradients_are_summed_in_segments_where_that_hides_them(bandwidth: str) -> None:
    found = problem(bandwidth=bandwidth)
    plan = priced(found, "test", [Outline(1, (Span(0, LAYERS, (0, 1, 2)),))])[0].plan
    best = segmented(found, [plan])
    alone, both = (timeline(found, p).step_time_s for p in (plan, best))
    if best == plan:
        assert bandwidth == "10 Gbit/s"
    else:
        assert both < 0.995 * alone
        assert best.syncs[0].most_segments > 1
    for count in (2, 4):  # pieces of equal bytes, which plans had before, are not better
        equal = tuple(sync.model_copy(update={"segments": count}) for sync in plan.syncs)
        pieces = timeline(found, plan.model_copy(update={"syncs": equal})).step_time_s
        assert both <= pieces or best == plan
