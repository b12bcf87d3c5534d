"""Tensor bytes per device over virtual time."""

from __future__ import annotations

from typing import Any


class MemoryMeter:
    """Adds and frees bytes; remembers the peak and, if asked, every change."""

    def __init__(self, base: dict[str, int], *, points: bool) -> None:
        self.now = dict(base)
        self.peak = dict(base)
        self._keep = points
        #: Fields of ``MemoryPoint``: every change in order of time, if asked for.
        self.points: list[dict[str, Any]] = []
        if points:
            self.points += [{"device": d, "at_s": 0.0, "bytes": b} for d, b in base.items()]

    def add(self, device: str, nbytes: int, at_s: float) -> None:
        """``nbytes`` more (or fewer) are held from ``at_s`` on."""
        if not nbytes:
            return
        value = self.now[device] + nbytes
        self.now[device] = value
        if value > self.peak[device]:
            self.peak[device] = value
        if self._keep:
            self.points.append({"device": device, "at_s": at_s, "bytes": value})
