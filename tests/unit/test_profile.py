from __future__ import annotations

import math
from typing import Any

import pytest

from spanwise.core.errors import InputError
from spanwise.core.profile import DeviceTimes, LayerTimes, Profile, TimeTable


def table(*layers: tuple[float, ...], rows: tuple[int, ...] = (2, 4, 8), **more: Any) -> TimeTable:
    times = tuple(LayerTimes(forward_s=f, backward_s=tuple(2 * s for s in f)) for f in layers)
    return TimeTable(rows=rows, layers=times, **more)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        (0, 0.0), (-1, 0.0),
        (2, 10.0), (4, 14.0), (8, 30.0),  # as measured
        (3, 12.0), (6, 22.0),  # between
        (1, 8.0),  # below: along the first segment
        (10, 38.0),  # above: along the last
    ],
)  # fmt: skip
def test_times_between_and_beyond_the_measured_rows(rows: int, seconds: float) -> None:
    found = table((10.0, 14.0, 30.0))
    assert found.forward(0, rows) == pytest.approx(seconds)
    assert found.backward(0, rows) == pytest.approx(2 * seconds)


def test_times_are_never_negative() -> None:
    assert table((1.0, 9.0, 10.0)).forward(0, 1) == 0.0
    assert table((9.0, 9.0, 1.0)).forward(0, 100) == 0.0


def test_a_table_is_stretched_by_row_count() -> None:
    """Between known counts by the logarithm, outside as at the nearest."""
    found = table((10.0, 14.0, 30.0, 60.0), rows=(1, 4, 8, 64), update_s_per_byte=1.0)
    longer = found.stretched({2: 1.5, 8: 1.0, 32: 0.5})
    assert longer.layers[0].forward_s == pytest.approx((15.0, 14.0 * 1.25, 30.0, 30.0))
    assert longer.layers[0].backward_s == pytest.approx((30.0, 28.0 * 1.25, 60.0, 60.0))
    assert longer.halves(0, 8) == pytest.approx((30.0, 30.0))
    assert longer.update_s_per_byte == 1.0
    assert found.stretched({8: 1.0}) == found


def test_halves_of_a_backward_are_as_measured_or_half_of_it_each() -> None:
    measured = LayerTimes(
        forward_s=(1.0, 2.0), backward_s=(2.0, 4.0), backward_input_s=(1.0, 3.0), backward_weight_s=(1.5, 2.0)
    )
    older = LayerTimes(forward_s=(1.0, 2.0), backward_s=(2.0, 4.0))
    found = TimeTable(rows=(2, 4), layers=(measured, older))
    assert found.halves(0, 3) == pytest.approx((2.0, 1.75))
    assert found.halves(1, 3) == pytest.approx((1.5, 1.5))
    with_factor = Profile(graph_digest="0", tables=(found,), devices=(DeviceTimes(device="a", factor=10),))
    assert with_factor.halves_s("a", 0, 2, 4) == pytest.approx((50.0, 40.0))


def test_halves_need_a_time_for_every_row_count_too() -> None:
    layer = {"forward_s": [1, 1], "backward_s": [1, 1], "backward_input_s": [1], "backward_weight_s": [1, 1]}
    with pytest.raises(InputError, match="layer 0 needs 2 times, none negative"):
        TimeTable.parse({"rows": [1, 2], "layers": [layer]})


def test_one_row_count_scales() -> None:
    found = table((6.0,), rows=(3,))
    assert [found.forward(0, rows) for rows in (0, 1, 3, 6)] == [0.0, 2.0, 6.0, 12.0]


@pytest.mark.parametrize("rows", [(4, 2), (2, 2), (0, 1), (-1, 1)])
def test_row_counts_rise(rows: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="must be positive and rise"):
        TimeTable.parse({"rows": rows, "layers": [{"forward_s": [1, 1], "backward_s": [1, 1]}]})


@pytest.mark.parametrize("times", [[1.0], [1.0, 2.0, 3.0], [1.0, -1.0]])
def test_every_layer_has_a_time_for_every_row_count(times: list[float]) -> None:
    for forward, backward in ((times, [1, 1]), ([1, 1], times)):
        with pytest.raises(InputError, match="layer 0 needs 2 times, none negative"):
            TimeTable.parse({"rows": [1, 2], "layers": [{"forward_s": forward, "backward_s": backward}]})


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf])
def test_times_are_finite(seconds: float) -> None:
    for forward, backward in (([seconds], [1.0]), ([1.0], [seconds])):
        with pytest.raises(InputError, match="finite number"):
            TimeTable.parse({"rows": [1], "layers": [{"forward_s": forward, "backward_s": backward}]})


def test_a_table_has_a_layer() -> None:
    with pytest.raises(InputError, match="layers: Tuple should have at least 1 item"):
        TimeTable.parse({"rows": [1], "layers": []})


def profile(**changes: Any) -> Profile:
    slow = table((2.0, 4.0, 8.0), (1.0, 2.0, 4.0), update_s_per_byte=0.5)
    fast = table((0.2, 0.4, 0.8), (0.1, 0.2, 0.4), update_s_per_byte=0.25)
    devices = (DeviceTimes(device="a"), DeviceTimes(device="b", factor=3), DeviceTimes(device="c", table=1))
    return Profile.parse({"graph_digest": "0", "tables": (slow, fast), "devices": devices, **changes})


def test_a_device_has_a_table_and_a_factor() -> None:
    found = profile()
    assert found.forward_s("a", 0, 2, 4) == pytest.approx(6.0)
    assert found.forward_s("b", 0, 2, 4) == pytest.approx(18.0)
    assert found.backward_s("c", 1, 2, 8) == pytest.approx(0.8)
    assert found.forward_s("a", 1, 1, 4) == 0.0
    assert found.update_s("b", 10) == pytest.approx(15.0)
    assert found.update_s("c", 10) == pytest.approx(2.5)


def test_no_times_for_a_device() -> None:
    with pytest.raises(InputError, match=r"no times for device 'd'.*has: a, b, c"):
        profile().forward_s("d", 0, 1, 1)


def test_tables_exist() -> None:
    with pytest.raises(InputError, match="device 'x' refers to table 2 of 2"):
        profile(devices=(DeviceTimes(device="x", table=2),))


def test_a_device_is_listed_once() -> None:
    with pytest.raises(InputError, match="device 'x' is listed twice"):
        profile(devices=(DeviceTimes(device="x"), DeviceTimes(device="x", table=1)))
