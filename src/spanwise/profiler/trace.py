"""From a module and its loss to a ModelGraph and the operations that its stages run."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from spanwise.core.model import ModelGraph, TensorSpec
from spanwise.ops.opgraph import OpGraph, Slot
from spanwise.ops.resolve import dtype_of
from spanwise.profiler.cut import clean_cuts
from spanwise.profiler.export import (
    LossFunction,
    ModelWithLoss,
    Sample,
    check_sample,
    export,
    fixed_seed,
    silence,
)
from spanwise.profiler.layers import Chain, build_layers, choose_cuts
from spanwise.profiler.normalize import normalize
from spanwise.profiler.observe import Observation, observe
from spanwise.profiler.traced import Traced
from spanwise.profiler.verify import check_gradients, check_mean

__all__ = ["Traced", "trace"]

FEW_ROWS, MORE_ROWS = 3, 5


def trace(
    model: nn.Module,
    loss: LossFunction,
    inputs: tuple[Tensor, ...],
    labels: tuple[Tensor, ...],
    *,
    name: str,
) -> Traced:
    """Traces a model with its loss in training mode and cuts it into a chain of layers.

    Args:
        model: called as ``model(*inputs)``; its weights, buffers and modes are left as they were.
        loss: called as ``loss(outputs, label)``, with the tuple of labels unless there is exactly one; the
            mean over rows.
        inputs: a few sample rows, on one device with the model; the first dimension of each tensor is the
            rows.
        labels: of the same rows.
        name: for messages and files.

    Raises:
        ExportError: the model cannot be traced, or its loss is no mean over rows; says what to change.
    """
    sample = Sample(inputs, labels)
    check_sample(name, sample)
    wrapper = ModelWithLoss(model, loss, len(inputs))
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        return _trace(wrapper, sample, name)
    finally:
        for module, training in modes.items():
            module.training = training


def _trace(wrapper: ModelWithLoss, sample: Sample, name: str) -> Traced:
    check_mean(wrapper, sample.resized(MORE_ROWS), name)
    program = export(wrapper, sample, name)
    found = normalize(program, wrapper, sample, name)
    with silence(), fixed_seed():
        few, more = (
            observe(found.ops, found.parameters, found.buffers, sample.resized(rows))
            for rows in (FEW_ROWS, MORE_ROWS)
        )
    found = replace(found, ops=_without_hindering_outputs(found.ops, few, more))
    chain = Chain(found.ops, found.paths, few, more)
    cuts = choose_cuts(chain, clean_cuts(found.ops, few, more))
    graph = ModelGraph(
        name=name,
        source_digest=found.ops.digest,
        layers=build_layers(chain, cuts),
        inputs=tuple(_spec(slot) for slot in found.ops.inputs),
        labels=tuple(_spec(slot) for slot in found.ops.labels),
    )
    traced = Traced(graph, found.ops, found.parameters, found.buffers)
    return check_gradients(traced, wrapper, sample.resized(MORE_ROWS), name)


def _without_hindering_outputs(ops: OpGraph, few: Observation, more: Observation) -> OpGraph:
    """Keeps only the first output if the others (caches, hidden states) forbid cuts by living to the end."""
    only = replace(ops, outputs=ops.outputs[:1])
    if len(clean_cuts(only, few, more)) > len(clean_cuts(ops, few, more)):
        return only
    return ops


def _spec(slot: Slot) -> TensorSpec:
    return TensorSpec(
        name=slot.name,
        shape=slot.shape,
        dtype=slot.dtype,
        item_bytes=dtype_of(slot.dtype).itemsize,
        differentiable=False,
    )
