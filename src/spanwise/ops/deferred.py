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
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanwise.ops.arguments import Argument, Ref
from spanwise.ops.opgraph import Op

Product = Callable[..., Tensor]
Weigh = Callable[[Tensor, Tensor], None]

_aten = torch.ops.aten


class _Waiting(NamedTuple):
    """A product whose weight gradient is ``weigh`` of its input and of its result's gradient, rows in front.

    Two products with the same ``factors`` have the same weight, bias and settings.
    """

    factors: tuple[Any, ...]
    weigh: Weigh
    x: Tensor
    gradient: Tensor

    @property
    def like(self) -> tuple[Any, ...]:
        """Products that are equal in this can be one over the rows of all."""
        return self.factors, self.x.shape[1:], self.gradient.shape[1:], self.x.dtype, self.gradient.dtype


class Deferred:
    """Weight gradients of one micro-batch that are still to be computed, by layer."""

    def __init__(self) -> None:
        self._left: dict[int, list[_Waiting]] = {}

    def expect(self, layer: int, result: Tensor, x: Tensor, factors: tuple[Any, ...], weigh: Weigh) -> None:
        """Has ``weigh`` called with ``x`` and the gradient of ``result``, if one reaches it, by ``run``.

        ``factors`` tells products of one weight with the same settings, whose rows can be weighed at once.
        """
        left, x = self._left.setdefault(layer, []), x.detach()

        def arrived(gradient: Tensor) -> None:
            left.append(_Waiting(factors, weigh, x, gradient))

        result.register_hook(arrived)  # pyright: ignore

    def run(self, start: int | None = None, stop: int | None = None) -> None:
        """``run_together`` of this one alone."""
        run_together([self], start, stop)

    def copy(self) -> Deferred:
        """Another of the same products, which share their tensors."""
        out = Deferred()
        out._left = {layer: list(left) for layer, left in self._left.items()}
        return out

    @property
    def layers(self) -> frozenset[int]:
        """Those where something may wait."""
        return frozenset(self._left)

    def take(self, layer: int) -> list[_Waiting]:
        """What waits in a layer, which is left to the caller."""
        return self._left.pop(layer, [])


def run_together(
    waiting: Sequence[Deferred],
    start: int | None = None,
    stop: int | None = None,
    *,
    portions: Callable[[int], Sequence[int]] | None = None,
) -> None:
    """Adds the weight gradients of layers ``[start, stop)`` to ``.grad`` and frees what they come from.

    Layers go from the last to the first, as in a whole backward; without a range all of them. ``waiting`` has
    one a micro-batch, of the same stage. ``portions`` says of a layer how many of these it takes at once, one
    number after the other; each product of a portion is one over the rows of all. Without it all layers take
    them one by one.
    """
    found = sorted(frozenset[int]().union(*(later.layers for later in waiting)), reverse=True)
    with torch.no_grad():
        for layer in found:
            if (start is None or layer >= start) and (stop is None or layer < stop):
                left = iter(waiting)
                for size in portions(layer) if portions is not None else (1,) * len(waiting):
                    _weigh([later.take(layer) for later in islice(left, size)])


def _weigh(lists: list[list[_Waiting]]) -> None:
    """The products of a layer in several micro-batches, each over all their rows if they are alike in all."""
    if len({tuple(product.like for product in left) for left in lists}) > 1:
        for left in lists:
            _weigh([left])
        return
    for left in lists:
        left.reverse()
    while lists[0]:
        same = [left.pop() for left in lists]
        weigh, x, gradient = same[0].weigh, _rows([p.x for p in same]), _rows([p.gradient for p in same])
        del same  # the copies are enough
        weigh(x, gradient)


def _rows(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


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
    if not x.requires_grad or x.dim() < 2:  # a vector has no rows
        return _aten.linear.default(x, weight, bias)
    result = _aten.linear.default(x, weight.detach(), _detached(bias))

    def weigh(x: Tensor, gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1])
        _add_product(weight, rows.t(), x.reshape(-1, x.shape[-1]))
        _add_sum(bias, rows)

    later.expect(layer, result, x, ("linear", id(weight), id(bias)), weigh)
    return result


def addmm(later: Deferred, layer: int, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``aten.addmm``: (rows, n) to (rows, m) with weight (n, m)."""
    if not x.requires_grad or bias.dim() != 1:
        return _aten.addmm.default(bias, x, weight)
    result = _aten.addmm.default(bias.detach(), x, weight.detach())

    def weigh(x: Tensor, gradient: Tensor) -> None:
        _add_product(weight, x.t(), gradient)
        _add_sum(bias, gradient)

    later.expect(layer, result, x, ("addmm", id(weight), id(bias)), weigh)
    return result


def _convolution(forward: Any, dimensions: int) -> Product:
    """``aten.conv1d`` to ``conv3d``; after the bias come stride, padding, dilation and groups."""

    def every(value: int | Sequence[int]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values if len(values) == dimensions else values * dimensions

    def convolution(
        later: Deferred, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any
    ) -> Tensor:
        if not x.requires_grad or x.dim() < dimensions + 2:  # an image by itself has no rows
            return forward(x, weight, bias, *rest)
        result = forward(x, weight.detach(), _detached(bias), *rest)
        stride, padding, dilation, groups = (*rest, *(1, 0, 1, 1)[len(rest) :])
        settings = (*every(stride), *every(padding), *every(dilation), groups)

        def weigh(x: Tensor, gradient: Tensor) -> None:
            wanted = bias is not None and bias.requires_grad
            _, of_weight, of_bias = _aten.convolution_backward.default(
                gradient, x, weight, None if bias is None else list(bias.shape), every(stride),
                every(padding), every(dilation), False, [0] * dimensions, groups, [False, True, wanted],
            )  # fmt: skip
            _add(weight, of_weight)
            if wanted:
                _add(bias, of_bias)

        later.expect(layer, result, x, ("convolution", id(weight), id(bias), *settings), weigh)
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
