"""Ratios of measured to expected over the last steps: what is usual, and when they have moved for good."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import TypeVar

T = TypeVar("T")

# What must agree before something has moved: so many steps, and so many seconds of them, as steps of a few
# milliseconds all lie within one hiccup of a machine.
WINDOW, WINDOW_S = 5, 2.5
SOON, SOON_S = 3, 1.0  # enough of steps where a device or link is far out
BIG_WINDOW, BIG_WINDOW_S = 2, 0.5
FIRST, FIRST_S = 3, 1.0  # under a plan, say what is usual of it
AGREE = 0.75  # of these steps must be out of the band
KEPT = 64  # steps
BIG = 1.5  # beyond this the shorter time is enough
LASTING, LASTING_S = 12, 5.0  # for how long what no step time bears out must show itself
BEFORE = 8  # steps before those, with which they are compared
ALIKE = 1.4  # both directions between two sites, if they have moved together
CALM_WEIGHT = 0.3  # of the newest step in the smoothed ratio


def newest(entries: Sequence[tuple[float, T]], steps: int, seconds: float) -> list[T]:
    """Of (seconds, entry) the newest that span so many steps and seconds; empty if all are too few."""
    spanned, out = 0.0, list[T]()
    for length_s, entry in reversed(entries):
        out.append(entry)
        spanned += length_s
        if len(out) >= steps and spanned >= seconds:
            return out[::-1]
    return []


def alike(a: float, b: float) -> bool:
    """Whether two ratios are near enough for one cause."""
    return max(a, b) < ALIKE * min(a, b)


class Tracker:
    """Ratios of the last steps of one kind: smoothed while calm, their median once they have moved."""

    def __init__(self, band: float) -> None:
        self._band = band
        self._last: deque[tuple[float, float]] = deque(maxlen=KEPT)  # seconds and log ratio
        self._smooth: float | None = None

    def add(self, ratio: float, seconds: float) -> None:
        """Takes the newest step in, which took so long."""
        value = math.log(max(ratio, 1e-6))
        self._last.append((seconds, value))
        if self._smooth is None:
            self._smooth = value
        else:
            self._smooth += CALM_WEIGHT * (value - self._smooth)

    @property
    def big(self) -> bool:
        """Whether the newest steps are far out, all to the same side."""
        return self._beyond(BIG, self._short)

    @property
    def moved(self) -> bool:
        """Whether the newest steps are out of the band, all to the same side."""
        return self.big or self._beyond(self._band, self._long)

    @property
    def soon(self) -> bool:
        """Whether it seems that they will have moved."""
        return self._beyond(self._band, newest(self._last, SOON, SOON_S))

    @property
    def lasting(self) -> bool:
        """Whether they have been far out to the same side for long."""
        return self._beyond(BIG, newest(self._last, LASTING, LASTING_S))

    @property
    def turned(self) -> bool:
        """Whether they have moved in the newest steps, and were not there before."""
        last = self._short if self.big else self._long
        before = [value for _, value in self._last][: -len(last) or None][-BEFORE:]
        turn = median(last) - (median(before) if before else 0.0) if last else 0.0
        return self.moved and turn * median(last) > 0 and abs(turn) > math.log(self._band)

    @property
    def leap(self) -> float | None:
        """The ratio of the newest step, if that alone is far out and long enough to say something."""
        last = newest(self._last, 1, BIG_WINDOW_S)
        return math.exp(last[-1]) if self._beyond(BIG, last) else None

    @property
    def ratio(self) -> float:
        """The best estimate now."""
        if self._smooth is None:
            return 1.0
        if not self.moved:
            return math.exp(self._smooth)
        return math.exp(median(self._short if self.big else self._long))

    @property
    def newest(self) -> float:
        """The ratio of the newest step."""
        return math.exp(self._last[-1][1]) if self._last else 1.0

    @property
    def _short(self) -> list[float]:
        return newest(self._last, BIG_WINDOW, BIG_WINDOW_S)

    @property
    def _long(self) -> list[float]:
        return newest(self._last, WINDOW, WINDOW_S)

    def _beyond(self, band: float, last: Sequence[float]) -> bool:
        above = sum(value > math.log(band) for value in last)
        below = sum(value < -math.log(band) for value in last)
        return bool(last) and max(above, below) >= AGREE * len(last)


class Usual:
    """What is usual of one device or link under a plan: its ratio in the first steps.

    A simulation is off by a little for every plan, device and link. That is no drift, so later steps are
    held against the first ones, unless those are far off themselves.
    """

    def __init__(self, most: float, ratio: float | None = None) -> None:
        self.ratio, self._most = ratio, most
        self._first: list[tuple[float, float]] = []

    def over(self, ratio: float, seconds: float) -> list[tuple[float, float]]:
        """(ratio over the usual one, seconds) of a step; of all so far when that is first known."""
        if self.ratio is not None:
            return [(ratio / self.ratio, seconds)]
        self._first.append((seconds, ratio))
        first = newest(self._first, FIRST, FIRST_S)
        if not first:
            return []
        middle = median(first)
        self.ratio = usual = middle if 1 / self._most <= middle <= self._most else 1.0
        return [(found / usual, length_s) for length_s, found in self._first]
