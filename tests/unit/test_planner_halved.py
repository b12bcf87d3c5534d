"""What lies next to a plan, searches in halves, and plans that only segments make the best."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_planner_bubble import problem as three_devices
from test_planner_estimate import problem as two_sites
from test_planner_hpp import many

from planner_cases import make_problem
from spanwise.api.adaptive import Adapting
from spanwise.api.searcher import _problem, _problem_data, _search, _search_data
from spanwise.core.plan import Plan
from spanwise.core.run_folder import RunFolder
from spanwise.planner import Problem, make_plan
from spanwise.planner.adapting.adaptation import Search
from spanwise.planner.garbage import without_collection
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.bubble import likely_variants
from spanwise.planner.plans.halved import LARGE, _likeliest
from spanwise.planner.plans.near import near_borders, near_groups, near_joins
from spanwise.planner.plans.pace import pace_s
from spanwise.planner.plans.trial import Priced, priced, timeline
from spanwise.planner.plans.variants import segmented
from spanwise.planner.problem import Memo
from spanwise.planner.search.groups import Groups
from spanwise.planner.segments.rings import hidden_s
from spanwise.planner.strategies.hpp import MANY
from spanwise.runtime.session import Probe


def made(task: Problem, micro_batches: int, *spans: tuple[int, int, tuple[int, ...]]) -> Plan:
    outline = Outline(micro_batches, tuple(Span(*span) for span in spans))
    return priced(task, "test", [outline])[0].plan


def edges(outline: Outline) -> tuple[int, ...]:
    assert all(a.stop == b.start for a, b in pairwise(outline.spans))
    return (outline.spans[0].start, *(span.stop for span in outline.spans))


def test_borders_move_as_far_as_they_reach() -> None:
    task = three_devices()
    plan = made(task, 4, (0, 3, (0,)), (3, 5, (1,)), (5, 12, (2,)))
    near = {edges(outline) for outline in near_borders(task, plan)}
    assert near == {(0, a, b, 12) for a, b in ((2, 5), (4, 5), (3, 4), (3, 6), (2, 4), (4, 6))}
    far = [edges(outline) for outline in near_borders(task, plan, 3)]
    assert len(far) == len(set(far))
    reach = range(-3, 4)
    allowed = {(0, 3 + i, 5 + j, 12) for i in reach for j in reach if 0 < 3 + i < 5 + j and (i or j)}
    assert set(far) == allowed


def test_groups_change_and_stages_join() -> None:
    task = two_sites()
    plan = made(task, 4, (0, 3, (0,)), (3, 5, (2,)), (5, 8, (1,)))
    groups = [
        tuple(span.group for span in outline.spans) for outline in near_groups(task, plan, singles=False)
    ]
    assert {edges(outline) for outline in near_groups(task, plan, singles=False)} == {(0, 3, 5, 8)}
    assert ((2,), (0,), (1,)) in groups  # exchanged
    assert ((0,), (2, 3), (1,)) in groups  # one more
    assert len(set(groups)) == len(groups)
    alone = near_groups(task, plan, singles=True)
    assert alone
    assert all(len(span.group) == 1 for outline in alone for span in outline.spans)
    joined = [(edges(o), tuple(span.group for span in o.spans)) for o in near_joins(task, plan)]
    assert joined == [
        ((0, 5, 8), ((0,), (1,))), ((0, 5, 8), ((2,), (1,))),
        ((0, 3, 8), ((0,), (2,))), ((0, 3, 8), ((0,), (1,))),
    ]  # fmt: skip


def test_a_given_first_stage_stays() -> None:
    task = make_problem(4, 8, 1, private=True)
    plan = make_plan(task, "data_parallel")
    assert near_groups(task, plan, singles=False) == near_joins(task, plan) == []


def test_in_halves_other_stages_wait_for_the_input_half_alone() -> None:
    task = three_devices(halves=(0.4, 0.7))
    cuts, counts = (0, 4, 8, 12), (1, 4)
    whole, halves = (Groups(task, cuts, counts, halves=in_halves) for in_halves in (False, True))
    profile, rows = task.profile, task.job.batch // 4
    found, plain = halves.times((1,)), whole.times((1,))
    into, weight = profile.halves_s("d1", 4, 12, rows)
    forward = profile.forward_s("d1", 4, 12, rows)
    message = 2 * 2 * float(task.tables.message_s[1])
    at = (1, 1, 3)
    assert found.both[at] == pytest.approx(forward + into + message)
    assert found.whole[at] == pytest.approx(4 * (forward + into + weight + message))
    assert plain.whole[at] == pytest.approx(4 * plain.both[at])
    assert found.both[at] < plain.both[at] < found.whole[at] / 4  # halves take a tenth more together


def test_a_plan_that_is_slower_in_one_piece_may_win_in_segments() -> None:
    """Not where another is faster by more than segments can hide."""
    task = three_devices(bandwidth="80 Mbit/s")
    ring = made(task, 1, (0, 12, (0, 1, 2)))
    alone = segmented(task, [ring])
    near, far = (made(task, m, (0, 6, (0,)), (6, 12, (1,))) for m in (4, 8))
    seconds = [timeline(task, plan).step_time_s for plan in (far, alone, near, ring)]
    assert seconds == sorted(seconds)
    assert hidden_s(task, ring) == pytest.approx(seconds[3] - seconds[1], rel=0.05)
    assert segmented(task, [near, ring]) == alone
    assert segmented(task, [near]) == near
    assert segmented(task, [far, ring]) == far


def test_where_planning_must_be_quick_fewer_plans_are_compared() -> None:
    """A run that adapts thinks of more conditions so; its searches in other processes do as it does."""
    slow, quick = (replace(two_sites(), memo=Memo(), thorough=thorough) for thorough in (True, False))
    found = [timeline(task, make_plan(task, "hpp")).step_time_s for task in (slow, quick)]
    assert found[0] <= found[1]
    assert len(quick.memo.halves) < len(slow.memo.halves) / 2
    plan = made(quick, 4, (0, 4, (0,)), (4, 8, (2,)))
    search = Search(quick, plan, "hpp", "test")
    for task in (slow, quick):
        other = _search(_search_data(search), _problem(_problem_data(task)))
        assert other.problem.thorough == task.thorough


def test_what_a_probe_shows_is_kept(tmp_path: Path) -> None:
    task = two_sites()
    plan = made(task, 4, (0, 4, (0,)), (4, 8, (2,)))
    folder = RunFolder.create(tmp_path / "run")
    assignment = cast("Any", SimpleNamespace(plan=plan))
    steering = Adapting(task, assignment, folder, last_step=10, strategy="hpp")
    try:
        steering.probed(Probe("n1", "s1", (1_000, 50_000)), ((1_000, 0.0101234567), (50_000, 0.02)))
    finally:
        steering.close()
    assert folder.read_metrics() == [
        {"event": "probe", "step": 0, "source": "n1", "target": "s1",
         "round_trips": [[1_000, 0.010123], [50_000, 0.02]]}
    ]  # fmt: skip


@pytest.mark.parametrize("micro_batches", [8, 64], ids=["small", "large"])
def test_of_large_plans_those_that_are_far_behind_are_not_simulated(micro_batches: int) -> None:
    """By pace, and by what pace was of their like so far; the best of them is found all the same."""
    task = make_problem(5, 24, 1, batch=256)
    plans = [made(task, micro_batches, (0, a, (0, 1)), (a, 24, (2, 3, 4))) for a in (4, 8, 12, 16, 20)]
    large = Priced(plans[0], 0.0).effort > LARGE
    assert large == (micro_batches == 64)
    variants = sorted(
        (v for plan in plans for v in likely_variants(task, plan)), key=lambda v: pace_s(task, v)
    )
    tried = _likeliest(replace(task, memo=Memo()), variants, len(variants))
    assert (len(tried) < len(variants)) == large
    assert min(seconds(task, tried)) == min(seconds(task, variants))


def seconds(task: Problem, plans: list[Plan]) -> list[float]:
    return [timeline(task, plan).step_time_s for plan in plans]


@pytest.mark.parametrize("thorough", [True, False])
def test_of_many_devices_plans_in_halves_alone_are_searched_for(thorough: bool) -> None:
    task = replace(many(MANY + 4), thorough=thorough)
    plan = make_plan(task, "hpp")
    assert {halves for _, halves in task.memo.sequences} <= {thorough}
    assert (plan.schedule == "zero_bubble") or not thorough


def test_no_passes_of_the_collector_meanwhile() -> None:
    """Whatever ends it, and as it was before."""
    seen: list[bool] = []

    @without_collection()
    def fail() -> None:
        seen.append(gc.isenabled())
        raise ValueError("over")

    with pytest.raises(ValueError, match="over"):
        fail()
    assert seen == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
