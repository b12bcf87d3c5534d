"""Round numbers for axes."""

from __future__ import annotations

import math
from typing import NamedTuple


class Axis(NamedTuple):
    """A range of values, its round ticks, and how many decimals tell them apart."""

    low: float
    high: float
    ticks: tuple[float, ...]
    decimals: int

    def at(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high end."""
        return (value - self.low) / (self.high - self.low)

    def label(self, tick: float) -> str:
        """A tick as text."""
        return f"{tick:.{self.decimals}f}"


def axis(low: float, high: float, count: int = 5, *, whole: bool = False, tight: bool = False) -> Axis:
    """An axis over [low, high] with about ``count`` ticks at 1, 2 or 5 times a power of ten.

    ``whole`` keeps ticks at integers. The range grows to the outer ticks unless ``tight``.
    """
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    if tight:
        ticks = tuple(t for t in ticks if low - 1e-12 <= t <= high + step * 1e-9)
    else:
        low, high = ticks[0], ticks[-1]
    return Axis(low, high, ticks, max(0, -math.floor(math.log10(step) + 1e-9)))


def time_unit(span_s: float) -> tuple[float, str]:
    """Factor and unit in which a time span reads well."""
    if span_s >= 2:
        return 1.0, "s"
    return (1e3, "ms") if span_s >= 2e-3 else (1e6, "µs")
