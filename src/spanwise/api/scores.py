"""Scores of parameters for strategies that choose what each device trains, by a probe on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spanwise.core.importance import Importance
from spanwise.planner import SPARSE_STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from spanwise.api.prepare import Prepared

PROBE_BATCHES, MOST_ROWS = 4, 64
_COUNTER = "num_batches_tracked"


def needs_scores(strategy: str) -> bool:
    """Whether a strategy chooses what trains."""
    return strategy in SPARSE_STRATEGIES


def scores(prepared: Prepared, strategy: str) -> Importance | None:
    """What a strategy needs to know of the parameters; None if it trains everything.

    Rows are the first of the training set. BatchNorm uses stored statistics if there are any, that is if the
    model was trained before.
    """
    if not needs_scores(strategy):
        return None
    import torch

    from spanwise.profiler.importance import importance, magnitude
    from spanwise.runtime.feed import read_rows
    from spanwise.runtime.optimize import make_optimizer

    stored = has_statistics(prepared.traced.buffers)
    if strategy == "dsparse_magnitude":
        return magnitude(prepared.traced, stored_statistics=stored)
    rows = min(prepared.job.batch, MOST_ROWS, len(prepared.train))
    dtype = getattr(torch, prepared.job.dtype)
    batches: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    for number in range(PROBE_BATCHES):
        found = read_rows(prepared.train, (torch.arange(rows) + number * rows) % len(prepared.train))
        inputs, labels = (tuple(t.to(dtype) if t.is_floating_point() else t for t in part) for part in found)
        batches.append((inputs, labels))
    return importance(
        prepared.traced, batches, lambda named: make_optimizer(prepared.job.optimizer, named),
        stored_statistics=stored,
    )  # fmt: skip


def has_statistics(buffers: Mapping[str, Tensor]) -> bool:
    """Whether running statistics are of some batches, not as they were initialised."""
    counters = [tensor for name, tensor in buffers.items() if name.endswith(_COUNTER)]
    return all(int(counter) > 0 for counter in counters)
