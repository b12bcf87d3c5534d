"""When a packet leaves a chain of metered pipes, or that it does not. Pure, so that it can be tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

QUEUE_S = 0.03  # a pipe's queue holds what it carries in this time, and a round trip's worth ...
LEAST_QUEUE_BYTES = 128 * 1024  # ... and never less than two of the largest packets


@dataclass(slots=True)
class Pipe:
    """One capacity: bytes leave in order at its rate; what does not fit the queue is dropped."""

    bytes_per_s: float
    queue_bytes: float = LEAST_QUEUE_BYTES
    free_at_s: float = 0.0
    sent_bytes: int = 0
    dropped: int = 0


def queue_bytes(bytes_per_s: float, latency_s: float) -> float:
    """Bytes that a pipe's queue holds."""
    return max(LEAST_QUEUE_BYTES, bytes_per_s * (QUEUE_S + 2 * latency_s))


def departure(pipes: Sequence[Pipe], nbytes: int, now_s: float) -> float | None:
    """When the last byte has passed all pipes, one behind the other; none if a queue is full.

    Bits of one packet flow through all pipes at once, so a packet takes the time of the slowest, not the sum.
    """
    for pipe in pipes:
        if (pipe.free_at_s - now_s) * pipe.bytes_per_s > pipe.queue_bytes:
            pipe.dropped += 1
            return None
    at = now_s
    for pipe in pipes:
        pipe.free_at_s = max(pipe.free_at_s, now_s) + nbytes / pipe.bytes_per_s
        pipe.sent_bytes += nbytes
        at = max(at, pipe.free_at_s)
    return at
