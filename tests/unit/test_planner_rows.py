from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from spanwise.planner.facts.rows import min_max_rows
from spanwise.planner.problem import largest_remainder


def brute_force(times: list[list[float]], total: int) -> float:
    """Least greatest time over all ways to share the rows; infinite if none fits."""
    best = float("inf")
    for rows in product(*(range(len(t) + 1) for t in times)):
        if sum(rows) == total:
            best = min(best, max(t[y - 1] if y else 0.0 for t, y in zip(times, rows, strict=True)))
    return best


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_rows_equal_brute_force(devices: int) -> None:
    r = random.Random(devices)
    for _ in range(80):
        total = r.randint(1, 7)
        times: list[list[float]] = []
        for _ in range(devices):
            cap = r.choice([total, total, r.randint(0, total)])
            # Launch cost, steps and plateaus: shares by speed alone would be wrong.
            grown = np.cumsum([r.choice([0.0, 0.0, 1.0, r.random()]) for _ in range(total)]) + r.random()
            times.append([float(t) if y < cap else float("inf") for y, t in enumerate(grown)])
        rows, feasible = min_max_rows(np.array([times]), total)
        best = brute_force(times, total)
        assert feasible[0] == np.isfinite(best)
        if feasible[0]:
            assert rows[0].sum() == total
            found = max(t[y - 1] if y else 0.0 for t, y in zip(times, rows[0], strict=True))
            assert found == best


def test_shares_by_the_speed_of_one_row_are_twice_as_slow() -> None:
    """Control: launch cost makes speeds depend on rows, and the test above can tell a worse rule."""
    times = np.array([[1.0 + 0.1 * y for y in range(8)], [0.6 * (y + 1) for y in range(8)]])
    rows, _ = min_max_rows(times[None], 8)
    assert rows[0].tolist() == [6, 2]
    by_speed = [3, 5]  # 1 / 1.0 to 1 / 0.6
    assert times[1, by_speed[1] - 1] >= 2 * max(times[d, y - 1] for d, y in enumerate(rows[0]))


def test_all_cases_are_worked_out_at_once() -> None:
    times = np.array([[[1.0, 2.0], [1.0, 2.0]], [[5.0, 6.0], [1.0, 2.0]], [[np.inf] * 2, [1.0, np.inf]]])
    rows, feasible = min_max_rows(times, 2)
    assert rows.tolist() == [[1, 1], [0, 2], [0, 0]]
    assert feasible.tolist() == [True, True, False]


def test_two_rows_or_none_equals_brute_force() -> None:
    """For layers with batch statistics. Whom one row is left to has none in another group."""
    r = random.Random(5)
    exact = 0
    for _ in range(200):
        devices, total = r.randint(1, 3), r.randint(2, 8)
        times = [
            [float(t) for t in np.cumsum([r.choice([0.5, 1.0, r.random()]) for _ in range(total)])]
            for _ in range(devices)
        ]
        rows, feasible = min_max_rows(np.array([times]), total, np.array([2]))
        assert feasible[0]
        assert rows[0].sum() == total
        if 1 not in rows[0]:
            exact += 1
            found = max(t[y - 1] if y else 0.0 for t, y in zip(times, rows[0], strict=True))
            paired = [[t[1], *t[1:]] for t in times]
            assert found == pytest.approx(brute_force(paired, total))
    assert exact > 150


def test_a_row_more_than_memory_holds_is_no_pair() -> None:
    times = np.array([[[1.0, np.inf, np.inf, np.inf], [1.0, 2.0, 3.0, 4.0]]])
    assert min_max_rows(times, 4)[0].tolist() == [[1, 3]]
    assert min_max_rows(times, 4, np.array([2]))[0].tolist() == [[0, 4]]


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [
        (10, (1.0, 1.0), (5, 5)),
        (7, (1.0, 1.0, 1.0), (3, 2, 2)),
        (4, (0.7, 0.2, 0.1), (2, 1, 1)),
        (3, (100.0, 1.0, 1.0), (1, 1, 1)),
        (16, (3.0, 1.0), (12, 4)),
    ],
)
def test_largest_remainder(total: int, weights: tuple[float, ...], parts: tuple[int, ...]) -> None:
    assert largest_remainder(total, weights) == parts


def test_largest_remainder_with_a_floor() -> None:
    assert largest_remainder(8, (100.0, 1.0, 1.0), 2) == (4, 2, 2)
    assert largest_remainder(6, (100.0, 1.0, 1.0), 2) == (2, 2, 2)
