"""Rows of a micro-batch inside a stage, so that the slowest replica is as fast as can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FEW = 16  # devices; up to here it is faster not to count equal ones


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
    seconds = _in_pairs(seconds, least)
    flat = np.reshape(seconds, (cases, devices * width))
    last = np.partition(flat, total - 1, axis=1)[:, total - 1]
    feasible = np.isfinite(last)
    rows = _counts(seconds <= last[:, None, None])
    ties = feasible & (rows.sum(axis=1) > total)  # of equal times the first devices get theirs
    if ties.any():
        rows[ties] = _first_of_equals(seconds[ties], last[ties], total)
    rows[~feasible] = 0
    return rows, feasible


def _first_of_equals(seconds: Floats, edge: Floats, total: int) -> Ints:
    rows = _counts(seconds < edge[:, None, None])
    equal = _counts(seconds == edge[:, None, None])
    left = total - rows.sum(axis=1)
    for device in range(seconds.shape[1]):
        more = np.minimum(equal[:, device], left)
        rows[:, device] += more
        left -= more
    return rows


def _counts(chosen: NDArray[np.bool_]) -> Ints:
    """How many along the last axis; of few as bytes, which takes half the time."""
    if chosen.shape[2] < 256:
        return np.einsum("cdr->cd", chosen.astype(np.uint8)).astype(np.int64)
    return np.count_nonzero(chosen, axis=2).astype(np.int64)


def rows_of_kinds(
    seconds: Floats, counts: Sequence[int], total: int, least: Ints | None = None
) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """``min_max_rows`` where ``counts`` devices have equal times each.

    Args:
        seconds: ``[cases, kinds, rows]``, otherwise as there.
        counts: how many devices of each kind.
        total: rows to share.
        least: as there.

    Returns:
        The most rows that a device of each kind has, the fewest, both ``[cases, kinds]``, and whether each
        case is feasible ``[cases]``.
    """
    if len(counts) == 1:
        most = np.full((len(seconds), 1), -(-total // counts[0]), dtype=np.int64)
        feasible = np.isfinite(_in_pairs(seconds, least)[:, 0, most[0, 0] - 1])
        return (
            np.where(feasible[:, None], most, 0),
            np.where(feasible[:, None], total // counts[0], 0),
            feasible,
        )
    if sum(counts) <= FEW:
        of = np.repeat(np.arange(len(counts)), counts)
        rows, feasible = min_max_rows(seconds[:, of], total, least)
        first = np.searchsorted(of, np.arange(len(counts)))
        return np.maximum.reduceat(rows, first, axis=1), np.minimum.reduceat(rows, first, axis=1), feasible
    cases, kinds, width = seconds.shape
    seconds = _in_pairs(seconds, least)
    weights = np.repeat(np.array(counts, dtype=np.int64), width)
    flat = np.reshape(seconds, (cases, kinds * width))
    order = np.argsort(flat, axis=1, kind="stable")
    enough = np.argmax(np.cumsum(weights[order], axis=1) >= total, axis=1)
    edge = flat[np.arange(cases), order[np.arange(cases), enough]]
    feasible = np.isfinite(edge)
    most = np.count_nonzero(seconds < edge[:, None, None], axis=2)
    equal = np.count_nonzero(seconds == edge[:, None, None], axis=2)
    fewest = np.array(most)
    left = total - most @ np.array(counts)
    for kind, count in enumerate(counts):
        more = np.minimum(equal[:, kind] * count, left)
        left -= more
        most[:, kind] += -(-more // count)
        fewest[:, kind] += more // count
    most[~feasible] = 0
    fewest[~feasible] = 0
    return most.astype(np.int64), fewest.astype(np.int64), feasible


def _in_pairs(seconds: Floats, least: Ints | None) -> Floats:
    """Where a device must have two rows, its first costs about as much as two."""
    if least is None or seconds.shape[2] < 2 or least.max() < 2:
        return seconds
    pairs = least > 1
    seconds = np.array(seconds)
    seconds[pairs, :, :2] = seconds[pairs, :, 1:2] * (1 - 1e-12)
    return seconds
