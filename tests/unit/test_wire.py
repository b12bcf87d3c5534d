"""Reduced precision on links: bounds of the error, bytes, and what passes as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from spanwise.core.model import TensorSpec
from spanwise.core.precision import Precision, wire_row_bytes
from spanwise.runtime.wire import empty_packed, pack, unpack


def round_trip(tensor: Tensor, precision: Precision) -> Tensor:
    """What arrives of a tensor."""
    into = torch.empty_like(tensor)
    buffers = empty_packed((into,), precision)
    sent = pack((tensor,), precision)
    assert [(t.shape, t.dtype) for t in sent] == [(t.shape, t.dtype) for t in buffers]
    for buffer, part in zip(buffers, sent, strict=True):
        buffer.copy_(part)
    unpack(buffers, (into,), precision)
    return into


def bound(tensor: Tensor, precision: Precision) -> Tensor:
    """The largest error that the module promises."""
    most = tensor.flatten(1).abs().amax(1).view(-1, *[1] * (tensor.dim() - 1))
    if precision == "int8":
        return (most / 253).expand_as(tensor)
    return torch.maximum(tensor.abs() / 2048, most / 2**24)


ROWS = arrays.arrays(
    "float64", (3, 5), elements=st.floats(-1e30, 1e30, allow_subnormal=False).map(lambda x: round(x, 20))
)


@pytest.mark.parametrize("precision", ["half", "int8"])
@given(values=ROWS)
def test_errors_stay_below_the_bound(precision: Precision, values: object) -> None:
    tensor = torch.as_tensor(values)
    assert ((round_trip(tensor, precision) - tensor).abs() <= bound(tensor, precision) * (1 + 1e-6)).all()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_small_gradients_do_not_vanish(scale: float) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(4, 3, 6, 6) * scale
    for precision in ("half", "int8"):
        error = (round_trip(tensor, precision) - tensor).abs()
        assert (error <= bound(tensor, precision) * (1 + 1e-5)).all()
    assert (tensor.to(torch.float16) == 0).all() == (scale == 1e-12)  # what plain float16 would do


def test_the_bound_is_tight_and_full_precision_is_exact() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(64, 512)
    error = (round_trip(tensor, "int8") - tensor).abs()
    assert (error > 0.9 * bound(tensor, "int8")).any()
    assert pack((tensor,), "full")[0] is tensor
    assert empty_packed((tensor,), "full")[0] is tensor


def test_labels_and_zeros_arrive_as_they_are() -> None:
    labels = torch.arange(6)
    assert pack((labels,), "int8")[0] is labels
    assert (round_trip(torch.zeros(2, 3), "int8") == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["half", "int8"])
def test_what_is_not_finite_is_not_hidden(precision: Precision, bad: float) -> None:
    tensor = torch.ones(2, 3)
    tensor[1, 1] = bad
    arrived = round_trip(tensor, precision)
    assert arrived[0].isfinite().all()
    assert not arrived[1].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "item_bytes"), [("float32", 4), ("float64", 8), ("float16", 2), ("int64", 8)]
)
@pytest.mark.parametrize("precision", ["full", "half", "int8"])
def test_bytes_are_those_of_the_packed_tensors(dtype: str, item_bytes: int, precision: Precision) -> None:
    tensor = torch.ones(2, 3, 5, dtype=getattr(torch, dtype))
    spec = TensorSpec(name="x", shape=(3, 5), dtype=dtype, item_bytes=item_bytes)
    sent = sum(t.numel() * t.element_size() for t in pack((tensor,), precision))
    assert sent == 2 * wire_row_bytes((spec,), precision)
