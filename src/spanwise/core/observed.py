"""What devices tell of a step besides its loss: seconds of compute, when messages left and when they came."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from spanwise.core.errors import PeerError

MOST_LARGE = 32  # messages reported of each link and step
MOST_SMALL = 16  # of less than half the size of the largest, besides
MOST_ENTRIES = 4096  # accepted of one device and step


@dataclass(frozen=True, slots=True)
class ComputeTime:
    """Mean seconds of one kind of compute of a stage over the micro-batches of the step.

    The mean, as it stands for the sum: a CPU quota comes in portions, so that single actions take no time at
    all or a whole period.
    """

    kind: str
    stage: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Departure:
    """A message was handed to the link. ``tag`` is the same at both ends."""

    peer: str
    tag: int
    nbytes: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message had come by ``at_s``; exactly then if the device ``waited`` for it, else earlier."""

    peer: str
    tag: int
    at_s: float
    waited: bool


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """One device in one step; a few numbers for each stage and link. Times are ``time.monotonic`` seconds."""

    device: str
    compute: tuple[ComputeTime, ...] = ()
    sent: tuple[Departure, ...] = ()
    received: tuple[Arrival, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """For the control channel."""
        return {
            "compute": [[c.kind, c.stage, c.seconds] for c in self.compute],
            "sent": [[d.peer, d.tag, d.nbytes, d.at_s] for d in self.sent],
            "received": [[a.peer, a.tag, a.at_s, a.waited] for a in self.received],
        }

    @classmethod
    def parse(cls, device: str, data: Any, shift_s: float = 0.0) -> DeviceStep:
        """What ``to_data`` gave, on a clock that is ``shift_s`` behind that of the device.

        Raises:
            PeerError: it is not that, or longer than any step's.
        """
        try:
            compute, sent, received = (_entries(data[key]) for key in ("compute", "sent", "received"))
            if len(compute) + len(sent) + len(received) > MOST_ENTRIES:
                raise ValueError(f"more than {MOST_ENTRIES} entries")
            return cls(
                device,
                tuple(ComputeTime(str(k), int(s), _finite(t)) for k, s, t in compute),
                tuple(Departure(str(p), int(g), int(n), _finite(t) - shift_s) for p, g, n, t in sent),
                tuple(Arrival(str(p), int(g), _finite(t) - shift_s, bool(w)) for p, g, t, w in received),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PeerError(
                f"device '{device}': sent times of a step that cannot be read ({error})", device=device
            ) from None


def noted(sizes: Iterable[tuple[int, int]]) -> frozenset[int]:
    """Which of the (tag, bytes) of a link and step are reported: the same choice at both ends.

    Large ones, as small ones tell no rate; the first by tag. Beside them small ones, as only sizes that
    differ tell an overhead from a rate: one of every size, up to a factor of two, before a second of any.
    """
    found = sorted(sizes)
    least = least_large(nbytes for _, nbytes in found)
    large = [tag for tag, nbytes in found if nbytes >= least]
    alike: Counter[int] = Counter()
    small: list[tuple[int, int, int]] = []
    for tag, nbytes in found:
        if nbytes < least:
            small.append((alike[nbytes.bit_length()], -nbytes, tag))
            alike[nbytes.bit_length()] += 1
    return frozenset([*large[:MOST_LARGE], *(tag for _, _, tag in sorted(small)[:MOST_SMALL])])


def least_large(sizes: Iterable[float]) -> float:
    """From how many bytes on messages of a link and step are large: half the size of the largest."""
    return max(sizes, default=0) / 2


def _entries(value: Any) -> list[list[Any]]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return cast("list[list[Any]]", value)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("a time that is not finite")
    return number
