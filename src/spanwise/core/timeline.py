"""Spans of time on device and link lanes: simulated or measured, in one shape."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from spanwise.core.noun import Noun

Origin = Literal["simulated", "measured"]


class Span(Noun):
    """What a lane did from ``start_s`` to ``end_s``, counted from the start of the timeline.

    A lane is a device id (compute) or ``a>b`` (the messages from a to b). ``action`` is the text of the
    Action; the kind ``wait`` marks time in which a device waited for the action that follows.
    """

    lane: str
    kind: str
    action: str
    start_s: float
    end_s: float
    step: int = 0

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end_s - self.start_s


class MemoryPoint(Noun):
    """Tensor bytes of a device from ``at_s`` on."""

    device: str
    at_s: float
    bytes: int


class DeviceUse(Noun):
    """One device over the timeline: busy seconds a step, peak bytes, bytes sent a step."""

    device: str
    busy_s: float = Field(ge=0)
    utilization: float = Field(ge=0)
    peak_memory_bytes: int = Field(ge=0)
    sent_bytes: int = Field(ge=0)


class Timeline(Noun):
    """Where the time of training steps went.

    ``step_time_s`` is that of one step in steady state: for a simulation the distance between the ends of two
    consecutive steps, for a measurement the median of it.
    """

    origin: Origin
    step_time_s: float = Field(ge=0)
    spans: tuple[Span, ...] = ()
    memory: tuple[MemoryPoint, ...] = ()
    devices: tuple[DeviceUse, ...] = ()

    def device(self, device_id: str) -> DeviceUse:
        """Use of one device; zeros if it took no part."""
        for use in self.devices:
            if use.device == device_id:
                return use
        return DeviceUse(device=device_id, busy_s=0, utilization=0, peak_memory_bytes=0, sent_bytes=0)
