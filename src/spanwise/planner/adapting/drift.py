"""What seems to have moved: that something has, and each device or pair of sites that may be it."""

from __future__ import annotations

from dataclasses import dataclass

from spanwise.core.profile import DeviceTimes, LinkTimes


@dataclass(frozen=True)
class Drift:
    """Something has moved for good: whether far, and whether a device or link, not the step time alone.

    ``leap``: one step says so, and only if what leapt in it explains how long it took.
    """

    big: bool
    conditions: bool
    leap: bool = False


@dataclass(frozen=True)
class Cause:
    """A device, or the links between two sites, with the numbers that it seems to have now.

    ``sure``: whether it needs no step time to bear it out. ``far``: how far it has moved, the logarithm of
    the largest ratio, unsigned. ``turned``: whether it has done so in the newest steps, ``leapt``: in the
    newest one and alike in all that is seen of it.
    """

    devices: tuple[DeviceTimes, ...]
    links: tuple[LinkTimes, ...]
    sure: bool
    far: float
    turned: bool = False
    leapt: bool = False
