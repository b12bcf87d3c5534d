"""Which rows of the data a device reads in which step, and reading them."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spanwise.core.cluster import DataShare
from spanwise.core.errors import InputError
from spanwise.core.model import ModelGraph, TensorSpec
from spanwise.core.plan import Plan


class Rows(Protocol):
    """A map-style data set of (inputs, labels) pairs, as in ``torch.utils.data``."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One row: (inputs, labels), each a tensor or a tuple of tensors."""
        ...


def shard(rows: int, shares: tuple[DataShare, ...], device: str) -> Tensor:
    """Indices of the rows that a device holds: every data device has its share, evenly interleaved.

    Row i goes to the device whose quota is least filled, so equal shares deal rows out in turn.
    """
    total = sum(share.share for share in shares)
    weights = torch.tensor([share.share / total for share in shares], dtype=torch.float64)
    # Row i belongs to the share whose cumulative quota passes a new integer: largest-deficit dealing.
    owed = torch.zeros(len(shares), dtype=torch.float64)
    me = [share.device for share in shares].index(device)
    if bool((weights == weights[0]).all()):
        return torch.arange(rows)[me :: len(shares)]
    mine: list[int] = []
    for row in range(rows):
        owed += weights
        winner = int(owed.argmax())
        owed[winner] -= 1
        if winner == me:
            mine.append(row)
    return torch.tensor(mine, dtype=torch.int64)


def held_rows(rows: int, shares: tuple[DataShare, ...], device: str) -> Tensor:
    """Indices of the rows that a source reads from: its shard, or all where there are no shares."""
    return shard(rows, shares, device) if shares else torch.arange(rows)


@dataclass(frozen=True)
class Sampler:
    """Rows by step: a fresh permutation of what each source draws from every epoch, by seed.

    Where data devices hold shards, each draws from its own, and the sequence depends on the seed, the data
    devices and the rows per micro-batch of each. Where every device has all rows, all sources draw from one
    ``common`` permutation and read their own part of it: batches depend on the seed alone. Rows that do not
    fill a batch at the end of an epoch are left out of that epoch.
    """

    seed: int
    counts: tuple[int, ...]  # rows to draw from, per source
    rows: tuple[int, ...]  # rows of a micro-batch, per source
    micro_batches: int
    common: bool = False

    @classmethod
    def of(cls, plan: Plan, shares: tuple[DataShare, ...], dataset_rows: int, seed: int) -> Sampler:
        """The sampler of a plan; ``InputError`` if the data does not fill one batch.

        Args:
            plan: whose sources read.
            shares: of the sources; empty if every device has all rows.
            dataset_rows: of the whole training set.
            seed: of the order.
        """
        by_device = {share.device: share for share in shares}
        ordered = tuple(by_device[source.device] for source in plan.sources) if shares else ()
        counts = tuple(len(held_rows(dataset_rows, ordered, s.device)) for s in plan.sources)
        rows = tuple(source.rows for source in plan.sources)
        sampler = cls(seed, counts, rows, plan.micro_batches, common=not shares)
        if sampler.steps_per_epoch < 1:
            each = ", ".join(str(r * plan.micro_batches) for r in rows)
            where = "" if sampler.common else f" on {len(counts)} device(s)"
            raise InputError(
                f"data: {dataset_rows} rows{where} do not fill one batch of {plan.batch} rows"
                f"{'' if sampler.common else f' (each device needs {each})'}; lower 'batch' or give more data"
            )
        return sampler

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        drawn = [sum(self.rows)] * len(self.rows) if self.common else self.rows
        return min(c // (r * self.micro_batches) for c, r in zip(self.counts, drawn, strict=True))

    def indices(self, source: int, step: int) -> Tensor:
        """Positions in what a source draws from, ``[micro-batch, row]``, for all micro-batches of a step."""
        epoch, at = divmod(step, self.steps_per_epoch)
        drawn, first = (sum(self.rows), sum(self.rows[:source])) if self.common else (self.rows[source], 0)
        stream = 0 if self.common else source
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 1009 + stream)
        order = torch.randperm(self.counts[source], generator=generator)
        size = drawn * self.micro_batches
        batch = order[at * size : (at + 1) * size].view(self.micro_batches, drawn)
        return batch[:, first : first + self.rows[source]]


class Feed:
    """Reads a source's rows and hands them out as the model's inputs and labels."""

    def __init__(self, data: Rows, held: Tensor, sampler: Sampler, source: int, graph: ModelGraph) -> None:
        self._data, self._held, self._sampler, self._source = data, held, sampler, source
        self._graph = graph
        self._step, self._indices = -1, torch.empty(0)

    def rows(self, step: int, micro_batch: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Inputs and labels of this source's rows of a micro-batch."""
        if step != self._step:
            self._indices = self._held[self._sampler.indices(self._source, step)]
            self._step = step
        inputs, labels = read_rows(self._data, self._indices[micro_batch])
        return cast(inputs, self._graph.inputs), cast(labels, self._graph.labels)


def read_rows(data: Rows, indices: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Rows as (inputs, labels), each a tuple of tensors with the rows first."""
    found = getattr(data, "tensors", None)
    tensors = typing.cast("tuple[Tensor, ...]", found) if isinstance(found, tuple) else ()
    if len(tensors) >= 2:
        return tuple(t[indices] for t in tensors[:-1]), (tensors[-1][indices],)
    pairs = [data[int(index)] for index in indices]
    sides: list[tuple[Tensor, ...]] = []
    for side in (0, 1):
        columns = zip(
            *(p[side] if isinstance(p[side], (tuple, list)) else (p[side],) for p in pairs), strict=True
        )
        sides.append(tuple(torch.stack([torch.as_tensor(x) for x in column]) for column in columns))
    return sides[0], sides[1]


def cast(tensors: tuple[Tensor, ...], specs: tuple[TensorSpec, ...]) -> tuple[Tensor, ...]:
    """Tensors in the dtypes that the model was traced with; ``InputError`` if shapes do not fit."""
    if len(tensors) != len(specs):
        raise InputError(
            f"data: a row has {len(tensors)} tensors where the model was traced with {len(specs)}; "
            "give rows as (inputs, labels)"
        )
    out: list[Tensor] = []
    for tensor, spec in zip(tensors, specs, strict=True):
        if tuple(tensor.shape[1:]) != spec.shape:
            raise InputError(
                f"data: rows of '{spec.name}' have shape {tuple(tensor.shape[1:])}, the model was traced "
                f"with {spec.shape}; give all rows one shape"
            )
        out.append(tensor.to(getattr(torch, spec.dtype)))
    return tuple(out)
