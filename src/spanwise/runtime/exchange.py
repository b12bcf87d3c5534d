"""Gradients on their way to a parameter server, its updates, and parameters on their way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spanwise.core.plan import Plan
from spanwise.core.program import Action, Program
from spanwise.core.syncs import ServerSync

Flat = tuple[Tensor, ...]  # values of several tensors one after the other, a tensor for each type

_Segment = tuple[int, int]  # sync, segment


class Exchange:
    """One device's pushes, pulls and updates by segments; of a device, a server or both.

    Nothing of a segment is summed before all gradients of it are in, and they are added in the order of the
    plan's devices whenever they come, so the sums have the same bits under any segments and in any timing.
    """

    def __init__(
        self, device: str, plan: Plan, program: Program, parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:  # fmt: skip
        self._me, self._parameters, self._optimizer = device, parameters, optimizer
        self._names = {"push": program.buckets, "pull": program.pulled}
        self._syncs = {y: sync for y, sync in enumerate(plan.syncs) if isinstance(sync, ServerSync)}
        self._pushed: dict[_Segment, dict[str, Flat]] = {}

    def room(self, action: Action) -> Flat:
        """Empty tensors for what a receive brings."""
        return tuple(
            torch.empty(sum(t.numel() for t in group), dtype=group[0].dtype, device=group[0].device)
            for group in _by_type(self._segment(action))
        )

    def outgoing(self, action: Action) -> Flat:
        """Copies of what a send takes: a segment's gradients, which are dropped here, or its parameters."""
        parameters = self._segment(action)
        if action.payload == "pull":
            return _flat(p.detach() for p in parameters)
        values = _flat(gradient(p) for p in parameters)
        for parameter in parameters:
            parameter.grad = None
        return values

    def arrived(self, action: Action, values: Flat) -> None:
        """Takes in what a receive brought: parameters at once, gradients when all of a segment are there."""
        if action.payload == "pull":
            parameters = self._segment(action)
            with torch.no_grad():
                for parameter, part in zip(parameters, _parts(values, parameters), strict=True):
                    parameter.copy_(part)
            return
        key = (action.sync, action.segment)
        found = self._pushed.setdefault(key, {})
        found[action.peer] = values
        sync = self._syncs[action.sync]
        if len(found) == len(sync.clients):
            self._sum(sync, self._pushed.pop(key), self._segment(action))

    def _sum(self, sync: ServerSync, found: dict[str, Flat], parameters: Sequence[nn.Parameter]) -> None:
        if self._me in sync.devices:
            found[self._me] = _flat(gradient(p) for p in parameters)
        first, *others = (found[device] for device in sync.devices)
        for other in others:
            for total, part in zip(first, other, strict=True):
                total.add_(part)
        for parameter, part in zip(parameters, _parts(first, parameters), strict=True):
            parameter.grad = part

    def update(self, action: Action, scale: Tensor | None) -> None:
        """Applies the optimizer to the parameters of a segment and to no others."""
        assert self._optimizer is not None
        chosen = [self._parameters[name] for name in self._names["push"][action.sync][action.segment]]
        if scale is not None:
            for parameter in chosen:
                gradient(parameter).mul_(scale.to(parameter.dtype))
        others = {p: p.grad for p in self._parameters.values() if p.grad is not None}
        for parameter in chosen:
            others.pop(parameter, None)
        for parameter in others:
            parameter.grad = None  # an optimizer passes over what has no gradient
        self._optimizer.step()
        for parameter in chosen:
            parameter.grad = None
        for parameter, kept in others.items():
            parameter.grad = kept

    def reset(self) -> None:
        """Forgets gradients of a step that did not end."""
        self._pushed.clear()

    def _segment(self, action: Action) -> list[nn.Parameter]:
        names = self._names[action.payload or ""][action.sync][action.segment]
        return [self._parameters[name] for name in names]


def gradient(parameter: nn.Parameter) -> Tensor:
    """Its gradient; zeros where no row reached it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def _flat(tensors: Iterable[Tensor]) -> Flat:
    return tuple(torch.cat([t.reshape(-1) for t in group]) for group in _by_type(tensors))


def _parts(values: Flat, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of flat values in the order and shapes of the tensors that they stand for."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for flat, group in zip(values, _by_type(like), strict=True):
        found[flat.dtype] = list(flat.split_with_sizes([t.numel() for t in group]))
    return [found[t.dtype].pop(0).view_as(t) for t in like]
