"""Groups, shares and widths by numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.core.decoupling import Axis, Decoupling, LayerShape, Negatives, TargetNet
from spanwise.core.errors import InfeasibleError, InputError
from spanwise.cost.sub_models import sub_model_bytes, sub_model_flops, target_flops
from spanwise.planner.decouple import (
    clustered_groups,
    decoupled,
    equal_groups,
    most_share,
    owned_groups,
    parts,
    rows_per_epoch,
    shares_by_speed,
)

SAMPLE, A, B = Axis(channels=3), Axis(channels=16), Axis(channels=32)
NET = TargetNet(
    name="two convolutions",
    layers=(
        LayerShape(name="a", kind="conv", reads=SAMPLE, gives=A, source="sample", kernel=9, positions=64),
        LayerShape(name="b", kind="conv", reads=A, gives=B, source="divided", kernel=9, positions=16),
        LayerShape(name="head", kind="head", reads=Axis(channels=32, repeat=16), gives=Axis(channels=10),
                   source="divided"),
    ),
)  # fmt: skip


@given(st.integers(1, 300), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=9))
def test_parts_add_up_and_none_is_empty(channels, weights):
    shares = [w / sum(weights) for w in weights]
    if channels < len(shares):
        with pytest.raises(InputError, match=f"layer 'conv' has {channels} channels for {len(shares)}"):
            parts(channels, shares, "conv")
        return
    found = parts(channels, shares)
    assert sum(found) == channels
    assert min(found) >= 1
    assert all(n <= max(1, q * channels + 1) for n, q in zip(found, shares, strict=True))


@pytest.mark.parametrize(
    ("speeds", "slowest_over_fastest"), [((1, 2, 4), 1.12), ((1, 1, 10), 1.12), ((1, 3, 5, 8), 1.12)]
)
def test_shares_by_speed_need_equal_times(speeds, slowest_over_fastest):
    groups = equal_groups(10, len(speeds))
    counts = [100] * 10
    rows = rows_per_epoch(decoupled(NET, groups), counts)
    shares = shares_by_speed(speeds, rows)
    by_square = [q * q * n / s for q, n, s in zip(shares, rows, speeds, strict=True)]
    assert max(by_square) == pytest.approx(min(by_square))
    equal = [n / s for n, s in zip(rows, speeds, strict=True)]
    assert max(by_square) < max(equal) / len(speeds) ** 2 < slowest_over_fastest * max(equal)


def test_what_memory_forbids_goes_to_the_others():
    assert shares_by_speed((1, 1, 4), (9, 9, 9)) == pytest.approx((0.25, 0.25, 0.5))
    assert shares_by_speed((1, 1, 4), (9, 9, 9), (1, 1, 0.2)) == pytest.approx((0.4, 0.4, 0.2))
    assert shares_by_speed((1, 1, 4), (9, 9, 9), (0.3, 1, 0.2)) == pytest.approx((0.3, 0.5, 0.2))
    with pytest.raises(InfeasibleError, match="memory for 50% of the widths"):
        shares_by_speed((1, 1), (9, 9), (0.25, 0.25))
    half = most_share(NET, sub_model_bytes(NET, 0.5, rows=8, copies=1), rows=8, copies=1)
    assert half == pytest.approx(0.5)


def test_groups_by_owner_equal_and_alike():
    assert owned_groups({"cam": (2, 0), "hub": (1,)}, 3) == (("cam", "hub"), ((2, 0), (1,)))
    assert equal_groups(10, 4) == ((0, 1, 2), (3, 4, 5), (6, 7), (8, 9))
    profiles = np.array([[1, 0], [0, 1], [1, 0.1], [0.1, 1], [0.9, 0], [0, 0.8]])
    assert sorted(clustered_groups(profiles, 2)) == [(0, 2, 4), (1, 3, 5)]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (((0, 1), (2,)), "no sub-model has class 3"),
        (((0, 1), (1, 2, 3)), "class 1 is in sub-models 0 and 1"),
        (((0, 1, 2, 3), (4,)), "sub-model 1 has class 4, the model knows 0 to 3"),
    ],
)
def test_missing_and_doubled_classes_are_named(groups, message):
    with pytest.raises(InputError, match=message):
        owned_groups(dict(zip("ab", groups, strict=True)), 4)


def test_what_does_not_go_together_is_refused():
    ten = equal_groups(10, 5)
    with pytest.raises(InputError, match="0 groups of 10 classes"):
        equal_groups(10, 0)
    with pytest.raises(InputError, match="owns no class"):
        owned_groups({"a": (0, 1), "b": ()}, 2)
    with pytest.raises(InputError, match=r"shares 0\.5, 0\.6 of 5 sub-models"):
        decoupled(NET, ten, (0.5, 0.6))
    with pytest.raises(InputError, match="2 devices for 5 sub-models"):
        decoupled(NET, ten, devices=("a", "b"))
    with pytest.raises(InputError, match="read-out 'margin' compares with an output"):
        decoupled(NET, ten, negatives=Negatives(policy="none"), read_out="margin")
    with pytest.raises(InputError, match=r"sub-model 0 has one class \(0\) and no negatives"):
        decoupled(NET, equal_groups(10, 10), negatives=Negatives(policy="none"))
    with pytest.raises(InputError, match="layer 'a' has 16 channels for 20"):
        decoupled(_wider_head(), equal_groups(20, 20))


def _wider_head() -> TargetNet:
    head = NET.head.model_copy(update={"gives": Axis(channels=20)})
    return TargetNet(name="wider", layers=(*NET.layers[:-1], head))


def test_a_decoupling_is_a_file():
    found = decoupled(NET, equal_groups(10, 3), (0.5, 0.3, 0.2), devices=("a", "b", "c"))
    assert Decoupling.from_json(found.to_json()) == found
    assert Decoupling.from_json(found.to_json()).digest == found.digest


def test_rows_of_an_epoch_by_policy():
    counts = [50] * 10

    def rows(**policy):
        return rows_per_epoch(decoupled(NET, equal_groups(10, 5), negatives=Negatives(**policy)), counts)

    assert rows(policy="none") == (100,) * 5
    assert rows(policy="all") == (500,) * 5
    assert rows(policy="pool", per_class=1) == (100 + 8 * 6,) * 5  # repeated to about one own class
    assert rows(policy="pool", per_class=20) == (100 + 160,) * 5


def test_flops_by_hand():
    whole = target_flops(NET)
    a, b, head = 2 * 9 * 64 * 3 * 16, 2 * 9 * 16 * 16 * 32, 2 * 512 * 10
    assert (whole.forward, whole.weight, whole.input) == (a + b + head, a + b + head, b + head)
    half = sub_model_flops(decoupled(NET, equal_groups(10, 2)), 0)
    assert half.forward == a / 2 + b / 4 + 2 * 256 * 6  # five classes and "other"
    assert half.input == half.forward - a / 2
