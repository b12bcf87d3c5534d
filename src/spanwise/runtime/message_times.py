"""When messages leave and come, noted at the seam to the network: the same on threads, gloo and in a lab."""

from __future__ import annotations

import time
from dataclasses import dataclass

from spanwise.core.observed import Arrival, Departure, noted
from spanwise.runtime.transport import Pending, Tensors, Transport

_BLOCKED_S = 5e-5  # a wait shorter than this says only that the message had come before


@dataclass(frozen=True, slots=True)
class _Came:
    nbytes: int
    arrival: Arrival


class TimedTransport:
    """Wraps a Transport; ``taken`` gives what was noted since the last call.

    Only the receiver knows when a message came, and only if it had to wait for it: where nobody waits for a
    link, the link does not matter. The sender notes when the message was handed over; matched by tag, both
    tell how long the link had it. Nothing is added to the wire.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._sent: list[Departure] = []
        self._came: list[_Came] = []

    def send(self, peer: str, tag: int, tensors: Tensors) -> Pending:
        """Notes the time and sends."""
        self._sent.append(Departure(peer, tag, _bytes(tensors), time.monotonic()))
        return self._inner.send(peer, tag, tensors)

    def recv(self, peer: str, tag: int, buffers: Tensors) -> Pending:
        """Receives; the time is noted when somebody waits for it."""
        return _Noted(self._inner.recv(peer, tag, buffers), self._came, peer, tag, _bytes(buffers))

    def close(self) -> None:
        """Closes the wrapped transport."""
        self._inner.close()

    def taken(self) -> tuple[tuple[Departure, ...], tuple[Arrival, ...]]:
        """The noted messages of each link since the last call; see ``core.observed.noted``."""
        sent, self._sent = self._sent, []
        came, self._came = self._came, []
        out = _by_peer([(d.peer, d.tag, d.nbytes) for d in sent])
        into = _by_peer([(c.arrival.peer, c.arrival.tag, c.nbytes) for c in came])
        return (
            tuple(d for d in sent if d.tag in out[d.peer]),
            tuple(c.arrival for c in came if c.arrival.tag in into[c.arrival.peer]),
        )


@dataclass(frozen=True, slots=True)
class _Noted:
    inner: Pending
    came: list[_Came]
    peer: str
    tag: int
    nbytes: int

    def wait(self, timeout_s: float) -> None:
        start = time.monotonic()
        self.inner.wait(timeout_s)
        end = time.monotonic()
        self.came.append(_Came(self.nbytes, Arrival(self.peer, self.tag, end, end - start > _BLOCKED_S)))


def _by_peer(messages: list[tuple[str, int, int]]) -> dict[str, frozenset[int]]:
    sizes: dict[str, list[tuple[int, int]]] = {}
    for peer, tag, nbytes in messages:
        sizes.setdefault(peer, []).append((tag, nbytes))
    return {peer: noted(found) for peer, found in sizes.items()}


def _bytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
