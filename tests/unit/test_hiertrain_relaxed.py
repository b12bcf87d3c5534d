"""Rows of a linear programme, rounded: against a solver, and where they lose against the exact ones."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hiertrain_cases import (
    IDS,
    ample,
    families,
    layouts,
    no_limit,
    programme_s,
    random_instance,
    three_problem,
)
from planner_cases import make_cluster, make_graph, make_job, make_profile
from spanwise.core.errors import InfeasibleError
from spanwise.planner import BASELINES, Problem, check_plan, make_plan
from spanwise.planner.hiertrain.layout import Instance, Layout, Terms
from spanwise.planner.hiertrain.model import Form, step_time_s, terms
from spanwise.planner.hiertrain.plan import Arena
from spanwise.planner.hiertrain.relaxed import relaxed_rows, rounded_rows
from spanwise.planner.hiertrain.rows import Room, best_rows
from spanwise.planner.hiertrain.search import Search
from spanwise.planner.plans.trial import timeline

FORMS: tuple[Form, ...] = ("event", "barrier")


def some_layout(inst: Instance, r: random.Random, most_helpers: int = 2) -> Layout:
    return r.choice(list(layouts(inst, most_helpers)))


def random_room(r: random.Random, count: int, total: int, *, starts: bool) -> Room:
    """Some with little memory on the finisher, some with few rows on a worker."""
    room = ample(count, total, starts=starts)
    upper = tuple(min(y, r.randint(total // 2, total)) for y in room.upper)
    falling = sorted((r.uniform(0.5, 3) for _ in range(count)), reverse=True)
    return replace(room, upper=upper, weights=tuple(falling), most=r.uniform(1.0, 3.0) * total)


@pytest.mark.parametrize("form", FORMS)
def test_real_rows_are_those_of_a_linear_programme(form: Form) -> None:
    """40 layouts of one to three machines, half of them with little memory."""
    r = random.Random(1)
    fitting = 0
    for seed in range(40):
        inst = random_instance(seed, 4, 24)
        layout = some_layout(inst, r)
        count, formula = 1 + len(layout.cuts), terms(inst, layout, form=form)
        starts = layout.roles.starts
        room = random_room(r, count, 24, starts=starts) if seed % 2 else ample(count, 24, starts=starts)
        found = relaxed_rows(formula, 24, room)
        if found is None:
            assert seed % 2
            assert rounded_rows(formula, 24, room) is None
            continue
        fitting += 1
        assert found.seconds == pytest.approx(programme_s(formula, 24, room, whole=False), rel=1e-9)
        assert sum(found.rows) == pytest.approx(24)
        assert formula.seconds(found.rows) == pytest.approx(found.seconds, rel=1e-9)
    assert fitting > 25


def losses(batch: int, form: Form, instances: int) -> list[float]:
    """Of a random layout each: the step with rounded rows over that with the best ones."""
    r = random.Random(2)
    out: list[float] = []
    for seed in range(instances):
        inst = random_instance(seed, 4, batch)
        layout = some_layout(inst, r)
        formula = terms(inst, layout, form=form)
        room = ample(1 + len(layout.cuts), batch, starts=layout.roles.starts)
        rounded, exact = rounded_rows(formula, batch, room), best_rows(formula, batch, room)
        assert rounded is not None
        assert exact is not None
        assert sum(rounded.rows) == batch
        assert rounded.seconds <= exact.seconds * (1 + 1e-12)  # the programme's own value
        out.append(formula.seconds(rounded.rows) / exact.seconds - 1)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_rounding_loses_against_the_exact_rows(form: Form) -> None:
    """Never shorter than with them, and longer in some of 150 layouts, of few rows and of many.

    A slow machine's rows count: one too many of them may cost more than 1 % of the step.
    """
    for batch in (6, 128):
        found = losses(batch, form, 150)
        assert min(found) >= -1e-12
        assert 5 < sum(loss > 1e-9 for loss in found) < 75
        assert 0.005 < max(found) < 0.05


def test_the_nearest_rows_are_not_the_best_ones() -> None:
    """By hand: 1.6 rows for the worker are nearest to 2, but a row too many costs more than one too few."""
    formula, room = Terms(0.0, (((0.0, 1.0, 0.0), (0.0, 0.0, 2.75)),)), ample(2, 6)
    real = relaxed_rows(formula, 6, room)
    rounded, exact = rounded_rows(formula, 6, room), best_rows(formula, 6, room)
    assert real is not None
    assert rounded is not None
    assert exact is not None
    assert real.rows == pytest.approx((4.4, 1.6))
    assert real.seconds == rounded.seconds == pytest.approx(4.4)
    assert rounded.rows == (4, 2)
    assert formula.seconds(rounded.rows) == pytest.approx(5.5)
    assert (exact.rows, exact.seconds) == ((5, 1), 5.0)


@pytest.mark.parametrize("form", FORMS)
def test_rounded_rows_have_room(form: Form) -> None:
    r = random.Random(3)
    kept = 0
    for seed in range(60):
        inst = random_instance(seed, 3, 12)
        layout = some_layout(inst, r)
        room = random_room(r, 1 + len(layout.cuts), 12, starts=layout.roles.starts)
        found = rounded_rows(terms(inst, layout, form=form), 12, room)
        if found is None:
            continue
        kept += 1
        assert sum(found.rows) == 12
        assert all(a <= y <= b for a, y, b in zip(room.lower, found.rows, room.upper, strict=True))
        assert sum(w * y for w, y in zip(room.weights, found.rows, strict=True)) <= room.most
    assert kept > 30


def test_the_layout_is_that_of_the_least_programme() -> None:
    """The search that stops early finds what all layouts one by one would."""
    for seed in range(6):
        inst = random_instance(seed, 3, 8, server=True)
        search = Search(inst, no_limit(inst), "barrier", rounded_rows)
        found = search.best(families(inst))[0]
        every = [
            relaxed_rows(
                terms(inst, one, form="barrier"), 8, ample(1 + len(one.cuts), 8, starts=one.roles.starts)
            )
            for one in layouts(inst)
        ]
        assert found.price_s == pytest.approx(min(x.seconds for x in every if x is not None), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_baseline_is_one_micro_batch_of_up_to_three_machines(seed: int) -> None:
    """By formula its step is no shorter than that of the best layout and rows of one micro-batch."""
    problem = three_problem(seed, batch=12)
    plan = make_plan(problem, "rounded_lp")
    check_plan(problem, plan)
    assert (plan.strategy, plan.micro_batches, plan.batch) == ("rounded_lp", 1, 12)
    assert {d for stage in plan.stages for d in stage.devices} <= set(IDS)
    arena = Arena.on(problem, (0, 1, 2))
    bounds = [b for helpers, starts in ((0, True), (1, True), (1, False), (2, True), (2, False))
              for b in arena.families(helpers, starts=starts)]  # fmt: skip
    least = Search(arena.instance, arena.room).best(bounds)[0].price_s
    published = replace(arena.instance, sources=None, exchange="server")
    rule = Search(published, arena.room, "barrier", rounded_rows).best(families(published))[0]
    assert least <= step_time_s(arena.instance, rule.layout, rule.rows) * (1 + 1e-12)
    ours = timeline(problem, make_plan(problem, "hiertrain")).step_time_s
    assert ours <= timeline(problem, plan).step_time_s * (1 + 1e-12)
    assert "rounded_lp" in BASELINES


def test_a_batch_smaller_than_its_data_devices_is_refused() -> None:
    problem = three_problem(2, batch=1, private=True, share_labels=True, data_devices=["end", "edge"])
    with pytest.raises(InfeasibleError, match="a batch of 1 row is smaller than its 2 data devices"):
        make_plan(problem, "rounded_lp")


def test_private_rows_of_more_than_three_devices_are_refused() -> None:
    graph, cluster = make_graph(5, 1), make_cluster(5, 1)
    for sources, fits in ((["d0", "d1", "d3"], True), (["d0", "d1", "d3", "d4"], False)):
        job = make_job(16, private=True, share_labels=True, data_devices=sources)
        problem = Problem(graph, make_profile(graph, cluster), cluster, job)
        if fits:
            assert make_plan(problem, "rounded_lp").stages[0].devices
            continue
        with pytest.raises(InfeasibleError, match=r"^rounded_lp: raw data on d0 and d1 and d3 and d4 must"):
            make_plan(problem, "rounded_lp")
