"""What a message costs a device's processor, at either end: threads that wake, system calls, copies."""

from __future__ import annotations

import time

import torch

from spanwise.runtime.outbox import Outbox
from spanwise.runtime.transport import Transport

_TAG = 2**27 - 100_000  # far above the tags of training steps, below those of the link probe
_COUNT = 40
_BYTES = 128 * 1024  # about an activation of a few rows
_SWEEP_BYTES = 16 * 2**20  # what compute does to the caches between two messages
_TIMEOUT_S = 60.0


def message_cpu_s(transport: Transport, before: str, after: str) -> float:
    """Processor seconds of sending or of receiving one message, as the executor does it.

    All devices stand in a ring and each sends to the next and receives from the one before, with some compute
    between two messages, as in training. What the compute itself takes is left out.
    """
    outbox = Outbox("probe", _TIMEOUT_S)
    values = torch.ones(_SWEEP_BYTES // 4)
    message, buffer = torch.zeros(_BYTES, dtype=torch.uint8), torch.zeros(_BYTES, dtype=torch.uint8)
    swept_s, start = 0.0, time.process_time()
    for index in range(_COUNT):
        arriving = transport.recv(before, _TAG + index, [buffer])
        began = time.thread_time()
        values.mul_(1.0)
        swept_s += time.thread_time() - began
        outbox.put("message probe", transport.send(after, _TAG + index, [message]))
        arriving.wait(_TIMEOUT_S)
    outbox.drain()
    used_s = time.process_time() - start - swept_s
    outbox.close()
    return max(0.0, used_s) / (2 * _COUNT)
