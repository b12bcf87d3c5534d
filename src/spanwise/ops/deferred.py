"""Backward in two halves: gradients of activations at once, gradients of the products' weights later.

Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2: a product's backward is two products, one
for its input, which the stage before waits for, and one for its weight, which nobody waits for. Here the
weight of a product enters the forward pass detached, so that autograd computes the first only, and a hook on
the product's result hands over the gradient from which the second is computed later. All else (norms, biases
of norms, weights that are not the direct factor of a product, products whose input wants no gradient) is
left to autograd and is done in the first half: nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanwise.ops.arguments import Argument, Ref
from spanwise.ops.opgraph import Op

Product = Callable[..., Tensor]

_aten = torch.ops.aten


class Deferred:
    """Weight gradients of one micro-batch that are still to be computed, by layer."""

    def __init__(self) -> None:
        self._left: dict[int, list[tuple[Callable[[Tensor], None], Tensor]]] = {}

    def expect(self, layer: int, result: Tensor, weigh: Callable[[Tensor], None]) -> None:
        """Has ``weigh`` called with the gradient of ``result``, if one reaches it, by ``run``."""
        left = self._left.setdefault(layer, [])
        result.register_hook(lambda gradient: left.append((weigh, gradient)))  # pyright: ignore

    def run(self, start: int | None = None, stop: int | None = None) -> None:
        """Adds the weight gradients of layers ``[start, stop)`` to ``.grad`` and frees what they come from.

        Layers go from the last to the first, as in a whole backward; without a range all of them.
        """
        chosen = [
            layer
            for layer in sorted(self._left, reverse=True)
            if (start is None or layer >= start) and (stop is None or layer < stop)
        ]
        with torch.no_grad():
            for layer in chosen:
                left = self._left.pop(layer)
                left.reverse()
                while left:
                    weigh, gradient = left.pop()
                    weigh(gradient)


def deferrable(node: Op) -> Product | None:
    """How a product runs whose weight gradient can wait; None if the operation is no such product.

    The result is called with a :class:`Deferred`, the index of the layer and the arguments of the operation.
    """
    found = _PRODUCTS.get(node.op)
    if found is None or node.kwargs:
        return None
    weight, bias = _argument(node, found.weight), _argument(node, found.bias)
    held = isinstance(bias, Ref) and bias.kind in ("parameter", "buffer")
    trained = isinstance(weight, Ref) and weight.kind == "parameter"
    return found.run if trained and (bias is None or held) else None


def deferred_input(node: Op) -> Ref | None:
    """What such a product keeps for its weight gradient; None if the operation is no such product."""
    x = None if deferrable(node) is None else _argument(node, _PRODUCTS[node.op].x)
    return x if isinstance(x, Ref) else None


def _argument(node: Op, place: int) -> Argument:
    return node.args[place] if place < len(node.args) else None


def linear(later: Deferred, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``aten.linear``: (..., n) to (..., m) with weight (m, n)."""
    if not x.requires_grad:
        return _aten.linear.default(x, weight, bias)
    result = _aten.linear.default(x, weight.detach(), _detached(bias))
    kept = x.detach()

    def weigh(gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1])
        _add_product(weight, rows.t(), kept.reshape(-1, kept.shape[-1]))
        _add_sum(bias, rows)

    later.expect(layer, result, weigh)
    return result


def addmm(later: Deferred, layer: int, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``aten.addmm``: (rows, n) to (rows, m) with weight (n, m)."""
    if not x.requires_grad or bias.dim() != 1:
        return _aten.addmm.default(bias, x, weight)
    result = _aten.addmm.default(bias.detach(), x, weight.detach())
    kept = x.detach()

    def weigh(gradient: Tensor) -> None:
        _add_product(weight, kept.t(), gradient)
        _add_sum(bias, gradient)

    later.expect(layer, result, weigh)
    return result


def _convolution(forward: Any, dimensions: int) -> Product:
    """``aten.conv1d`` to ``conv3d``; after the bias come stride, padding, dilation and groups."""

    def every(value: int | Sequence[int]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values if len(values) == dimensions else values * dimensions

    def convolution(
        later: Deferred, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any
    ) -> Tensor:
        if not x.requires_grad:
            return forward(x, weight, bias, *rest)
        result = forward(x, weight.detach(), _detached(bias), *rest)
        kept = x.detach()
        stride, padding, dilation, groups = (*rest, *(1, 0, 1, 1)[len(rest) :])

        def weigh(gradient: Tensor) -> None:
            wanted = bias is not None and bias.requires_grad
            _, of_weight, of_bias = _aten.convolution_backward.default(
                gradient, kept, weight, None if bias is None else list(bias.shape), every(stride),
                every(padding), every(dilation), False, [0] * dimensions, groups, [False, True, wanted],
            )  # fmt: skip
            _add(weight, of_weight)
            if wanted:
                _add(bias, of_bias)

        later.expect(layer, result, weigh)
        return result

    return convolution


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _add_product(parameter: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds ``left @ right`` without a buffer for the product."""
    if parameter.grad is None:
        parameter.grad = left @ right
    else:
        parameter.grad.addmm_(left, right)


def _add_sum(bias: Tensor | None, rows: Tensor) -> None:
    if bias is not None and bias.requires_grad:
        _add(bias, rows.sum(0))


def _add(parameter: Tensor | None, gradient: Tensor) -> None:
    assert parameter is not None
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


class _Kind(NamedTuple):
    """How a product runs, and the places of its input, weight and bias among the arguments."""

    run: Product
    x: int
    weight: int
    bias: int


_PRODUCTS = {
    "aten.linear.default": _Kind(linear, 0, 1, 2),
    "aten.addmm.default": _Kind(addmm, 1, 2, 0),
    "aten.conv1d.default": _Kind(_convolution(_aten.conv1d.default, 1), 0, 1, 2),
    "aten.conv2d.default": _Kind(_convolution(_aten.conv2d.default, 2), 0, 1, 2),
    "aten.conv3d.default": _Kind(_convolution(_aten.conv3d.default, 3), 0, 1, 2),
}
