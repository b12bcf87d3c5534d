from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.core.errors import PlanError
from spanwise.core.order import Kept, Op, check_halves, joined, kept_over, order_text, parse_order
from spanwise.schedules import Hop, StageSeconds, one_f_one_b, zb_h1, zero_bubble

NONE = Hop(0.0, 0.0)
UNIFORM = StageSeconds(1.0, 1.0, 1.0)


def scheduled(
    stages: int, micro_batches: int, ahead: list[int], kept: list[int]
) -> tuple[tuple[Op, ...], ...]:
    links = [NONE] * (stages - 1)
    return zero_bubble(micro_batches, [UNIFORM] * stages, links, links, ahead=ahead, kept=kept)


def length(orders: tuple[tuple[Op, ...], ...], seconds: dict[str, float]) -> float:
    """Seconds until all stages are done, run in the given orders without links."""
    done: dict[tuple[int, Op], float] = {}
    at, free = [0] * len(orders), [0.0] * len(orders)
    while any(a < len(order) for a, order in zip(at, orders, strict=True)):
        moved = False
        for stage, order in enumerate(orders):
            if at[stage] == len(order):
                continue
            op = order[at[stage]]
            other = stage + {"forward": -1, "backward": 1, "backward_input": 1}.get(op.kind, 99)
            ready = done.get((other, op)) if 0 <= other < len(orders) else 0.0
            if ready is None:
                continue
            free[stage] = done[stage, op] = max(free[stage], ready) + seconds[op.kind]
            at[stage] += 1
            moved = True
        assert moved, "no order can go on"
    return max(free)


HALVES = {"forward": 1.0, "backward_input": 1.0, "backward_weight": 1.0}


@pytest.mark.parametrize("stages", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("more", [0, 1, 5])
def test_bubble_of_equal_stages_is_the_floor_of_a_round(stages: int, more: int) -> None:
    """(P-1)F with K1 = 2(P-p)-1 and K2 = 2P-1; 1F1B has (P-1)(F+B)."""
    count = 2 * stages + more
    deep = [2 * (stages - p) - 1 for p in range(stages)]
    orders = scheduled(stages, count, deep, [2 * stages - 1] * stages)
    assert length(orders, HALVES) - 3 * count == stages - 1
    whole = tuple(one_f_one_b(count, stages - p) for p in range(stages))
    assert length(whole, {"forward": 1.0, "backward": 2.0}) - 3 * count == 3 * (stages - 1)


@pytest.mark.parametrize("stages", [2, 3, 4, 6, 8])
def test_zb_h1_has_a_third_of_the_bubble_and_keeps_no_more_than_the_first_stage_of_1f1b(stages: int) -> None:
    for count in (1, stages, 2 * stages, 3 * stages + 1):
        orders = tuple(zb_h1(count, p, stages) for p in range(stages))
        for order in orders:
            check_halves(order, count)
            assert max(sum(k) for k in kept_over(order)) <= min(stages, count)
        if count >= stages:
            assert length(orders, HALVES) - 3 * count == stages - 1
            uneven = {"forward": 2.0, "backward_input": 3.0, "backward_weight": 1.0}
            assert length(orders, uneven) - 6 * count == (stages - 1) * (2 + 3 - 1)


def test_zb_h1_of_the_second_of_four_stages_is_three_ahead_and_lags_one() -> None:
    assert order_text(zb_h1(5, 1, 4)) == "F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 I3 W2 I4 W3 W4"


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, list[StageSeconds], list[Hop], list[Hop], list[int], list[int]]:
    stages, count = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    seconds = st.sampled_from((0.0, 0.5, 1.0, 3.0))
    limits = st.lists(st.integers(1, 9), min_size=stages, max_size=stages)
    hops = st.lists(st.builds(Hop, seconds, seconds), min_size=stages - 1, max_size=stages - 1)
    times = st.lists(st.builds(StageSeconds, seconds, seconds, seconds), min_size=stages, max_size=stages)
    return count, draw(times), draw(hops), draw(hops), draw(limits), draw(limits)


@given(problems(), st.integers(1, 9), st.sampled_from((0.2, 1.0)), st.booleans())
def test_any_order_is_complete_ends_and_keeps_to_its_limits(
    problem: tuple[int, list[StageSeconds], list[Hop], list[Hop], list[int], list[int]],
    together: int, part: float, held_back: bool,
) -> None:  # fmt: skip
    """Also where each weight half after the first takes only a part of its time."""
    count, stages, forth, back, ahead, kept = problem
    several = [lambda n, s=s: s.weight_s * (1 + part * (n - 1)) for s in stages]
    orders = zero_bubble(
        count,
        stages,
        forth,
        back,
        ahead=ahead,
        kept=kept,
        together=together,
        held_back=held_back,
        joined_s=several,
    )
    for order, k1, k2 in zip(orders, ahead, kept, strict=True):
        check_halves(order, count)
        assert all(k.whole <= k1 and k.whole + k.halved <= k2 for k in kept_over(order))
    assert length(orders, HALVES) >= 3 * count


def test_a_stage_that_is_always_busy_takes_weight_halves_when_it_must_and_then_many() -> None:
    """The last of two stages, four times as slow: it keeps 4 micro-batches, and frees all places at once."""
    slow = StageSeconds(4.0, 4.0, 4.0)
    orders = zero_bubble(
        8, [UNIFORM, slow], [NONE], [NONE], ahead=[4, 1], kept=[8, 4], together=8,
        joined_s=[lambda n: float(n), lambda n: 3.0 + n],
    )  # fmt: skip
    assert order_text(orders[1]) == (
        "F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3 F4 I4 F5 I5 F6 I6 F7 I7 W4 W5 W6 W7"
    )


def test_weight_halves_held_back_come_when_memory_asks_for_them_and_at_the_end() -> None:
    """The first of two equal stages waits for gradients, and could take a weight half meanwhile."""
    slow, links = Hop(2.0, 2.0), [NONE]
    orders = [
        zero_bubble(5, [UNIFORM] * 2, [slow], links, ahead=[2, 1], kept=[3, 5], together=5, held_back=held)
        for held in (False, True)
    ]
    assert order_text(orders[0][0]) == "F0 F1 I0 F2 I1 W0 W1 F3 I2 F4 W2 I3 W3 I4 W4"
    assert order_text(orders[1][0]) == "F0 F1 I0 F2 I1 W0 W1 F3 I2 F4 I3 I4 W2 W3 W4"
    assert order_text(orders[1][1]) == "F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 W1 W2 W3 W4"


def test_weight_halves_next_to_each_other_are_done_at_once() -> None:
    found = [(str(op), count) for op, count in joined(parse_order("F0 F1 I0 W0 F2 I1 I2 W1 W2"))]
    assert found == [
        ("F0", 1), ("F1", 1), ("I0", 1), ("W0", 1), ("F2", 1), ("I1", 1), ("I2", 1), ("W1", 2),
    ]  # fmt: skip


@given(problems())
def test_text_and_back(
    problem: tuple[int, list[StageSeconds], list[Hop], list[Hop], list[int], list[int]],
) -> None:
    count, stages, forth, back, ahead, kept = problem
    for order in zero_bubble(count, stages, forth, back, ahead=ahead, kept=kept):
        assert parse_order(order_text(order)) == order


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("F0 I0", "0 entries W for 1 micro-batches"),
        ("F0 W0 I0", "'W0' stands before I0"),
        ("I0 F0 W0", "'I0' stands before F0"),
        ("F0 I0 W0 W0", "'W0' stands where W1 is due"),
        ("F1 F0 I0 I1 W0 W1", "'F1' stands where F0 is due"),
        ("F0 B0", "whole backward"),
        ("F0 X0", "'X0' is no forward or backward"),
        ("F0 I W0", "'I' is no forward or backward"),
    ],
)
def test_refuses_orders_that_cannot_be(text: str, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        check_halves(parse_order(text), 1)


def test_what_is_kept_at_most() -> None:
    assert kept_over(parse_order("F0 F1 I0 F2 I1 W0 I2 W1 W2")) == (Kept(2, 1), Kept(1, 2))
    assert kept_over(parse_order("F0 B0 F1 B1")) == (Kept(1, 0),)
