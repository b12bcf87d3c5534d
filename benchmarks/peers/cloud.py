"""Cloud only: the data devices send every step's raw rows to the cloud, which trains with DDP.

Rows of step k + 1 travel while step k computes: the cloud posts its receives one step ahead into a second
pair of buffers. gloo sends when the receive is there, so a data device is never more than that ahead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from engines import Replica, Run, data_parallel, my_rows
from models import batches, even, loss_of, make, units
from torch import Tensor

_BATCHES = 4


def cloud_only(run: Run) -> Uploader | Receiver:
    """The role of this rank: a data device sends, every other rank is cloud and computes."""
    cloud = [i for i, device in enumerate(run.ranks) if device not in run.data_devices]
    data = [run.ranks.index(device) for device in run.data_devices if device in run.ranks]
    if not cloud or len(data) != len(run.data_devices) or not data:
        raise ValueError(
            f"cloud_only: data devices {list(run.data_devices)} must be among the ranks {list(run.ranks)}, "
            "and at least one rank must not hold data"
        )
    # Every rank takes part in making a group, whether it is a member or not.
    group = dist.new_group(cloud) if len(cloud) > 1 else None
    transfers = _transfers(run, cloud, data)
    if run.rank in data:
        return Uploader(run, [t for t in transfers if t[0] == run.rank])
    return Receiver(run, [t for t in transfers if t[1] == run.rank], cloud, group)


def _transfers(run: Run, cloud: list[int], data: list[int]) -> list[tuple[int, int, int, int]]:
    """(data rank, cloud rank, start, stop) in rows of the global batch, held by the data devices evenly."""
    held, at = [], 0
    for rank, count in zip(data, even(run.batch, len(data)), strict=True):
        held.append((rank, at, at + count))
        at += count
    wanted = [(rank, my_rows(run, len(cloud), i)) for i, rank in enumerate(cloud)]
    found = [
        (source, sink, max(start, share.start), min(stop, share.stop))
        for source, start, stop in held
        for sink, share in wanted
    ]
    return [t for t in found if t[2] < t[3]]


class Uploader:
    """A data device: sends the rows that it holds, step after step."""

    continuous = True
    rows = 0

    def __init__(self, run: Run, transfers: list[tuple[int, int, int, int]]) -> None:
        self.transfers = transfers
        self.data = batches(run.model, run.batch, _BATCHES)
        self.facts: dict[str, Any] = {"role": "data", "rows_held": sum(t[3] - t[2] for t in transfers)}

    def step(self, k: int) -> float | None:
        """Ends when the rows of step k have left."""
        pieces = self.data[k % len(self.data)]
        sends = [
            dist.isend(piece[start:stop].contiguous(), sink)
            for _, sink, start, stop in self.transfers
            for piece in pieces
        ]
        for work in sends:
            work.wait()
        return None

    def parameters_bytes(self) -> int:
        """A data device holds no parameters."""
        return 0

    def state(self) -> dict[str, Tensor]:
        """A data device holds no parameters."""
        return {}


class Receiver:
    """A cloud device: plain PyTorch alone, DDP with others, on rows that arrive one step ahead."""

    continuous = True

    def __init__(
        self,
        run: Run,
        transfers: list[tuple[int, int, int, int]],
        cloud: list[int],
        group: dist.ProcessGroup | None,
    ) -> None:
        share = my_rows(run, len(cloud), cloud.index(run.rank))
        model = make(run.model, run.seed)
        parts = units(model)
        facts: dict[str, Any] = {"role": "cloud"}
        if len(cloud) > 1:
            model, settings = data_parallel(model, run.options, group)
            facts |= settings
        weight = len(share) * len(cloud) / run.batch
        self.replica = Replica(model, parts, loss_of(run.model), len(share), weight, facts, [])
        self.rows, self.facts = len(share), facts
        self.transfers = [
            (source, start - share.start, stop - share.start) for source, _, start, stop in transfers
        ]
        x, y = batches(run.model, run.batch, 1)[0]
        window = slice(share.start, share.stop)
        self.buffers = [(torch.empty_like(x[window]), torch.empty_like(y[window])) for _ in range(2)]
        self.total = run.warmup + run.steps
        self.pending = self._receive(0)

    def _receive(self, k: int) -> list[dist.Work]:
        pieces = self.buffers[k % 2]
        return [
            dist.irecv(piece[start:stop], source)
            for source, start, stop in self.transfers
            for piece in pieces
        ]

    def step(self, k: int) -> float | None:
        """Waits for the rows of step k, asks for those of k + 1, and trains."""
        for work in self.pending:
            work.wait()
        self.pending = self._receive(k + 1) if k + 1 < self.total else []
        return self.replica.train(*self.buffers[k % 2])

    def parameters_bytes(self) -> int:
        """Of the whole model."""
        return self.replica.parameters_bytes()

    def state(self) -> dict[str, Tensor]:
        """Parameters by unit."""
        return self.replica.state()
