"""Units on their way: gradients summed over their trainers, values passed on to all who hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spanwise.core.plan import Plan
from spanwise.core.program import Action, Program
from spanwise.core.trained import GroupSync
from spanwise.lowering import mean_rows
from spanwise.runtime.collectives import chain_broadcast, ring_all_reduce
from spanwise.runtime.tags import Tags
from spanwise.runtime.trained import TrainedPart
from spanwise.runtime.transport import Transport


class Groups:
    """One device's part in the group syncs of a plan.

    Gradients come in divided by the rows of a whole micro-batch; those of a unit are to be divided by the
    rows of its trainers only, so that a unit that few train learns as fast as one that all do.
    """

    def __init__(
        self, device: str, plan: Plan, program: Program, trained: TrainedPart, transport: Transport,
        tags: Tags, timeout_s: float,
    ) -> None:  # fmt: skip
        self._me, self._program, self._trained = device, program, trained
        self._transport, self._tags, self._timeout_s = transport, tags, timeout_s
        self._rows = {y: mean_rows(plan, s) for y, s in enumerate(plan.syncs) if isinstance(s, GroupSync)}
        self._alone: list[tuple[float, str]] = []  # factors of gradients that are not summed
        for y, sync in enumerate(plan.syncs):
            if not isinstance(sync, GroupSync) or device not in sync.trainers:
                continue
            if sync.way == "masked" or len(sync.trainers) == 1:
                factor = plan.micro_batch_rows / self._rows[y][device]
                self._alone += [(factor, unit) for segment in program.buckets[y] for unit in segment]
        self._factor = {y: plan.micro_batch_rows / sum(rows.values()) for y, rows in self._rows.items()}

    def __contains__(self, sync: int) -> bool:
        """Whether a sync of the plan is of units."""
        return sync in self._rows

    def scale(self) -> None:
        """Makes gradients of units that are not summed means over their trainer's rows."""
        for factor, unit in self._alone:
            if factor != 1.0:
                self._trained.set_gradient(unit, self._trained.gradient(unit) * factor)

    def sum(self, action: Action, step: int) -> None:
        """Gradients of a segment become their mean over the rows of its trainers."""
        units = self._program.buckets[action.sync][action.segment]
        gradients = [self._trained.gradient(unit) for unit in units]
        flat = _flat(gradients)
        self._ring(action, step, flat)
        flat.mul_(self._factor[action.sync])
        for unit, part in zip(units, _parts(flat, gradients), strict=True):
            self._trained.set_gradient(unit, part)

    def average(self, action: Action, step: int) -> None:
        """Values of a segment become their mean over the trainers, by rows."""
        units = self._program.buckets[action.sync][action.segment]
        values = [self._trained.value(unit) for unit in units]
        rows = self._rows[action.sync]
        flat = _flat(values).mul_(rows.get(self._me, 0) / sum(rows.values()))
        self._ring(action, step, flat)
        self._put(units, flat, values)

    def broadcast(self, action: Action, step: int) -> None:
        """Values of a segment go from the first of a chain to all others."""
        units = self._program.buckets[action.sync][action.segment]
        values = [self._trained.value(unit) for unit in units]
        flat = _flat(values)
        tag = self._tags.tag(step, self._tags.chains[action.sync][action.segment])
        chain_broadcast(self._transport, action.members, self._me, flat, tag=tag, timeout_s=self._timeout_s)
        if self._me != action.members[0]:
            self._put(units, flat, values)

    def _ring(self, action: Action, step: int, flat: Tensor) -> None:
        tag = self._tags.tag(step, self._tags.rings[action.sync][action.segment])
        ring_all_reduce(self._transport, action.members, self._me, flat, tag=tag, timeout_s=self._timeout_s)

    def _put(self, units: Sequence[str], flat: Tensor, like: Sequence[Tensor]) -> None:
        for unit, part in zip(units, _parts(flat, like), strict=True):
            self._trained.set_value(unit, part)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _parts(flat: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return flat.split_with_sizes([tensor.numel() for tensor in like])
