"""Latency and bandwidth of a link from the times of messages; the runtime sends them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from spanwise.core.errors import InputError


def fit_link(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fits ``seconds = latency + bytes / rate`` (Hockney, "The communication challenge for MPP", Parallel
    Computing 1994, section 2) through the medians of the smallest and the largest messages.

    Args:
        samples: (bytes, seconds) of one-way messages of at least two sizes, several of each.

    Returns:
        Latency in seconds (never negative) and rate in bytes per second.

    Raises:
        InputError: fewer than two sizes, or large messages are not slower than small ones.
    """
    times: dict[int, list[float]] = {}
    for size, seconds in samples:
        times.setdefault(size, []).append(seconds)
    if len(times) < 2:
        raise InputError(
            f"link: {len(times)} message sizes measured, two are needed; send small and large ones"
        )
    small, large = min(times), max(times)
    small_s, large_s = median(times[small]), median(times[large])
    if large_s <= small_s:
        raise InputError(
            f"link: {large} bytes took {large_s:.3g} s, not longer than {small} bytes ({small_s:.3g} s); "
            "send larger messages"
        )
    rate = (large - small) / (large_s - small_s)
    return max(0.0, small_s - small / rate), rate
