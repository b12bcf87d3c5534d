"""Measured time tables as files, one per model, device, precision, torch version, threads and row counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from spanwise.core.errors import InputError
from spanwise.core.profile import TimeTable
from spanwise.profiler.known import FORMAT, cpu_name
from spanwise.profiler.traced import Traced


def cache_key(traced: Traced, *, device: str, threads: int, rows: tuple[int, ...]) -> str:
    """SHA-256 of everything that layer times depend on, 64 hex digits."""
    dtypes = sorted({str(p.dtype) for p in traced.parameters.values()})
    parts = [FORMAT, traced.ops.digest, device_name(device), dtypes, torch.__version__, threads, list(rows),
             [list(layer.ops) for layer in traced.graph.layers]]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cached_table(folder: Path, key: str, layers: int, measure: Callable[[], TimeTable]) -> TimeTable:
    """The table of that key in ``folder``; measured and written if there is none that can be used.

    Args:
        folder: made if it does not exist.
        key: from :func:`cache_key`.
        layers: how many layers the table must have.
        measure: called if the folder has no such table, or a damaged one.

    Raises:
        ResourceError: the new table cannot be written.
    """
    path = folder / f"{key}.json"
    if path.is_file():
        try:
            table = TimeTable.load(path)
        except InputError:  # damaged: measuring again costs less than asking
            table = None
        if table is not None and len(table.layers) == layers:
            return table
    table = measure()
    table.save(path)
    return table


def device_name(device: str) -> str:
    """The processor or accelerator model, as far as the system says."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return cpu_name()
