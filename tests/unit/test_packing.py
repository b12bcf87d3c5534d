"""Several tensors as one message: the same values, the same decision at both ends."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spanwise.runtime.packing import MOST_BYTES, empty_packed, packed, unpack, worth_packing

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.int8, torch.bool])


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5))
    return [torch.randint(0, 2, shape).to(draw(DTYPES)) for shape in shapes]


@given(tensors())
def test_values_come_back_whatever_their_types_and_sizes(sent: list[Tensor]) -> None:
    buffer = empty_packed(sent)
    buffer.copy_(packed(sent))
    arrived = [torch.zeros_like(t) for t in sent]
    unpack(buffer, arrived)
    assert all(torch.equal(a, b) for a, b in zip(sent, arrived, strict=True))
    assert worth_packing(sent) == worth_packing(arrived)


def test_one_tensor_and_large_ones_go_as_they_are() -> None:
    small, large = torch.zeros(10), torch.zeros(MOST_BYTES // 4 - 12)
    assert not worth_packing([small])
    assert worth_packing([small, large])
    assert not worth_packing([large, large])
    assert worth_packing([small, small, large])


def test_views_of_other_tensors_are_filled_in_place() -> None:
    whole = torch.zeros(6, 4)
    targets = [whole[1:3], whole[4:6]]
    unpack(packed([torch.ones(2, 4), torch.full((2, 4), 2.0)]), targets)
    assert whole[:, 0].tolist() == [0, 1, 1, 0, 2, 2]
