"""Which plans a run tries, in which order, and which of them it keeps."""

from __future__ import annotations

import functools

import pytest
from test_planner_estimate import problem

from spanwise.core.plan import Plan
from spanwise.planner import Problem, make_plan
from spanwise.planner.adapting.replan import Candidate, same_rows, shape
from spanwise.planner.plans.trial import timeline
from spanwise.planner.published.asteroid import asteroid
from spanwise.planner.tryout import (
    NEAR,
    SETTLE_STEPS,
    TIMED_STEPS,
    WORSE,
    Tryout,
    affordable,
    finalists,
)

A_TRY = SETTLE_STEPS + TIMED_STEPS


@functools.cache
def planned() -> tuple[Problem, Plan]:
    task = problem()
    return task, make_plan(task)


def named(*names: str) -> tuple[Plan, ...]:
    return tuple(planned()[1].model_copy(update={"strategy": name}) for name in names)


def run(tryout: Tryout, seconds: dict[str, float], first_s: float = 9.0, steps: int = 200) -> str:
    """The names of the plans in the order in which they ran; the first two steps of each are slow."""
    ran, since = [tryout.running.strategy], 0
    for _ in range(steps):
        own = seconds[tryout.running.strategy]
        tryout.observe(own if since >= SETTLE_STEPS else first_s)
        since += 1
        if tryout.running.strategy != ran[-1]:
            ran.append(tryout.running.strategy)
            since = 0
    return "".join(ran)


def test_by_turns_and_the_fastest_is_kept() -> None:
    tryout = Tryout(named("A", "B", "C"))
    assert run(tryout, {"A": 1.02, "B": 1.0, "C": 1.03}) == "ABCBABCB"
    assert tryout.over
    assert tryout.running is tryout.best
    assert tryout.best.strategy == "B"
    assert tryout.seconds(tryout.plans[0]) == pytest.approx(1.02)  # first steps do not count


def test_nothing_changes_where_the_first_is_the_fastest_of_the_last_turn() -> None:
    assert run(Tryout(named("A", "B")), {"A": 1.01, "B": 1.0}) == "ABAB"


def test_what_is_clearly_slower_has_one_turn() -> None:
    slower = 1.0 + 2 * WORSE
    assert run(Tryout(named("A", "B", "C")), {"A": 1.0, "B": slower, "C": 1.01}) == "ABCACA"
    assert run(Tryout(named("A", "B")), {"A": 1.0, "B": 1.0 + 0.7 * WORSE}) == "ABA"  # no third turn
    assert run(Tryout(named("A", "B", "C")), {"A": 1.0, "B": slower, "C": slower}) == "ABCA"
    assert run(Tryout(named("A", "B"), turns=1), {"A": 1.0, "B": 0.99}) == "AB"


def test_one_plan_is_no_tryout() -> None:
    tryout = Tryout(named("A"))
    assert tryout.over
    assert tryout.observe(1.0) is None


def test_a_drift_in_the_first_turn_hits_all_alike() -> None:
    """Steps take 6 % longer from the second plan on: by one turn alone the first would win."""
    tryout = Tryout(named("A", "B"), turns=2)
    steps = 0
    while not tryout.over:
        tryout.observe((1.0 if tryout.running.strategy == "A" else 0.97) * (1.06 if steps >= A_TRY else 1.0))
        steps += 1
    assert tryout.best.strategy == "B"


def test_finalists_are_unlike_each_other_and_near_the_best() -> None:
    task, plan = planned()
    found = finalists(task, plan, 4)
    assert 1 <= len(found) <= 4
    best_s = timeline(task, plan).step_time_s
    took = [timeline(task, change.plan).step_time_s for change in found]
    assert took == sorted(took) == [change.step_s for change in found]
    assert all(s <= (1 + NEAR) * best_s for s in took)
    kinds = [
        (p.schedule, p.micro_batches, tuple(tuple(sorted(s.devices)) for s in p.stages))
        for p in (plan, *(change.plan for change in found))
    ]
    assert len(set(kinds)) == len(kinds)
    for change in found:
        assert same_rows(task, plan, change.plan)
        assert change.plan.strategy == plan.strategy


def test_the_plans_of_others_take_part() -> None:
    task, plan = planned()
    finalists(task, plan, 1)
    assert shape(asteroid(task)) in task.memo.trials


def test_only_what_a_run_has_the_time_for() -> None:
    _, plan = planned()
    cheap, dear = Candidate(plan, "plan", 1.0, 0, 0.0), Candidate(plan, "plan", 1.0, 10**8, 50.0)
    assert affordable([cheap] * 3, 1.0, 20) == ()
    assert affordable([cheap] * 3, 1.0, 100) == (cheap,)
    assert affordable([cheap] * 3, 1.0, 1000) == (cheap,) * 3
    assert affordable([cheap, dear, cheap], 1.0, 1000) == (cheap,)
    assert affordable([dear], 1.0, 10_000) == (dear,)  # 300 s of 10,000
