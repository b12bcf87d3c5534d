"""Convolutions whose kernels are single points, as matrix products of channels, with their two gradients.

``x`` is (rows, channels, ...), ``weight`` (outputs, channels, 1, ...); nothing is copied but what is not
contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The result, (rows, outputs, ...)."""
    result = _products(weight.flatten(1), x)
    if bias is not None:
        result += bias.view(-1, *[1] * (x.dim() - 2))
    return result


def pointwise_input(gradient: Tensor, weight: Tensor) -> Tensor:
    """Gradient of ``x`` from that of the result."""
    return _products(weight.flatten(1).t(), gradient)


def pointwise_weight(gradient: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Gradient of the weight, of this shape; row by row, as one product of all rows would copy them."""
    total = gradient.new_zeros(shape[0], shape[1])
    for of_result, of_x in zip(gradient.flatten(2), x.flatten(2), strict=True):
        total.addmm_(of_result, of_x.t())
    return total.view(tuple(shape))


def _products(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix`` times the channels at every position of every row; no view, which nobody might overwrite."""
    found = x.new_empty(len(x), matrix.shape[0], *x.shape[2:])
    torch.bmm(matrix.expand(len(x), *matrix.shape), x.flatten(2), out=found.flatten(2))
    return found
