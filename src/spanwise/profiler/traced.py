"""What tracing gives, and its layers one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from spanwise.core.model import ModelGraph, TensorSpec
from spanwise.ops.opgraph import OpGraph
from spanwise.ops.stage_module import StageModule


@dataclass(frozen=True)
class Traced:
    """A traced model.

    ``parameters`` and ``buffers`` are the model's own tensors that the operations use, under the model's own
    ``state_dict`` names (the first of several for tied ones). Frozen parameters are among the buffers.
    """

    graph: ModelGraph
    ops: OpGraph
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]


def layer_stages(
    traced: Traced, parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor], device: str
) -> tuple[StageModule, ...]:
    """Every layer as a stage of its own."""
    return tuple(
        StageModule(traced.ops, traced.graph, i, i + 1, parameters=parameters, buffers=buffers, device=device)
        for i in range(len(traced.graph))
    )


def received(values: Sequence[Tensor], specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """Tensors as they arrive behind a cut: cut off from what made them, ready for their own gradient."""
    return tuple(
        value.detach().requires_grad_(spec.differentiable) for value, spec in zip(values, specs, strict=True)
    )
