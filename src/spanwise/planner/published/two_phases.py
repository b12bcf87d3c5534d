"""Asteroid's rows inside a stage: shares by speed under memory, then rows from the slowest to the fastest.

Ye et al., "Asteroid", MobiCom 2024, as unofficial re-implementations have it; unverified. ``rows.py`` has the
exact way, which this one misses at times.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spanwise.planner.facts.tables import Floats, Ints


def two_phase_rows(seconds: Floats, caps: Ints, total: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Shares ``total`` rows among devices by the two phases.

    Args:
        seconds: ``[cases, devices, rows]``, entry ``y`` is the time of ``y + 1`` rows, not falling with rows.
        caps: ``[cases, devices]``, most rows that the memory holds.
        total: rows to share.

    Returns:
        Rows ``[cases, devices]`` and whether each case is feasible: all rows shared, each device with one.
    """
    rows = _by_speed(seconds[:, :, total - 1], np.maximum(caps, 0), total)
    feasible = (rows.sum(axis=1) == total) & (rows.min(axis=1) >= 1)
    _offload(seconds, caps, rows, feasible)
    rows[~feasible] = 0
    return rows, feasible


def _by_speed(whole: Floats, caps: Ints, total: int) -> Ints:
    """Phase 1: in proportion to speed; what a full device cannot take goes to the others, again by speed."""
    speed = 1.0 / np.maximum(whole, 1e-12)
    rows = np.zeros(speed.shape, dtype=np.int64)
    left = np.full(len(speed), total)
    while left.any():
        weight = np.where(rows < caps, speed, 0.0)
        sums = weight.sum(axis=1)
        exact = left[:, None] * weight / np.maximum(sums, 1e-300)[:, None]
        more = np.minimum(np.floor(exact).astype(np.int64), caps - rows)
        idle = (
            (more.sum(axis=1) == 0) & (sums > 0) & (left > 0)
        )  # less than a row each: the largest remainder gets one
        case = np.flatnonzero(idle)
        more[case, np.argmax(exact[case], axis=1)] = 1
        rows += more
        left = np.where(sums > 0, left - more.sum(axis=1), 0)
    return rows


def _offload(seconds: Floats, caps: Ints, rows: Ints, open_: NDArray[np.bool_]) -> None:
    """Phase 2, in place: a row from the slowest to the fastest device while the slowest becomes faster.

    Needs times that do not fall with rows, or it might not end.
    """
    case, devices = np.flatnonzero(open_), np.arange(rows.shape[1], dtype=np.int64)
    while len(case) and rows.shape[1] > 1:
        held = rows[case]
        now = seconds[case[:, None], devices, held - 1]
        slow = np.argmax(now, axis=1)
        at = np.arange(len(case))
        takes: NDArray[np.bool_] = (held < caps[case]) & (devices[None] != slow[:, None])
        fast = np.argmin(np.where(takes, now, np.inf), axis=1)
        with_one = seconds[case, fast, np.minimum(held[at, fast], seconds.shape[2] - 1)]
        moves = (with_one < now[at, slow]) & takes[at, fast] & (held[at, slow] > 1)
        case, slow, fast = case[moves], slow[moves], fast[moves]
        rows[case, slow] -= 1
        rows[case, fast] += 1
