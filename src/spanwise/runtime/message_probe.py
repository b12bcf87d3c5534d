"""What a message costs a device's processor, at either end: threads that wake, system calls, copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from spanwise.runtime.outbox import Outbox
from spanwise.runtime.transport import Transport

_TAG = 2**27 - 100_000  # above the tags of training steps (``tags.py``), below those of the link probe
_COUNT = 20
# About the least and the most that a few rows of activations have; thin links must carry them soon, too.
_BYTES = (16 * 1024, 256 * 1024)
_PAUSE_S = 5e-3  # a device of a pipeline waits for most of its messages
_SWEEP_BYTES = 16 * 2**20  # more than a core's own caches hold
_TIMEOUT_S = 60.0


def message_cpu_s(transport: Transport, before: str, after: str) -> tuple[float, float]:
    """Processor seconds of sending or of receiving one message as the executor does it: each, and per byte.

    All devices stand in a ring and each sends to the next and receives from the one before, with a pause and
    some compute between two messages, as in training. What the compute itself takes is left out.
    """
    small, large = _BYTES
    small_s = _one_size_s(transport, before, after, small, _TAG)
    large_s = _one_size_s(transport, before, after, large, _TAG + _COUNT)
    byte_s = max(0.0, large_s - small_s) / (large - small)
    return max(0.0, small_s - small * byte_s), byte_s


def _one_size_s(transport: Transport, before: str, after: str, nbytes: int, tag: int) -> float:
    outbox = Outbox("probe", _TIMEOUT_S)
    compute = _compute()
    message, buffer = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    swept_s, start = 0.0, time.process_time()
    for index in range(_COUNT):
        time.sleep(_PAUSE_S)
        arriving = transport.recv(before, tag + index, [buffer])
        began = time.thread_time()
        compute()
        swept_s += time.thread_time() - began
        outbox.put("message probe", transport.send(after, tag + index, [message]))
        arriving.wait(_TIMEOUT_S)
    outbox.drain()
    used_s = time.process_time() - start - swept_s
    outbox.close()
    return max(0.0, used_s) / (2 * _COUNT)


def _compute() -> Callable[[], None]:
    """Forward and backward of a small net of many kinds of layers, and a pass over much memory.

    It is there for what it leaves behind: caches that hold neither the code nor the data of messages. With
    one kernel between them, messages cost less than half of what they cost in training (measured on gloo).
    """
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.BatchNorm2d(32), nn.ReLU6(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 1), nn.GELU(), nn.AvgPool2d(4), nn.Flatten(),
        nn.Linear(256, 512), nn.LayerNorm(512), nn.Linear(512, 64), nn.Softmax(-1),
    )  # fmt: skip
    rows, memory = torch.ones(4, 3, 16, 16), torch.ones(_SWEEP_BYTES // 4)

    def compute() -> None:
        net(rows).square().sum().backward()
        memory.mul_(1.0)

    return compute
