"""Rules of others, on cases worked out by hand; none is ever faster than the optimum."""

from __future__ import annotations

import random

import pytest

from segment_cases import FAMILIES, exchange
from spanwise.planner.segments.chain import Chain, Cuts, Exchange, bound_ns, makespan_ns, step_ns
from spanwise.planner.segments.rules import (
    SEGMENT_RULES,
    bucket_25mb,
    dynacomm,
    ibatch,
    layer_by_layer,
    mg_wfbp,
    sequential,
)

MIB = 2**20


def both(task: Chain, layer_bytes: tuple[int, ...] | None = None) -> Exchange:
    return Exchange(task, task, layer_bytes or (1,) * task.layers)


def test_dynacomm_is_never_slower_than_any_rule_nor_faster_than_the_bounds() -> None:
    """3,000 exchanges; how often each of the others is slower is worth knowing, and more than never."""
    slower = dict.fromkeys(SEGMENT_RULES, 0)
    for number in range(3000):
        r = random.Random(number)
        task = exchange(r, r.randint(1, 12), list(FAMILIES)[number % 4], symmetric=number % 8 < 4)
        best = step_ns(task, dynacomm(task))
        assert best >= bound_ns(task.pull) + bound_ns(task.push)
        for name, rule in SEGMENT_RULES.items():
            cuts = rule(task)
            assert cuts.pull[-1] == cuts.push[-1] == task.pull.layers
            found = step_ns(task, cuts)
            assert found >= best, name
            slower[name] += found > best
            if name == "mg_wfbp":  # merging only helps
                plain = layer_by_layer(task)
                assert makespan_ns(task.push, cuts.push) <= makespan_ns(task.push, plain.push)
    assert slower.pop("dynacomm") == 0
    assert min(slower.values()) > 300


def test_18_against_15() -> None:
    """Where merging as MG-WFBP does is not optimal: gradients are ready at 8, 4 and 1."""
    task = both(Chain((1, 2, 3), (4, 3, 1), 4))
    assert mg_wfbp(task).push == (1, 3)
    assert makespan_ns(task.push, (1, 3)) == 18
    assert dynacomm(task).push == (2, 3)
    assert makespan_ns(task.push, (2, 3)) == 15


def test_mg_wfbp_merges_what_is_ready_before_the_link_is_free() -> None:
    """Gradients of layers 2 and 1 are there while that of layer 3 still travels."""
    task = both(Chain((1, 1, 20), (1, 5, 1), 2))
    assert mg_wfbp(task).push == (2, 3)
    # Nothing is merged where compute is so long that the link has ended before the next gradient.
    assert mg_wfbp(both(Chain((1, 1, 1), (50, 50, 50), 2))).push == (1, 2, 3)


def test_plain_rules() -> None:
    task = both(Chain((1, 2, 3), (1, 1, 1), 1))
    assert sequential(task) == Cuts((3,), (3,))
    assert layer_by_layer(task) == Cuts((1, 2, 3), (1, 2, 3))
    # n cuts are n + 1 messages, each with its overhead.
    assert makespan_ns(task.pull, (3,)) == 1 + 6 + 3
    assert makespan_ns(Chain((1, 1, 1), (0, 0, 0), 10), (1, 2, 3)) == 33


@pytest.mark.parametrize(
    ("sizes", "pull", "push"),
    [
        ((1, 1, 1), (3,), (3,)),
        ((MIB, MIB, MIB), (1, 3), (2, 3)),
        ((MIB - 1, 1, 20 * MIB, 5 * MIB, 1), (2, 4, 5), (3, 5)),
        ((30 * MIB, 30 * MIB), (1, 2), (1, 2)),
        ((MIB // 2, 26 * MIB, MIB), (2, 3), (1, 2, 3)),
    ],
)
def test_buckets_close_at_1_and_25_mib(
    sizes: tuple[int, ...], pull: tuple[int, ...], push: tuple[int, ...]
) -> None:
    task = Chain((1,) * len(sizes), (1,) * len(sizes), 1)
    assert bucket_25mb(both(task, sizes)) == Cuts(pull, push)


def test_ibatch_hides_each_batch_behind_the_one_before() -> None:
    """After the first layer (10 of compute) two layers fit, after these (8) the last two."""
    task = both(Chain((2, 4, 4, 3, 3), (10, 4, 4, 9, 9), 2))
    assert ibatch(task).pull == (1, 3, 5)
    assert makespan_ns(task.pull, (1, 3, 5)) == 2 + 2 + 36


def test_ibatch_begins_with_the_best_first_batch() -> None:
    for number in range(100):
        r = random.Random(number)
        task = exchange(r, r.randint(1, 9), "skewed")
        assert makespan_ns(task.pull, ibatch(task).pull) <= makespan_ns(task.pull, (task.pull.layers,))
