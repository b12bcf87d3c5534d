"""What an event loop leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Trace:
    """What the loop saw: ends of steps, busy seconds and sent bytes per step and device, spans.

    ``spans`` are the fields of ``Span``, to be validated all at once: one by one takes twice as long.
    """

    ends: list[float]
    busy: dict[str, list[float]]
    sent: dict[str, list[float]]
    spans: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
