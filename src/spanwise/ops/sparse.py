"""Operations that keep for backward what the trained parameters need, and no more.

Stock autograd keeps the input of a frozen convolution, norm or ReLU as soon as anything before it trains:
pytorch issue 133566; Bhatia et al., "Inducing memory-efficient backward", arXiv 2404.12406, 2024. Which
channels of a weight train follows DSparse (Peng, Sun, Zhang, Wang, JCST 40(3), 2025, abstract): the gradient
of a weight's input channel c needs channel c of the input only.

Norms and activations overwrite what nobody else needs, in forward and in backward. Where these run, freed
memory goes back to the system at once (``ops.allocator``): a tensor less is so many pages less to fault in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spanwise.ops.arguments import Ref
from spanwise.ops.opgraph import Op
from spanwise.ops.pointwise import pointwise, pointwise_input, pointwise_weight

_aten = torch.ops.aten
_CONVOLUTIONS = {
    "aten.conv1d.default": (_aten.conv1d.default, 1),
    "aten.conv2d.default": (_aten.conv2d.default, 2),
    "aten.conv3d.default": (_aten.conv3d.default, 3),
}
_CLAMPS = frozenset({"aten.relu.default", "aten.relu6.default", "aten.hardtanh.default"})
_NORM = "aten.batch_norm.default"
_COUNTER = "num_batches_tracked"
_MAKE_ANEW = frozenset({*_CONVOLUTIONS, _NORM})  # results and gradients of inputs, and keep none of these


@dataclass(frozen=True)
class Place:
    """What the operations around one let it overwrite.

    ``own_input``: nobody else reads its input, and nothing of it is kept by who made it. ``own_gradient``:
    the gradient of its result comes from one operation, which makes it anew and keeps nothing of it.
    """

    own_input: bool = False
    own_gradient: bool = False


class Places:
    """The places of all operations of a stage."""

    def __init__(self, nodes: Sequence[Op], results: Sequence[Ref]) -> None:
        self._made = {Ref("node", node.name): node for node in nodes}
        self._readers: dict[Ref, list[Op | None]] = {}
        for node in nodes:
            for ref in node.references():
                self._readers.setdefault(ref, []).append(node)
        for ref in results:
            self._readers.setdefault(ref, []).append(None)

    def of(self, node: Op) -> Place:
        """By who made its first argument and who reads its result: products, norms and activations do."""
        made = self._made.get(node.args[0]) if node.args and isinstance(node.args[0], Ref) else None
        own_input = made is not None and self._reader(made) is node and made.op in _MAKE_ANEW
        reader = self._reader(node)
        return Place(own_input, reader is not None and reader.op in _MAKE_ANEW | _CLAMPS)

    def _reader(self, node: Op) -> Op | None:
        """The only one that reads its result, as its first argument; None if there is none or more."""
        result = Ref("node", node.name)
        found = self._readers.get(result, [])
        only = found[0] if len(found) == 1 else None
        return only if only is not None and only.args[:1] == (result,) else None


@dataclass(frozen=True, eq=False)
class Slice:
    """The trained channels of a weight: a leaf of their own, and which they are.

    ``values``: the weight's channels ``index`` (int64), in this order, along their dimension.
    """

    values: nn.Parameter
    index: Tensor


@dataclass(frozen=True, eq=False)
class Sparse:
    """How a stage runs that trains some of its parameters only.

    Attributes:
        slices: the weights of which some channels train, by name; they themselves want no gradient.
        stored_statistics: whether BatchNorm uses its running statistics and leaves them as they are.
        packed_masks: whether a ReLU keeps a bit per element, which takes longer, in place of a byte.
    """

    slices: Mapping[str, Slice] = field(default_factory=dict[str, Slice])
    stored_statistics: bool = False
    packed_masks: bool = False

    def function(self, node: Op, place: Place) -> Callable[..., Any] | None:
        """What runs in place of an operation, with the same arguments; None if it stays as it is."""
        if node.op in _CONVOLUTIONS:
            forward, dimensions = _CONVOLUTIONS[node.op]
            return _convolution(forward, dimensions, self._slice(node))
        if node.op == "aten.linear.default":  # stock ones keep their input only if their weight trains
            chosen = self._slice(node)
            return None if chosen is None else _linear(chosen)
        if node.op == _NORM and (self.stored_statistics or node.args[5] is False):
            return _fixed_norm(place)
        if node.op in _CLAMPS:
            return _clamp(node, place, self.packed_masks)
        if self.stored_statistics and node.op == "aten.add_.Tensor" and _counts(node):
            return _unchanged
        return None

    def _slice(self, node: Op) -> Slice | None:
        weight = node.args[1]
        return self.slices.get(weight.name) if isinstance(weight, Ref) else None


def _counts(node: Op) -> bool:
    counter = node.args[0]
    return isinstance(counter, Ref) and counter.kind == "buffer" and counter.name.endswith(_COUNTER)


def _unchanged(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


class _Convolution(torch.autograd.Function):
    """Keeps the weight if its input wants a gradient, and of the input the channels that train."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor | None, how: _Geometry
    ) -> Tensor:
        of_x, of_weight, of_chosen = (ctx.needs_input_grad[i] for i in (0, 1, 3))
        kept = None
        if of_chosen:
            assert how.index is not None
            kept = x.index_select(1, how.index)  # a copy: a view would keep all channels
        elif of_weight:
            kept = x
        ctx.save_for_backward(weight if of_x else None, kept)
        ctx.how, ctx.x_shape, ctx.weight_shape = how, x.shape, weight.shape
        if how.is_product(x, weight):
            return pointwise(x, weight, bias)
        return how.forward(x, weight, bias, how.stride, how.padding, how.dilation, how.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        of_x, of_weight, of_bias, of_chosen = ctx.needs_input_grad[:4]
        weight, kept = ctx.saved_tensors
        how: _Geometry = ctx.how
        for_x = for_weight = for_chosen = None
        if of_x and of_weight:
            for_x, for_weight = how.backward(gradient, kept, weight, how.groups, (True, True))
        elif of_x:
            for_x, _ = how.backward(
                gradient, _blank(gradient, ctx.x_shape), weight, how.groups, (True, False)
            )
        elif of_weight:
            blank = _blank(gradient, ctx.weight_shape)
            _, for_weight = how.backward(gradient, kept, blank, how.groups, (False, True))
        if of_chosen:
            assert how.index is not None
            count = len(how.index)
            if how.groups > 1:  # depthwise: filter c makes channel c of the result
                own, shape, groups = (
                    gradient.index_select(1, how.index),
                    (count, *ctx.weight_shape[1:]),
                    count,
                )
            else:
                own, shape, groups = gradient, (ctx.weight_shape[0], count, *ctx.weight_shape[2:]), 1
            _, for_chosen = how.backward(own, kept, _blank(gradient, shape), groups, (False, True))
        for_bias = _channel_sum(gradient) if of_bias else None
        return for_x, for_weight, for_bias, for_chosen, None


@dataclass(frozen=True, eq=False)
class _Geometry:
    """Numbers of a convolution, and which input channels train."""

    forward: Callable[..., Tensor]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    index: Tensor | None

    def is_product(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it is a matrix product by position, and better computed as one.

        On a CPU oneDNN copies what enters and leaves a convolution into layouts of its own. Of 32 rows of
        MobileNetV2 such products took a third of the time, and a quarter of the new pages, that it took.
        """
        ones = math.prod(weight.shape[2:]) == 1 and set(self.stride) == {1} and set(self.padding) == {0}
        return ones and self.groups == 1 and x.device.type == "cpu"

    def backward(
        self, gradient: Tensor, x: Tensor, weight: Tensor, groups: int, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of input and weight; of what is not wanted only the shape counts."""
        if self.is_product(gradient, weight):
            return (
                pointwise_input(gradient, weight) if wanted[0] else None,
                pointwise_weight(gradient, x, weight.shape) if wanted[1] else None,
            )
        found = _aten.convolution_backward.default(
            gradient, x, weight, None, self.stride, self.padding, self.dilation, False,
            [0] * len(self.stride), groups, [*wanted, False],
        )  # fmt: skip
        return found[0], found[1]


def _convolution(
    forward: Callable[..., Tensor], dimensions: int, chosen: Slice | None
) -> Callable[..., Tensor]:
    def every(value: int | Sequence[int]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values if len(values) == dimensions else values * dimensions

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        index = None if chosen is None else chosen.index
        how = _Geometry(forward, every(stride), every(padding), every(dilation), groups, index)
        values = None if chosen is None else chosen.values
        return _Convolution.apply(x, weight, bias, values, how)  # pyright: ignore

    return run


class _Linear(torch.autograd.Function):
    """Of a weight (m, n) some of the n input features train; keeps these of the input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor, index: Tensor) -> Tensor:
        of_x, of_values = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        ctx.save_for_backward(weight if of_x else None, x.index_select(-1, index) if of_values else None)
        return _aten.linear.default(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        of_x, _, of_bias, of_values = ctx.needs_input_grad[:4]
        weight, kept = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_x = gradient @ weight if of_x else None
        for_values = rows.t() @ kept.reshape(-1, kept.shape[-1]) if of_values else None
        return for_x, None, rows.sum(0) if of_bias else None, for_values, None


def _linear(chosen: Slice) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Linear.apply(x, weight, bias, chosen.values, chosen.index)  # pyright: ignore

    return run


class _FixedNorm(torch.autograd.Function):
    """BatchNorm by stored statistics: keeps a number per channel, and the input only if its scale trains."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float,
        place: Place,
    ) -> Tensor:  # fmt: skip
        of_x, of_gamma, _ = ctx.needs_input_grad[:3]
        inverse = (var + eps).rsqrt() if of_x or of_gamma else None
        scale = None
        if of_x and inverse is not None:
            scale = inverse if gamma is None else gamma * inverse
        own = (x, mean, inverse) if of_gamma else (None, None, None)
        ctx.save_for_backward(scale, *own)
        ctx.place = place
        if of_gamma or not place.own_input or x.device.type != "cpu":
            return _aten.batch_norm.default(x, gamma, beta, mean, var, False, 0.0, eps, False)
        ctx.mark_dirty(x)
        none = x.new_empty(0)  # of statistics of the batch, which are not asked for
        _aten.native_batch_norm.out(
            x, gamma, beta, mean, var, False, 0.0, eps, out=x, save_mean=none, save_invstd=none
        )
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        of_x, of_gamma, of_beta = ctx.needs_input_grad[:3]
        scale, x, mean, inverse = ctx.saved_tensors
        for_x = for_gamma = None
        for_beta = _channel_sum(gradient) if of_beta else None
        if of_gamma:
            centred = x - _by_channel(mean, x)
            for_gamma = _channel_sum(centred.mul_(gradient)) * inverse
        if of_x:  # last, as it may overwrite
            multiply = gradient.mul_ if ctx.place.own_gradient else gradient.mul
            for_x = multiply(_by_channel(scale, gradient))
        return for_x, for_gamma, for_beta, None, None, None, None


def _fixed_norm(place: Place) -> Callable[..., Tensor]:
    def run(
        x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, _: bool,
        momentum: float, eps: float, *__: Any,
    ) -> Tensor:  # fmt: skip
        del momentum
        return _FixedNorm.apply(x, gamma, beta, mean, var, eps, place)  # pyright: ignore

    return run


class _Clamp(torch.autograd.Function):
    """ReLU and its kin: keeps where the gradient does not pass, a byte or a bit per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float | None, packed: bool, place: Place) -> Tensor:
        if ctx.needs_input_grad[0]:
            stopped = x <= low
            if high is not None:
                stopped |= x >= high
            ctx.save_for_backward(_packed(stopped) if packed else stopped)
            ctx.shape = x.shape if packed else None
            ctx.place = place
        if not place.own_input:
            return x.clamp(low, high)
        ctx.mark_dirty(x)
        return x.clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        (stopped,) = ctx.saved_tensors
        if ctx.shape is not None:
            stopped = _unpacked(stopped, gradient.numel()).view(ctx.shape)
        # A product with bools would make a tensor of numbers of them.
        fill = gradient.masked_fill_ if ctx.place.own_gradient else gradient.masked_fill
        return fill(stopped, 0.0), None, None, None, None


def _clamp(node: Op, place: Place, packed: bool) -> Callable[..., Tensor]:
    bounds: dict[str, tuple[float, float | None]] = {
        "aten.relu.default": (0.0, None),
        "aten.relu6.default": (0.0, 6.0),
        "aten.hardtanh.default": (-1.0, 1.0),
    }
    least, most = bounds[node.op]

    def run(x: Tensor, low: float = least, high: float | None = most) -> Tensor:
        return _Clamp.apply(x, low, high, packed, place)  # pyright: ignore

    return run


def _packed(mask: Tensor) -> Tensor:
    """Eight elements in a byte, the first in the lowest bit."""
    flat = mask.reshape(-1)
    short = -flat.numel() % 8
    if short:
        flat = torch.cat([flat, flat.new_zeros(short)])
    eights = flat.view(-1, 8)
    out = torch.zeros(len(eights), dtype=torch.uint8, device=mask.device)
    for bit in range(8):
        out |= eights[:, bit].to(torch.uint8) << bit
    return out


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` elements of :func:`_packed` as bools."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> bits) & 1).reshape(-1)[:count].bool()


def _blank(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of that shape that takes the memory of one value, where values do not matter."""
    return like.new_empty(1).expand(tuple(shape))


def _by_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _channel_sum(gradient: Tensor) -> Tensor:
    return gradient.sum([0, *range(2, gradient.dim())])
