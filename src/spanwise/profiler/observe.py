"""One real pass over the traced operations: shapes, what needs a gradient, and what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spanwise.ops.arguments import Argument, Ref, TorchName
from spanwise.ops.opgraph import OpGraph
from spanwise.ops.resolve import resolve, torch_value, unpack_constant
from spanwise.profiler.export import Sample


@dataclass(frozen=True, slots=True)
class Seen:
    """A value of the pass. ``dtype`` is empty for what is no tensor (a tuple of tensors, a size)."""

    shape: tuple[int, ...] = ()
    dtype: str = ""
    item_bytes: int = 0
    needs_gradient: bool = False

    @property
    def is_tensor(self) -> bool:
        """Whether the value is one tensor."""
        return bool(self.dtype)


@dataclass
class Observation:
    """What one pass showed.

    ``values`` holds every input, label, parameter, buffer, constant and node. ``saved`` has each storage kept
    for backward (parameters and buffers aside): its bytes, and the positions of the nodes that keep it.
    """

    rows: int
    values: dict[Ref, Seen] = field(default_factory=dict[Ref, Seen])
    saved: list[tuple[int, tuple[int, ...]]] = field(default_factory=list[tuple[int, tuple[int, ...]]])


def observe(
    ops: OpGraph, parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor], sample: Sample
) -> Observation:
    """Runs the operations one by one forward on ``sample``; leaves the model untouched."""
    run = _Run(ops, parameters, buffers, sample)
    for position in range(len(ops.nodes)):
        run.step(position)
    return run.finish()


class _Run:
    def __init__(
        self,
        ops: OpGraph,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        sample: Sample,
    ) -> None:
        self.ops = ops
        self.device = sample.inputs[0].device
        self.env: dict[Ref, Any] = {Ref("batch", ""): sample.rows}
        for slot in ops.parameters:
            self.env[Ref("parameter", slot.name)] = parameters[slot.name]
        for slot in ops.buffers:
            self.env[Ref("buffer", slot.name)] = buffers[slot.name].detach().clone()
        for constant in ops.constants:
            self.env[Ref("constant", constant.name)] = unpack_constant(constant, self.device)
        self.held = {_storage(value) for value in self.env.values() if isinstance(value, Tensor)}
        for kind, slots, tensors in (
            ("input", ops.inputs, sample.inputs),
            ("label", ops.labels, sample.labels),
        ):
            for slot, tensor in zip(slots, tensors, strict=True):
                self.env[Ref(kind, slot.name)] = tensor
        self.seen = Observation(sample.rows, {ref: _seen(value) for ref, value in self.env.items()})
        # Saved tensors stay alive until the end, so that no storage address is given out twice.
        self.kept: list[Tensor] = []
        self.bytes: dict[int, int] = {}
        self.users: dict[int, set[int]] = {}

    def step(self, position: int) -> None:
        node = self.ops.nodes[position]
        free = self.ops.flow.free[position]

        def pack(tensor: Tensor) -> Tensor:
            address = _storage(tensor)
            if address not in self.held and tensor.layout is torch.strided:
                self.kept.append(tensor.detach())
                self.bytes[address] = tensor.untyped_storage().nbytes()
                self.users.setdefault(address, set()).add(position)
            return tensor

        hooks = nullcontext() if free else torch.autograd.graph.saved_tensors_hooks(pack, _same)
        function: Callable[..., Any] = resolve(node.op)
        with hooks:
            value = function(*map(self.value, node.args), **{k: self.value(v) for k, v in node.kwargs})
        self.env[Ref("node", node.name)] = value

    def value(self, argument: Argument) -> Any:
        if isinstance(argument, Ref):
            return self.env[argument]
        if isinstance(argument, TorchName):
            return torch_value(argument, self.device)
        if isinstance(argument, tuple):
            return [self.value(item) for item in argument]
        return argument

    def finish(self) -> Observation:
        # Only now: a value that was overwritten may need a gradient since then.
        for node in self.ops.nodes:
            ref = Ref("node", node.name)
            self.seen.values[ref] = _seen(self.env[ref])
        self.seen.saved = [(self.bytes[a], tuple(sorted(self.users[a]))) for a in self.bytes]
        return self.seen


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _seen(value: Any) -> Seen:
    if not isinstance(value, Tensor):
        return Seen()
    differentiable = value.requires_grad and (value.is_floating_point() or value.is_complex())
    return Seen(
        tuple(value.shape), str(value.dtype).removeprefix("torch."), value.element_size(), differentiable
    )
