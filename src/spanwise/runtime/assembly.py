"""Rows on their way into a stage: parts from several peers become one tensor without extra copies."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spanwise.core.model import TensorSpec

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Assembly:
    """Buffers for rows ``[first, last)`` of a micro-batch; parts are received straight into their slices."""

    specs: tuple[TensorSpec, ...]
    rows: tuple[int, int]
    device: str
    buffers: list[Tensor] = field(default_factory=list[Tensor])

    def part(self, rows: tuple[int, int]) -> Tensors:
        """Views of the rows that one peer sends."""
        if not self.buffers:
            count = self.rows[1] - self.rows[0]
            for spec in self.specs:
                dtype = getattr(torch, spec.dtype)
                self.buffers.append(torch.empty((count, *spec.shape), dtype=dtype, device=self.device))
        a, b = rows[0] - self.rows[0], rows[1] - self.rows[0]
        return tuple(buffer[a:b] for buffer in self.buffers)

    def put(self, rows: tuple[int, int], tensors: Tensors) -> None:
        """Rows that are on this device already: taken as they are if they are all, else copied in."""
        if rows == self.rows and not self.buffers:
            self.buffers.extend(tensors)
            return
        for view, tensor in zip(self.part(rows), tensors, strict=True):
            view.copy_(tensor)

    def whole(self) -> Tensors:
        """The assembled tensors."""
        return tuple(self.buffers)


def meet(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int] | None:
    """Rows that two half-open ranges have in common."""
    first, last = max(a[0], b[0]), min(a[1], b[1])
    return (first, last) if first < last else None


def cut(tensors: Tensors, base: int, rows: tuple[int, int]) -> Tensors:
    """Views of ``rows`` of tensors whose first row has number ``base``."""
    return tuple(tensor[rows[0] - base : rows[1] - base] for tensor in tensors)
