"""Proofs by number: the loss is a mean over rows, and the chain of layers computes what the model does."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spanwise.core.errors import ExportError
from spanwise.core.model import Layer
from spanwise.ops.flow import is_random
from spanwise.ops.stage_module import StageModule
from spanwise.profiler.export import ModelWithLoss, Sample, failure, fixed_seed, loss_target, silence
from spanwise.profiler.traced import Traced, layer_stages, received

# Same kernels in the same order: what differs is rounding, and a wrong formula differs by far more.
RELATIVE_TOLERANCE = 1e-3
# Means over the same few rows, added in another order.
MEAN_TOLERANCE = 1e-5


def check_mean(wrapper: ModelWithLoss, sample: Sample, name: str) -> None:
    """Refuses a loss that is not the mean over rows: gradients are summed over rows, then divided.

    The loss of fixed outputs is compared with the weighted mean over two parts of the rows, so that layers
    that mix rows do not disturb.
    """
    first = max(1, sample.rows // 2)
    with _reproducible(wrapper.model), torch.no_grad(), silence():
        try:
            whole, parts = _losses(wrapper, sample, first)
        except Exception as error:  # whatever the user's forward or loss raises
            raise ExportError(failure(error, name, "fails on the sample")) from None
    shape = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__  # pyright: ignore
    if shape != ():
        raise ExportError(
            f"model '{name}': the loss must be one number, the mean over rows, but gives {shape}; "
            "use reduction='mean'"
        )
    mean = (float(parts[0]) * first + float(parts[1]) * (sample.rows - first)) / sample.rows
    if not _close(torch.tensor(mean), whole, MEAN_TOLERANCE):
        raise ExportError(
            f"model '{name}': the loss must be the mean over rows, but {sample.rows} rows give "
            f"{float(whole):.6g} and parts of {first} and {sample.rows - first} rows average to {mean:.6g}; "
            "use reduction='mean' without class weights or ignored labels"
        )


def _losses(wrapper: ModelWithLoss, sample: Sample, first: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The loss of all rows and of the two parts, of the same outputs."""
    outputs = wrapper.model(*sample.inputs)

    def part(rows: Tensor) -> Tensor:
        target = loss_target(_rows(sample.labels, rows, sample.rows))
        return wrapper.loss(_rows(outputs, rows, sample.rows), target)

    everything = torch.arange(sample.rows)
    return part(everything), (part(everything[:first]), part(everything[first:]))


def check_gradients(traced: Traced, wrapper: ModelWithLoss, sample: Sample, name: str) -> Traced:
    """Runs the layers one by one, compares with the model itself, and marks where no gradient comes back and
    which layers mix rows.

    Raises:
        ExportError: loss, gradients or buffers differ, as with an autograd function of one's own, whose
            backward formula the export loses.
    """
    with silence(), _reproducible(wrapper.model):
        loss, gradients, buffers = _eager(traced, wrapper, sample)
    with silence(), fixed_seed():
        chain = _Chain(traced, sample)
        chain.run()
    _compare("the loss", loss, chain.loss, name)
    for key, value in gradients.items():
        _compare(f"the gradient of '{key}'", value, chain.gradients.get(key), name)
    for key, value in buffers.items():
        _compare(f"buffer '{key}'", value, chain.buffers[key], name)
    layers = tuple(
        _with_facts(layer, flowing, mixing)
        for layer, flowing, mixing in zip(traced.graph.layers, chain.flowing, chain.mixing, strict=True)
    )
    if layers == traced.graph.layers:
        return traced
    return replace(traced, graph=traced.graph.model_copy(update={"layers": layers}))


def _eager(
    traced: Traced, wrapper: ModelWithLoss, sample: Sample
) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
    fresh = sample.resized(sample.rows)
    loss = wrapper(*fresh.inputs, *fresh.labels)[0]
    gradients: dict[str, Tensor | None] = {}
    if traced.parameters and loss.requires_grad:
        found = torch.autograd.grad(loss, list(traced.parameters.values()), allow_unused=True)
        gradients = dict(zip(traced.parameters, found, strict=True))
    return loss.detach(), gradients, {key: value.detach().clone() for key, value in traced.buffers.items()}


class _Chain:
    """Every layer as its own stage, forward and backward, gradients kept apart from the model's."""

    def __init__(self, traced: Traced, sample: Sample) -> None:
        self.graph, self.sample = traced.graph, sample.resized(sample.rows)
        self.buffers = {key: value.detach().clone() for key, value in traced.buffers.items()}
        device = str(sample.inputs[0].device)
        self.stages = layer_stages(traced, traced.parameters, self.buffers, device)
        self.loss = torch.zeros(())
        self.gradients: dict[str, Tensor] = {}
        self.flowing: list[tuple[bool, ...]] = [()] * len(traced.graph)
        self.mixing: list[bool] = []
        self.random = tuple(is_random(node.op) for node in traced.ops.nodes)

    def run(self) -> None:
        values: tuple[Tensor, ...] = self.sample.inputs
        passes: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
        for index, stage in enumerate(self.stages):
            if index:
                values = received(values, self.graph.cut_before(index))
            mixing = self.graph.layers[index].batch_statistics or self._mixes_rows(index, values)
            self.mixing.append(mixing)
            outputs = stage(values, self.sample.labels)
            passes.append((values, outputs))
            values = outputs
        self.loss = values[0].detach()
        gradients: tuple[Tensor | None, ...] = (torch.ones_like(self.loss), *[None] * (len(values) - 1))
        for index in reversed(range(len(self.stages))):
            inputs, outputs = passes.pop()
            gradients = self._backward(self.stages[index], inputs, outputs, gradients)
            if index:
                self.flowing[index - 1] = tuple(gradient is not None for gradient in gradients)

    def _mixes_rows(self, index: int, values: tuple[Tensor, ...]) -> bool:
        """Whether a layer gives a row another result in other company; unknown, so no, if it is random."""
        start, stop = self.graph.layers[index].ops
        rows = self.sample.rows
        if any(self.random[start:stop]) or self.sample.rows < 2:
            return False
        stage, some = self.stages[index], torch.arange(rows // 2)
        before = {key: value.clone() for key, value in self.buffers.items() if key in stage.buffer_names}
        results: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for part in (torch.arange(rows), some):
                results.append(stage(_rows(values, part, rows), _rows(self.sample.labels, part, rows)))
                for key, value in before.items():
                    self.buffers[key].copy_(value)
        skipped = 1 if index == len(self.stages) - 1 else 0  # the loss is a mean, which has its own check
        pairs = zip(_rows(results[0], some, rows)[skipped:], results[1][skipped:], strict=True)
        return any(a.shape != b.shape or not _close(a, b) for a, b in pairs)

    def _backward(
        self,
        stage: StageModule,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        gradients: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...]:
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        leaves = [value for value in inputs if value.requires_grad]
        parameters: Mapping[str, nn.Parameter] = dict(stage.named_parameters())
        wanted = [*leaves, *parameters.values()]
        if not pairs or not wanted:
            return (None,) * len(inputs)
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        for key, gradient in zip(parameters, found[len(leaves) :], strict=True):
            if gradient is not None:  # pyright: ignore[reportUnnecessaryComparison]
                before = self.gradients.get(key)
                self.gradients[key] = gradient if before is None else before + gradient
        back = iter(found[: len(leaves)])
        return tuple(next(back) if value.requires_grad else None for value in inputs)


def _with_facts(layer: Layer, flowing: tuple[bool, ...], mixing: bool) -> Layer:
    outputs = tuple(
        spec.model_copy(update={"differentiable": spec.differentiable and flows})
        for spec, flows in zip(layer.outputs, flowing, strict=True)
    )
    return layer.model_copy(update={"outputs": outputs, "batch_statistics": mixing})


@contextmanager
def _reproducible(model: nn.Module) -> Generator[None]:
    """A fixed seed, and afterwards the random state and the buffers as they were."""
    before = {key: value.detach().clone() for key, value in model.named_buffers()}
    try:
        with fixed_seed():
            yield
    finally:
        with torch.no_grad():
            for key, value in model.named_buffers():
                value.copy_(before[key])


def _rows(tree: Any, rows: Tensor, total: int) -> Any:
    """The same structure with some rows of every tensor that has all of them."""

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == total:
            return leaf[rows.to(leaf.device)]
        return leaf

    return pytree.tree_map(pick, tree)


def _compare(what: str, model: Tensor | None, chain: Tensor | None, name: str) -> None:
    if model is None and chain is None:
        return
    zero = torch.zeros_like(cast("Tensor", chain if model is None else model))
    a, b = zero if model is None else model, zero if chain is None else chain
    if not _close(b, a):
        difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        raise ExportError(
            f"model '{name}': {what} of the traced operations differs from the model's by {difference:.3g}; "
            "hidden randomness, hidden state or an autograd function of its own cannot be traced, "
            "write it with torch operations"
        )


def _close(a: Tensor, b: Tensor, tolerance: float = RELATIVE_TOLERANCE) -> bool:
    for value in (a, b):
        if value.is_floating_point():
            tolerance = max(tolerance, 8 * torch.finfo(value.dtype).eps)
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    finite = b[b.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale + 1e-7, equal_nan=True)
