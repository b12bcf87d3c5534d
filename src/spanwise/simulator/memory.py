"""Tensor bytes per device over virtual time."""

from __future__ import annotations

from spanwise.core.timeline import MemoryPoint


class MemoryMeter:
    """Adds and frees bytes; remembers the peak and, if asked, every change."""

    def __init__(self, base: dict[str, int], *, points: bool) -> None:
        self.now = dict(base)
        self.peak = dict(base)
        self._points: list[MemoryPoint] | None = [] if points else None
        if self._points is not None:
            self._points += [MemoryPoint(device=d, at_s=0.0, bytes=b) for d, b in base.items()]

    def add(self, device: str, nbytes: int, at_s: float) -> None:
        """``nbytes`` more (or fewer) are held from ``at_s`` on."""
        if not nbytes:
            return
        value = self.now[device] + nbytes
        self.now[device] = value
        if value > self.peak[device]:
            self.peak[device] = value
        if self._points is not None:
            self._points.append(MemoryPoint.model_construct(device=device, at_s=at_s, bytes=value))

    def points(self) -> tuple[MemoryPoint, ...]:
        """Every change in order of time."""
        return tuple(self._points or ())
