"""Pulling while others push: planned rounds are what happens, never longer than without, near the best."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction
from itertools import permutations

import pytest

from segment_cases import FAMILIES, exchange, exhaustive_duplex, held, simulated_duplex
from spanwise.core.errors import InputError, PlanError
from spanwise.planner.segments import duplex_search
from spanwise.planner.segments.chain import Chain, Cuts, Ends, Exchange, step_ns
from spanwise.planner.segments.duplex import (
    DuplexCuts,
    duplex_bound_ns,
    duplex_step_ns,
    greatest_cycle_mean,
    pushed_ns,
)
from spanwise.planner.segments.duplex_search import MOST_PRICED_FROM, duplex, duplex_from
from spanwise.planner.segments.rules import dynacomm


def tasks(count: int, most_layers: int, least_layers: int = 1) -> list[Exchange]:
    out: list[Exchange] = []
    for number in range(count):
        r = random.Random(number)
        layers = r.randint(least_layers, most_layers)
        out.append(exchange(r, layers, list(FAMILIES)[number % 4], symmetric=number % 8 < 4))
    return out


def test_a_round_is_what_happens_and_never_longer_than_without() -> None:
    shorter = 0
    for task in tasks(160, 12):
        plan = duplex([task])
        best = step_ns(task, dynacomm(task))
        assert duplex_bound_ns([task]) <= plan.step_ns <= best
        assert duplex_step_ns([task], plan.workers) == plan.step_ns
        rounds = [ends[0] for ends in simulated_duplex([task], plan.workers, 3)]
        assert rounds == [plan.step_ns * step for step in (1, 2, 3)]
        shorter += plan.step_ns < best
    assert shorter > 80


def test_any_cuts_and_orders_are_replayed_to_the_nanosecond() -> None:
    """Random plans, most of them bad."""
    for number, task in enumerate(tasks(300, 9, 2)):
        r = random.Random(number)
        layers = task.pull.layers
        pull, push = ((*sorted(r.sample(range(1, layers), r.randrange(layers))), layers) for _ in range(2))
        plan = DuplexCuts(Cuts(pull, push), tuple(r.sample(range(len(pull)), len(pull))))
        assert simulated_duplex([task], [plan], 2)[1][0] == 2 * duplex_step_ns([task], [plan])


def test_all_pulls_after_all_pushes_take_what_dynacomm_takes() -> None:
    for task in tasks(100, 9):
        cuts = dynacomm(task)
        assert duplex_step_ns([task], [held(cuts)]) == step_ns(task, cuts)


def test_two_sides_are_all_the_orders_that_matter() -> None:
    for task in tasks(24, 5, 2):
        assert exhaustive_duplex(task) == exhaustive_duplex(task, all_orders=True)


def test_near_exhaustive_search() -> None:
    """Over all cuts of both directions and all orders. The search is not exact, and this says by how much."""
    gaps: list[float] = []
    for task in tasks(64, 6, 4):
        best = exhaustive_duplex(task)
        found = duplex([task]).step_ns
        assert found >= best >= duplex_bound_ns([task])
        gaps.append(found / best - 1)
    assert sum(gap == 0 for gap in gaps) >= 0.9 * len(gaps)
    assert sum(gaps) / len(gaps) < 0.002
    assert max(gaps) < 0.04


def test_from_cuts_in_use_little_is_lost_and_few_plans_are_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts of messages that cost a quarter of what they do now, against the whole search."""
    priced: list[Ends] = []
    monkeypatch.setattr(
        duplex_search, "pushed_ns", lambda way, ends: priced.append(ends) or pushed_ns(way, ends)
    )
    gaps: list[float] = []
    for task in tasks(8, 24, 12):
        cheap = [replace(chain, overhead_ns=chain.overhead_ns // 4) for chain in (task.pull, task.push)]
        present = duplex([replace(task, pull=cheap[0], push=cheap[1])]).workers[0]
        priced.clear()
        found = duplex_from(task, present.cuts)
        assert len(priced) <= MOST_PRICED_FROM + 2
        step = duplex_step_ns([task], [found])
        assert step <= duplex_step_ns([task], [present])
        gaps.append(step / duplex([task]).step_ns - 1)
    assert sum(gaps) / len(gaps) < 0.01


def unlike(count: int, number: int) -> list[Exchange]:
    """Workers of one model on links and processors of other speeds."""
    r = random.Random(number)
    base = exchange(r, r.randint(2, 8), list(FAMILIES)[number % 4], symmetric=True)
    out: list[Exchange] = []
    for _ in range(count):
        ways: list[Chain] = []
        for way in (base.pull, base.push):
            link, processor = r.choice((1, 2, 5)), r.choice((1, 1, 3))
            ways.append(
                Chain(
                    tuple(link * m for m in way.message_ns), tuple(processor * c for c in way.compute_ns),
                    way.overhead_ns,
                )
            )  # fmt: skip
        out.append(Exchange(ways[0], ways[1], base.layer_bytes))
    return out


@pytest.mark.parametrize("count", [2, 3])
def test_unlike_workers_settle_into_the_planned_step(count: int) -> None:
    """Over many steps that follow each other; each waits for the slowest worker's push of a layer."""
    for number in range(16):
        workers = unlike(count, number)
        plan = duplex(workers)
        assert plan.step_ns <= max(step_ns(w, dynacomm(w)) for w in workers)
        assert plan.step_ns >= duplex_bound_ns(workers)
        steps, turn = 24, 6  # a cycle over up to three workers repeats after two or three steps
        ends = simulated_duplex(workers, plan.workers, steps)
        for now, before in zip(ends[-1], ends[-1 - turn], strict=True):
            assert -(-(now - before) // turn) == plan.step_ns


def test_held_unlike_workers_wait_for_the_longest_round() -> None:
    for number in range(25):
        workers = unlike(3, number)
        cuts = [dynacomm(worker) for worker in workers]
        longest = max(step_ns(w, c) for w, c in zip(workers, cuts, strict=True))
        assert duplex_step_ns(workers, [held(c) for c in cuts]) == longest


def test_equal_workers_get_equal_segments() -> None:
    task = tasks(8, 9, 6)[3]
    alone = duplex([task])
    three = duplex([task] * 3)
    assert three.step_ns == alone.step_ns
    assert three.workers == alone.workers * 3


def test_pulls_hide_behind_pushes() -> None:
    """Without compute, two pieces of 50 take 60 each: 60 + 60 out, the second 60 back. In one: 110 + 110."""
    way = Chain((50, 50), (0, 0), 10)
    task = Exchange(way, way, (1, 1))
    assert step_ns(task, dynacomm(task)) == 220
    assert duplex([task]).step_ns == 180
    assert duplex([task]).workers[0].order == (1, 0)


def test_one_layer_cannot_overlap() -> None:
    task = Exchange(Chain((5,), (3,), 1), Chain((5,), (6,), 1), (20,))
    assert duplex([task]).step_ns == 6 + 6 + 6 + 3
    zero = Exchange(Chain((0, 0), (0, 0), 0), Chain((0, 0), (0, 0), 0), (0, 0))
    assert duplex([zero]).step_ns == 0


def test_the_heaviest_cycle() -> None:
    r = random.Random(0)
    for _ in range(200):
        count = r.randint(1, 4)
        weights = [[r.randint(0, 30) for _ in range(count)] for _ in range(count)]
        means = [
            Fraction(sum(weights[b][a] for a, b in zip(path, (*path[1:], path[0]), strict=True)), size)
            for size in range(1, count + 1)
            for path in permutations(range(count), size)
        ]
        assert greatest_cycle_mean(weights) == max(means)


def test_bad_workers_and_plans_are_refused() -> None:
    one, two = (Exchange(Chain(t, t, 1), Chain(t, t, 1), t) for t in ((1,), (1, 1)))
    with pytest.raises(InputError, match="workers with 1, 2 layers; give at least one worker"):
        duplex([one, two])
    with pytest.raises(InputError, match="workers with no layers"):
        duplex([])
    with pytest.raises(PlanError, match="order 0, 0 of 2 pulls; it must have each of them once"):
        duplex_step_ns([two], [DuplexCuts(Cuts((1, 2), (2,)), (0, 0))])
    with pytest.raises(PlanError, match="ends 1 for 2 layers"):
        duplex_step_ns([two], [DuplexCuts(Cuts((1,), (2,)), (0,))])
