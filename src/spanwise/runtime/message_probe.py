"""What a message costs a device's processor, at either end: threads that wake, system calls, copies."""

from __future__ import annotations

import time

import torch

from spanwise.runtime.outbox import Outbox
from spanwise.runtime.transport import Transport

_TAG = 2**27 - 100_000  # far above the tags of training steps, below those of the link probe
_COUNT = 20
# About the least and the most that a few rows of activations have; thin links must carry them soon, too.
_BYTES = (16 * 1024, 256 * 1024)
_SWEEP_BYTES = 16 * 2**20  # what compute does to the caches between two messages
_TIMEOUT_S = 60.0


def message_cpu_s(transport: Transport, before: str, after: str) -> tuple[float, float]:
    """Processor seconds of sending or of receiving one message as the executor does it: each, and per byte.

    All devices stand in a ring and each sends to the next and receives from the one before, with some compute
    between two messages, as in training. What the compute itself takes is left out.
    """
    small, large = _BYTES
    small_s = _one_size_s(transport, before, after, small, _TAG)
    large_s = _one_size_s(transport, before, after, large, _TAG + _COUNT)
    byte_s = max(0.0, large_s - small_s) / (large - small)
    return max(0.0, small_s - small * byte_s), byte_s


def _one_size_s(transport: Transport, before: str, after: str, nbytes: int, tag: int) -> float:
    outbox = Outbox("probe", _TIMEOUT_S)
    values = torch.ones(_SWEEP_BYTES // 4)
    message, buffer = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    swept_s, start = 0.0, time.process_time()
    for index in range(_COUNT):
        arriving = transport.recv(before, tag + index, [buffer])
        began = time.thread_time()
        values.mul_(1.0)
        swept_s += time.thread_time() - began
        outbox.put("message probe", transport.send(after, tag + index, [message]))
        arriving.wait(_TIMEOUT_S)
    outbox.drain()
    used_s = time.process_time() - start - swept_s
    outbox.close()
    return max(0.0, used_s) / (2 * _COUNT)
