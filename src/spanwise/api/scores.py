"""Scores of parameters for strategies that choose what each device trains, by a probe on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spanwise.core.errors import InputError
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

    Rows are the first of the training set.

    Raises:
        InputError: stored statistics are to be used, and the model has none.
    """
    if not needs_scores(strategy):
        return None
    scratch, stored = _never_trained(prepared.traced.buffers), prepared.job.statistics == "stored"
    if scratch and stored:
        raise InputError(
            "job: statistics are to be the 'stored' ones, but the model was never trained and has none; "
            'give a trained model or set statistics = "batch"'
        )
    return _probed(prepared, strategy, stored).model_copy(update={"from_scratch": scratch})


def _probed(prepared: Prepared, strategy: str, stored: bool) -> Importance:
    import torch

    from spanwise.profiler.importance import importance, magnitude
    from spanwise.runtime.feed import read_rows
    from spanwise.runtime.optimize import make_optimizer

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


def _never_trained(buffers: Mapping[str, Tensor]) -> bool:
    """Whether the model has running statistics, and they are as they were initialised."""
    counters = [tensor for name, tensor in buffers.items() if name.endswith(_COUNTER)]
    return any(int(counter) == 0 for counter in counters)
