"""Floating-point operations of one ATen call, from shapes alone; a multiply-add counts as two.

Counted is what the mathematics needs, as in Goodfellow, Bengio and Courville, "Deep Learning", 2016, section
6.5: a product of matrices costs 2mnk forward and the same again for the gradient of each factor that
needs one. Biases are not counted, recomputation (flash attention) is not counted, anything elementwise
is one per element, a pooling window one per element of the window, views nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, cast

from spanwise.ops.flow import is_view
from spanwise.ops.resolve import OPERATORS


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor argument: its whole shape, and whether backward computes a gradient for it."""

    shape: tuple[int, ...]
    needs_gradient: bool = False


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of forward and backward. ``product``: a convolution or product of matrices."""

    forward: float
    backward: float
    product: bool = False


Counter = Callable[[tuple[Any, ...], tuple[int, ...]], Flops]


def count(op: str, args: tuple[Any, ...], result: tuple[int, ...]) -> Flops:
    """FLOPs of one call.

    Args:
        op: ``aten.conv2d.default``.
        args: positional arguments with tensors as :class:`Operand`, lists of tensors as tuples.
        result: shape of the (first) result.
    """
    if op in OPERATORS or is_view(op):
        return Flops(0.0, 0.0)
    name = op.split(".")[1].rstrip("_")
    counter = _PRODUCTS.get(name)
    if counter is not None:
        return counter(args, result)
    window = _window(name, args)
    operands = tuple(_operands(args))
    elements = prod(result) * window
    if name in _REDUCING:
        elements = max([elements, *(prod(o.shape) for o in operands)])
    forward = 0.0 if name in _MOVING else float(elements)
    gradients = sum(1 for o in operands if o.needs_gradient)
    return Flops(forward, float(elements * min(gradients, 2)))


def _operands(args: tuple[Any, ...]) -> list[Operand]:
    found: list[Operand] = []
    for arg in args:
        if isinstance(arg, Operand):
            found.append(arg)
        elif isinstance(arg, tuple):
            found.extend(_operands(cast("tuple[Any, ...]", arg)))
    return found


def _factors(forward: float, *factors: Any) -> Flops:
    """A product: each factor's gradient is one more product of the same size."""
    wanted = sum(1 for f in factors if isinstance(f, Operand) and f.needs_gradient)
    return Flops(forward, forward * wanted, product=True)


def _convolution(args: tuple[Any, ...], result: tuple[int, ...]) -> Flops:
    # The weight is (out, in / groups, *kernel): groups are in its shape.
    return _factors(2.0 * prod(result) * prod(args[1].shape[1:]), args[0], args[1])


def _general_convolution(args: tuple[Any, ...], result: tuple[int, ...]) -> Flops:
    transposed = len(args) > 6 and args[6] is True
    return (_transposed if transposed else _convolution)(args, result)


def _transposed(args: tuple[Any, ...], result: tuple[int, ...]) -> Flops:
    del result
    # The weight is (in, out / groups, *kernel): every input element meets all but its first dimension.
    return _factors(2.0 * prod(args[0].shape) * prod(args[1].shape[1:]), args[0], args[1])


def _matmul(args: tuple[Any, ...], result: tuple[int, ...]) -> Flops:
    return _factors(2.0 * prod(result) * args[0].shape[-1], args[0], args[1])


def _added_matmul(args: tuple[Any, ...], result: tuple[int, ...]) -> Flops:
    return _matmul(args[1:], result)


def _einsum(args: tuple[Any, ...], result: tuple[int, ...]) -> Flops:
    del result
    equation, operands = args[0], args[1]
    extents: dict[str, int] = {}
    broadcast = 1
    for term, operand in zip(equation.replace(" ", "").partition("->")[0].split(","), operands, strict=True):
        letters = term.replace("...", "")
        extra = len(operand.shape) - len(letters)
        at = term.find("...")
        sizes = operand.shape if at < 0 else (*operand.shape[:at], *operand.shape[at + extra :])
        if at >= 0:
            broadcast = max(broadcast, prod(operand.shape[at : at + extra]))
        for letter, size in zip(letters, sizes, strict=True):
            extents[letter] = max(size, extents.get(letter, 1))
    factor = 2.0 if len(operands) > 1 else 1.0
    return _factors(factor * broadcast * prod(extents.values()), *operands)


def _attention(args: tuple[Any, ...], result: tuple[int, ...]) -> Flops:
    """Scores and weighted values; backward needs dV and dP, dQ and dK: twice the forward products."""
    query, key, value = args[:3]
    scores = prod(query.shape[:-1]) * key.shape[-2]
    first, second = 2.0 * scores * query.shape[-1], 2.0 * scores * value.shape[-1]
    del result
    upstream = query.needs_gradient or key.needs_gradient
    backward = first * (query.needs_gradient + key.needs_gradient) + second * (
        upstream + value.needs_gradient
    )
    return Flops(first + second, backward, product=True)


def _window(name: str, args: tuple[Any, ...]) -> int:
    """Elements that one result element of a pooling reads."""
    if name not in _POOLING:
        return 1
    kernel = args[1]
    dimensions = int(name.partition("pool")[2][0])
    sizes = cast("tuple[int, ...]", kernel if isinstance(kernel, tuple) else (kernel,))
    return prod(sizes) if len(sizes) == dimensions else prod(sizes) ** dimensions


_PRODUCTS: dict[str, Counter] = {
    "conv1d": _convolution, "conv2d": _convolution, "conv3d": _convolution,
    "convolution": _general_convolution,
    "conv_transpose1d": _transposed, "conv_transpose2d": _transposed, "conv_transpose3d": _transposed,
    "linear": _matmul, "matmul": _matmul, "mm": _matmul, "bmm": _matmul, "mv": _matmul, "dot": _matmul,
    "addmm": _added_matmul, "baddbmm": _added_matmul, "addmv": _added_matmul,
    "einsum": _einsum, "scaled_dot_product_attention": _attention,
}  # fmt: skip
_POOLING = frozenset({"max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "avg_pool1d",
                      "avg_pool2d", "avg_pool3d"})  # fmt: skip
# Copies and look-ups compute nothing forward.
_MOVING = frozenset({"embedding", "clone", "cat", "stack", "copy", "index", "gather", "index_select", "pad",
                     "constant_pad_nd", "roll", "repeat", "lift_fresh_copy"})  # fmt: skip
# Results smaller than what they read.
_REDUCING = frozenset({
    "mean", "sum", "var", "std", "amax", "amin", "max", "min", "argmax", "logsumexp", "prod", "norm",
    "linalg_vector_norm", "cross_entropy_loss", "nll_loss", "nll_loss_nd", "mse_loss", "l1_loss",
    "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
})  # fmt: skip
