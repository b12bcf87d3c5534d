"""Activations and gradients as they travel over a link of reduced precision.

Every row is divided by its largest absolute value, which travels beside it in float32, so that small
gradients do not vanish. What comes out differs from what went in, for a row whose largest value is ``m``, by
at most

    half   max(|x| / 2048, m / 2**24)    float16 keeps 11 bits; below m / 2**14 its steps are even
    int8   m / 253                       127 even steps each way, rounded to the nearest, and float32's own

Only links that are named so in the cluster file do this; a plan that has one is not exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spanwise.core.precision import Precision, reduces
from spanwise.runtime.transport import Pending

Tensors = tuple[Tensor, ...]

_TYPES = {"half": torch.float16, "int8": torch.int8}
_STEPS = 127


def empty_packed(like: Tensors, precision: Precision) -> Tensors:
    """Buffers for what ``pack`` makes of tensors like these: for each its scales and values, or itself."""
    out: list[Tensor] = []
    for tensor in like:
        if _reduced(tensor, precision):
            out.append(torch.empty(tensor.shape[0], dtype=torch.float32, device=tensor.device))
            out.append(torch.empty(tensor.shape, dtype=_TYPES[precision], device=tensor.device))
        else:
            out.append(tensor)
    return tuple(out)


def pack(tensors: Tensors, precision: Precision) -> Tensors:
    """What travels: per tensor ``[rows]`` scales and its values, or the tensor where it does not shrink.

    A row with a value that is not finite arrives as NaN throughout: the loss shows it.
    """
    out: list[Tensor] = []
    for tensor in tensors:
        if not _reduced(tensor, precision):
            out.append(tensor)
            continue
        scale = tensor.detach().flatten(1).abs().amax(1).to(torch.float32)
        unit = tensor / _beside(torch.where(scale > 0, scale, 1.0), tensor)
        if precision == "int8":
            unit = (unit * _STEPS).round_()
            scale = torch.where(scale.isfinite(), scale, float("nan"))
        out += [scale, unit.to(_TYPES[precision])]
    return tuple(out)


def unpack(packed: Tensors, into: Tensors, precision: Precision) -> None:
    """Writes what arrived where it belongs; tensors that did not shrink are there already."""
    parts = iter(packed)
    for tensor in into:
        first = next(parts)
        if not _reduced(tensor, precision):
            continue
        values = next(parts).to(tensor.dtype)
        steps = _STEPS if precision == "int8" else 1
        torch.mul(values, _beside(first / steps, tensor), out=tensor)


@dataclass(frozen=True, slots=True)
class Unpacking:
    """A transfer under way whose values are unpacked when they have come."""

    pending: Pending
    packed: Tensors
    into: Tensors
    precision: Precision

    def wait(self, timeout_s: float) -> None:
        """As the transfer's own, then writes the values where they belong."""
        self.pending.wait(timeout_s)
        unpack(self.packed, self.into, self.precision)


def _reduced(tensor: Tensor, precision: Precision) -> bool:
    return reduces(str(tensor.dtype).removeprefix("torch."), tensor.element_size(), precision)


def _beside(scale: Tensor, tensor: Tensor) -> Tensor:
    """``[rows]`` so that it multiplies a tensor of any shape row by row."""
    return scale.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))
