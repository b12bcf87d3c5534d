"""What a device really did and when: spans of the last steps, busy time, order of actions."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field

from spanwise.core.program import Action


@dataclass(slots=True)
class StepRecord:
    """Times of one step on one device, in ``time.monotonic`` seconds.

    ``spans`` are (lane, kind, action, start, end); ``busy_s`` adds up compute.
    """

    step: int
    start: float
    end: float = 0.0
    busy_s: float = 0.0
    spans: list[tuple[str, str, str, float, float]] = field(
        default_factory=list[tuple[str, str, str, float, float]]
    )


class Recorder:
    """Keeps the spans of the last ``keep`` steps of one device."""

    def __init__(self, device: str, keep: int = 2) -> None:
        self.device = device
        self.records: deque[StepRecord] = deque(maxlen=keep)
        self._lock = threading.Lock()

    def begin(self, step: int) -> None:
        """A step begins."""
        with self._lock:
            self.records.append(StepRecord(step, time.monotonic()))

    def end(self) -> StepRecord:
        """The step is over."""
        record = self.records[-1]
        record.end = time.monotonic()
        return record

    def span(self, kind: str, action: Action, start: float, end: float, *, busy: bool) -> None:
        """The device spent this time on an action, or waiting for it."""
        record = self.records[-1]
        if busy:
            record.busy_s += end - start
        record.spans.append((self.device, kind, str(action), start, end))

    def passed(self, peer: str, start: float, end: float, nbytes: int) -> None:
        """A message was transmitted; called from the pacer's thread."""
        with self._lock:
            if self.records:
                lane = f"{self.device}>{peer}"
                self.records[-1].spans.append((lane, "transfer", f"{nbytes}B", start, end))
