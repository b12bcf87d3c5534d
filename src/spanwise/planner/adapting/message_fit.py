"""What a message of a link takes: ``seconds = overhead + bytes / rate``, fitted to a run's own messages.

Where segments are cut depends on the overhead of a message against the time of its bytes. Messages of one
size show their sum only, so those of other sizes are kept longer than those of the same, and a fit says
whether its overhead can be trusted; where it cannot, a small message now and then tells. Timing noise grows
with the time, and now and then a machine has a hiccup: squares are relative, and what lies far out counts
less.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from spanwise.planner.adapting.estimate import LINK_BAND
from spanwise.planner.adapting.ratios import SHORTEST_S, Message
from spanwise.planner.adapting.tracker import BIG_WINDOW, Tracker

KEPT_OF_SIZE = 16  # the newest of each size up to a factor of two: older ones of other sizes stay
LEAST_MESSAGES = 4
ROUNDS = 8  # of reweighting; more change nothing
BISQUARE = 4.685  # standard deviations beyond which an observation does not count
PER_DEVIATION = 1.4826  # standard deviation of a normal distribution over its median deviation
# An overhead is trusted if its standard error is below a quarter of it, or so small that it does not matter.
TRUSTED_OF_OVERHEAD = 0.25
TRUSTED_OF_MESSAGE = 0.02


@dataclass(frozen=True, slots=True)
class MessageFit:
    """Seconds of a message by its bytes. ``trusted``: sizes differed enough to tell overhead from rate."""

    overhead_s: float
    bytes_per_s: float
    trusted: bool

    def seconds(self, nbytes: float) -> float:
        """What a message takes."""
        return self.overhead_s + nbytes / self.bytes_per_s


def fit_messages(messages: Sequence[Message], believed_overhead_s: float = 0.0) -> MessageFit | None:
    """The fit to messages of one link and direction; None without one that has bytes and a finite time.

    Iteratively reweighted least squares of relative residuals with Tukey's bisquare (Holland and Welsch,
    Communications in Statistics A6, 1977), begun at the median slope of pairs far apart in size (Theil's
    incomplete method, 1950). An overhead below zero is none. Where the sizes do not tell, it is the
    believed one and only the rate is fitted.
    """
    seen = [
        Message(m.nbytes, max(m.seconds, SHORTEST_S))
        for m in messages
        if m.nbytes > 0 and math.isfinite(m.seconds)
    ]
    if not seen:
        return None
    line = _robust_line(seen) if len(seen) >= LEAST_MESSAGES else None
    if line is not None:
        overhead, slope, error = line
        middling = median(m.seconds for m in seen)
        if error <= max(TRUSTED_OF_OVERHEAD * overhead, TRUSTED_OF_MESSAGE * middling):
            return MessageFit(overhead, 1 / slope, trusted=True)
    overhead = min(believed_overhead_s, min(m.seconds for m in seen) / 2)
    slope = median((m.seconds - overhead) / m.nbytes for m in seen)
    return MessageFit(overhead, 1 / slope, trusted=False)


def _robust_line(seen: Sequence[Message]) -> tuple[float, float, float] | None:
    """(overhead, seconds a byte, standard error of the overhead); None if bytes seem to take no time."""
    ordered = sorted(seen)
    half = len(ordered) // 2
    pairs = [(a, b) for a, b in zip(ordered, ordered[-half:], strict=False) if a.nbytes < b.nbytes]
    if not pairs:
        return None
    slope = median((b.seconds - a.seconds) / (b.nbytes - a.nbytes) for a, b in pairs)
    overhead = max(0.0, median(m.seconds - slope * m.nbytes for m in ordered))
    error = math.inf
    for _ in range(ROUNDS):
        expected = [max(overhead + slope * m.nbytes, SHORTEST_S) for m in ordered]
        residuals = [m.seconds / e - 1 for m, e in zip(ordered, expected, strict=True)]
        deviation = max(PER_DEVIATION * median(map(abs, residuals)), 1e-9)
        weights = [
            max(0.0, 1 - (r / (BISQUARE * deviation)) ** 2) ** 2 / e**2
            for r, e in zip(residuals, expected, strict=True)
        ]
        found = _weighted_line(ordered, weights)
        if found is None:
            return None
        overhead, slope, unit_error = found
        error = deviation * unit_error
    return overhead, slope, error


def _weighted_line(seen: Sequence[Message], weights: Sequence[float]) -> tuple[float, float, float] | None:
    """Weighted least squares: (overhead >= 0, seconds a byte, standard error of the overhead at noise 1)."""
    w0 = sum(weights)
    w1 = sum(w * m.nbytes for w, m in zip(weights, seen, strict=True))
    w2 = sum(w * m.nbytes**2 for w, m in zip(weights, seen, strict=True))
    s0 = sum(w * m.seconds for w, m in zip(weights, seen, strict=True))
    s1 = sum(w * m.seconds * m.nbytes for w, m in zip(weights, seen, strict=True))
    spread = w0 * w2 - w1 * w1
    if spread <= 1e-12 * w0 * w2:  # sizes that count are all alike
        return None
    overhead, slope = (w2 * s0 - w1 * s1) / spread, (w0 * s1 - w1 * s0) / spread
    if overhead < 0:
        overhead, slope = 0.0, s1 / w2
    return None if slope <= 0 else (overhead, slope, math.sqrt(w2 / spread))


class LinkMessages:
    """The last messages of one link in one direction, old ones of other sizes among them.

    Once the link is not as fast as it was, what came before is forgotten but for the overhead.
    """

    def __init__(self, believed_overhead_s: float = 0.0) -> None:
        self._overhead_s = believed_overhead_s
        self._recent: deque[Sequence[Message]] = deque(maxlen=BIG_WINDOW)  # by step
        self._kept: dict[int, deque[Message]] = {}
        self._tracker = Tracker(LINK_BAND)
        self.fit: MessageFit | None = None

    def add(self, messages: Sequence[Message], step_s: float) -> None:
        """Takes in the messages of a step, which took so long; ``fit`` is new then."""
        if not messages:
            return
        self._recent.append(messages)
        if self.fit is not None:
            awaited = sum(self.fit.seconds(message.nbytes) for message in messages)
            self._tracker.add(sum(message.seconds for message in messages) / awaited, step_s)
        if self._tracker.moved:
            self._kept.clear()
            self._tracker = Tracker(LINK_BAND)
            new = [message for step in self._recent for message in step]
        else:
            new = list(messages)
        self.add_sizes(new)

    def add_sizes(self, messages: Sequence[Message]) -> None:
        """Takes in messages that are not a step's, such as those of a probe."""
        for message in messages:
            same = self._kept.setdefault(message.nbytes.bit_length(), deque(maxlen=KEPT_OF_SIZE))
            same.append(message)
        self.fit = fit_messages([m for same in self._kept.values() for m in same], self._overhead_s)
        if self.fit is not None and self.fit.trusted:
            self._overhead_s = self.fit.overhead_s
