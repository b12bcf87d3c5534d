"""Rows of a micro-batch inside a stage, so that the slowest replica is as fast as can be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def min_max_rows(seconds: Floats, total: int, least: Ints | None = None) -> tuple[Ints, NDArray[np.bool_]]:
    """Shares ``total`` rows among devices so that the greatest of their times is least.

    Giving rows one at a time to the device whose time with one more row is least is exact for times that
    do not fall with rows; it takes exactly the ``total`` smallest of all entries, so one partial sort does
    it for all cases at once.

    Args:
        seconds: ``[cases, devices, rows]``, entry ``y`` is the time of ``y + 1`` rows, not falling along
            the last axis; infinite where memory does not allow that many.
        total: rows to share, at most ``devices * rows``.
        least: ``[cases]``, 1 or 2: how many rows a device has if it has any. Its first row then costs as much
            as two, a little less, so that of equal times those that come in pairs are taken first. A device
            may still be left with one row: then the case is better off without it.

    Returns:
        Rows ``[cases, devices]`` and whether each case is feasible ``[cases]``.
    """
    cases, devices, width = seconds.shape
    if least is not None and width > 1 and least.max() > 1:
        pairs = least > 1
        seconds = np.array(seconds)
        seconds[pairs, :, :2] = seconds[pairs, :, 1:2] * (1 - 1e-12)
    flat = np.reshape(seconds, (cases, devices * width))
    last = np.partition(flat, total - 1, axis=1)[:, total - 1]
    feasible = np.isfinite(last)
    edge = last[:, None, None]
    rows = np.count_nonzero(seconds < edge, axis=2)
    equal = np.count_nonzero(seconds == edge, axis=2)
    left = total - rows.sum(axis=1)
    for device in range(devices):
        more = np.minimum(equal[:, device], left)
        rows[:, device] += more
        left -= more
    rows[~feasible] = 0
    return rows.astype(np.int64), feasible
