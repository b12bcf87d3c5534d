"""The segmentation that ends first, against all segmentations, dynamic programming and what happens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from segment_cases import (
    brute_force,
    chain,
    chains,
    cut_sets,
    dynamic_programme,
    one_index_programme,
    simulated_pull,
    simulated_push,
)
from spanwise.core.errors import InputError, PlanError
from spanwise.planner.segments.chain import (
    Chain,
    Exchange,
    best_segments,
    bound_ns,
    makespan_ns,
)
from spanwise.planner.segments.labels import best_segments_under, makespan_under_ns

INSTANCES = 3000


def test_threshold_equals_brute_force_and_dynamic_programme() -> None:
    """Negative control: a programme with one index is wrong in a tenth of the cases at least."""
    wrong, worst = 0, 0.0
    for task in chains(INSTANCES, 10):
        found = best_segments(task)
        best = brute_force(task)
        assert found.makespan_ns == best
        assert dynamic_programme(task) == best
        assert makespan_ns(task, found.ends) == best
        assert bound_ns(task) <= best
        control = one_index_programme(task)
        assert control >= best
        if control > best:
            wrong += 1
            worst = max(worst, control / best - 1)
    assert wrong > INSTANCES / 10
    assert worst > 0.1


def test_segments_take_the_planned_time_both_ways() -> None:
    """Event by event. With the same times a push ends as late as a pull under the same cuts."""
    for task in chains(INSTANCES, 12):
        found = best_segments(task)
        assert simulated_pull(task, found.ends) == found.makespan_ns
        assert simulated_push(task, found.ends) == found.makespan_ns
        r = random.Random(task.layers)
        ends = (*sorted(r.sample(range(1, task.layers), r.randrange(task.layers))), task.layers)
        assert simulated_pull(task, ends) == simulated_push(task, ends) == makespan_ns(task, ends)


@pytest.mark.parametrize("layers", [50, 152, 400])
def test_threshold_equals_dynamic_programme_on_long_chains(layers: int) -> None:
    for family in ("skewed", "convolutional") if layers < 400 else ("convolutional",):
        task = chain(random.Random(layers), layers, family)
        found = best_segments(task)
        assert found.makespan_ns == dynamic_programme(task)
        assert simulated_pull(task, found.ends) == found.makespan_ns


def test_the_fewest_segments_of_those_that_end_first() -> None:
    """Layers without bytes come with the ones before them."""
    task = Chain((4, 0, 0, 4, 0), (9, 0, 1, 1, 1), 2)
    assert best_segments(task).ends == (3, 5)
    assert best_segments(Chain((0, 0, 0), (0, 0, 0), 0)).ends == (3,)
    assert best_segments(Chain((7,), (5,), 1)).makespan_ns == 13


def test_one_number_of_nanoseconds_apart() -> None:
    """Times of a real step, where a tolerance would hide a nanosecond."""
    slow = 3_000_000_000
    task = Chain((slow, slow, slow), (slow, slow, slow + 1), 1)
    found = best_segments(task)
    assert found.makespan_ns == brute_force(task) == 4 * slow + 4


def test_without_overhead_every_layer_travels_alone_and_with_a_huge_one_all_together() -> None:
    for task in chains(200, 10):
        free = Chain(task.message_ns, task.compute_ns, 0)
        assert best_segments(free).makespan_ns == makespan_ns(free, tuple(range(1, task.layers + 1)))
        dear = Chain(task.message_ns, task.compute_ns, 10**6)
        assert best_segments(dear).ends == (task.layers,)


@pytest.mark.parametrize("seed", range(3))
def test_labels_equal_brute_force_for_messages_of_any_time(seed: int) -> None:
    """A connection that starts slowly, a rate that rises with the size, and times without any rule."""
    for number, task in enumerate(chains(500, 8)):
        r = random.Random(f"{seed} {number}")
        odd = {(a, b): r.randrange(900) for b in range(1, task.layers + 1) for a in range(b)}

        def message(start: int, stop: int, task: Chain = task, odd: dict[tuple[int, int], int] = odd) -> int:
            nbytes = sum(task.message_ns[start:stop])
            slow = task.overhead_ns * (1 + (start == 0)) + nbytes
            return (slow, task.overhead_ns + math.isqrt(200 * nbytes), odd[start, stop])[seed]

        found = best_segments_under(message, task.compute_ns)
        assert found.makespan_ns == makespan_under_ns(message, task.compute_ns, found.ends)
        least = min(makespan_under_ns(message, task.compute_ns, ends) for ends in cut_sets(task.layers))
        assert found.makespan_ns == least


def test_labels_equal_the_threshold_where_both_are_exact() -> None:
    task = chain(random.Random(1), 60, "convolutional")

    def message(start: int, stop: int) -> int:
        return task.overhead_ns + sum(task.message_ns[start:stop])

    assert best_segments_under(message, task.compute_ns).makespan_ns == best_segments(task).makespan_ns


def test_where_the_rate_depends_on_the_size_the_threshold_is_not_exact() -> None:
    """Control: what the labels are for."""
    worse = 0
    for task in chains(200, 8):

        def message(start: int, stop: int, task: Chain = task) -> int:
            return task.overhead_ns + math.isqrt(200 * sum(task.message_ns[start:stop]))

        single = Chain(tuple(math.isqrt(200 * m) for m in task.message_ns), task.compute_ns, task.overhead_ns)
        ends = best_segments(single).ends
        best = best_segments_under(message, task.compute_ns).makespan_ns
        worse += makespan_under_ns(message, task.compute_ns, ends) > best
    assert worse > 20


def test_nanoseconds_of_bytes_and_seconds() -> None:
    task = Chain.of((1_000_000, 500), (0.25, 1e-9), 0.005, 1e6)
    assert task == Chain((10**9, 500_000), (250_000_000, 1), 5_000_000)
    assert Chain.of((8,), (1.0,), 0.0, math.inf).message_ns == (0,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain((), (), 0), "0 message times and 0 compute times; give both"),
        (lambda: Chain((1,), (1, 2), 0), "1 message times and 2 compute times"),
        (lambda: Chain((1, -3), (1, 2), 0), "a time of -3 ns; times must not be negative"),
        (lambda: Chain((1,), (1,), -1), "a time of -1 ns"),
        (lambda: Chain.of((1,), (math.nan,), 0.0, 1.0), "a time of nan s; times must be finite"),
        (lambda: Chain.of((1,), (-1.0,), 0.0, 1.0), "a time of -1.0 s"),
        (lambda: Chain.of((1,), (1.0,), math.inf, 1.0), "a time of inf s"),
        (lambda: Chain.of((1,), (1.0,), math.nan, 1.0), "a time of nan s"),
        (lambda: Chain.of((4, -8), (1.0, 1.0), 0.0, 2.0), "a time of -4.0 s"),
        (lambda: Chain.of((), (), 0.0, 1.0), "0 message times and 0 compute times; give both"),
        (lambda: Chain.of((1,), (1.0,), 0.0, 0.0), "a rate of 0.0 bytes/s; it must be above zero"),
        (lambda: Chain.of((1,), (1.0,), 0.0, math.nan), "a rate of nan bytes/s"),
        (lambda: Exchange(Chain((1,), (1,), 0), Chain((1, 1), (1, 1), 0), (4,)), "1 layers to pull, 2 to"),
        (lambda: Exchange(Chain((1,), (1,), 0), Chain((1,), (1,), 0), (-4,)), "a layer of -4 bytes; sizes"),
        (lambda: best_segments_under(lambda a, b: 1, ()), r"compute times \(\) ns; give one"),
        (lambda: best_segments_under(lambda a, b: 1, (1, -1)), "give one of at least 0"),
        (lambda: best_segments_under(lambda a, b: a - b, (1, 1)), r"takes -\d+ ns; times must not"),
    ],
)  # fmt: skip
def test_bad_costs_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("ends", [(), (2,), (0, 3), (2, 2, 3), (3, 2), (1, 2, 4)])
def test_segments_that_do_not_cover_are_refused(ends: tuple[int, ...]) -> None:
    task = Chain((1, 1, 1), (1, 1, 1), 0)
    with pytest.raises(PlanError, match="for 3 layers; they must rise and the last must be 3"):
        makespan_ns(task, ends)


def test_ends_rise() -> None:
    for task in chains(100, 12):
        ends = best_segments(task).ends
        assert all(a < b for a, b in pairwise((0, *ends)))
        assert ends[-1] == task.layers
