"""Which parameters are worth training: scores from a few probe batches, weights left as they were.

``first_order`` follows ElasticTrainer (Huang, Yang, Gao, MobiSys 2023, from secondary sources): with all
parameters trained for one step of the optimizer, dw is what it changed and g' the gradient after it; the
gain of any part of the parameters is -sum(g' dw) over it, so that channels have scores as well.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spanwise.core.importance import Importance, Method, ParameterScore
from spanwise.core.model import ModelGraph
from spanwise.ops.sparse import Sparse
from spanwise.ops.stage_module import StageModule
from spanwise.profiler.traced import Traced

Batch = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # inputs and labels of some rows
MakeOptimizer = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]


def importance(
    traced: Traced, batches: Sequence[Batch], make_optimizer: MakeOptimizer, *, stored_statistics: bool = True
) -> Importance:
    """First-order scores, the mean over probe batches.

    Args:
        traced: the model as it is before training; unchanged afterwards.
        batches: rows like those to be trained on, all batches of one size.
        make_optimizer: makes the optimizer of the run over named parameters.
        stored_statistics: whether BatchNorm uses stored statistics, as the run will.
    """
    totals = {name: torch.zeros_like(p) for name, p in traced.parameters.items()}
    for batch in batches:
        with _whole(traced, stored_statistics) as stage:
            before = {name: p.detach().clone() for name, p in traced.parameters.items()}
            _step(stage, batch, make_optimizer(traced.parameters))
            change = {name: p.detach() - before[name] for name, p in traced.parameters.items()}
            _loss(stage, batch).backward()  # pyright: ignore[reportUnknownMemberType]
            for name, parameter in traced.parameters.items():
                if parameter.grad is not None:
                    totals[name] -= parameter.grad * change[name] / len(batches)
    return _scored(traced.graph, totals, "first_order", stored_statistics)


def magnitude(traced: Traced, *, stored_statistics: bool = True) -> Importance:
    """Scores by the sum of squares of the weights: what is large counts. Needs no data."""
    squares = {name: p.detach() ** 2 for name, p in traced.parameters.items()}
    return _scored(traced.graph, squares, "magnitude", stored_statistics)


def contribution(
    traced: Traced, batches: Sequence[Batch], make_optimizer: MakeOptimizer, *,
    stored_statistics: bool = True, steps: int = 8,
) -> Importance:  # fmt: skip
    """Scores by training each parameter alone for some steps over the batches: slow, and by no formula.

    The gain is how much the mean loss over all batches falls; channels share it by their first-order scores.
    """
    first = importance(traced, batches, make_optimizer, stored_statistics=stored_statistics)
    scores: list[ParameterScore] = []
    for name, parameter in traced.parameters.items():
        with _whole(traced, stored_statistics) as stage:
            for other in traced.parameters.values():
                other.requires_grad_(other is parameter)
            before = _mean_loss(stage, batches)
            optimizer = make_optimizer({name: parameter})
            for step in range(steps):
                _step(stage, batches[step % len(batches)], optimizer)
            gain = before - _mean_loss(stage, batches)
        known = first.by_parameter[name]
        shares = None
        if known.channels is not None:
            positive = [max(c, 0.0) for c in known.channels]
            total = sum(positive)
            shares = tuple(gain * (c / total if total else 1 / len(positive)) for c in positive)
        scores.append(ParameterScore(parameter=name, score=gain, channels=shares))
    return first.model_copy(update={"method": "contribution", "scores": tuple(scores)})


@contextmanager
def _whole(traced: Traced, stored_statistics: bool) -> Generator[StageModule]:
    """The whole model as a stage that trains everything; parameters, buffers and flags are put back."""
    tensors = [*traced.parameters.values(), *traced.buffers.values()]
    values = [t.detach().clone() for t in tensors]
    flags = {name: p.requires_grad for name, p in traced.parameters.items()}
    try:
        for parameter in traced.parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        first = next(iter(traced.parameters.values()))
        yield StageModule(
            traced.ops, traced.graph, 0, len(traced.graph), parameters=traced.parameters,
            buffers=traced.buffers, device=str(first.device),
            sparse=Sparse(stored_statistics=stored_statistics),
        )  # fmt: skip
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for name, parameter in traced.parameters.items():
            parameter.grad = None
            parameter.requires_grad_(flags[name])


def _loss(stage: StageModule, batch: Batch) -> Tensor:
    return stage(*batch)[0]


def _mean_loss(stage: StageModule, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        return sum(float(_loss(stage, batch)) for batch in batches) / len(batches)


def _step(stage: StageModule, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    _loss(stage, batch).backward()  # pyright: ignore[reportUnknownMemberType]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _scored(
    graph: ModelGraph, gains: Mapping[str, Tensor], method: Method, stored_statistics: bool
) -> Importance:
    scores: list[ParameterScore] = []
    for name, gain in gains.items():
        channels = None
        if name in graph.sliceable:
            dimension, _ = graph.sliceable[name]
            others = [d for d in range(gain.dim()) if d != dimension]
            channels = tuple(float(c) for c in gain.double().sum(others))
        scores.append(ParameterScore(parameter=name, score=float(gain.double().sum()), channels=channels))
    return Importance(
        graph_digest=graph.digest, method=method, stored_statistics=stored_statistics, scores=tuple(scores)
    )
