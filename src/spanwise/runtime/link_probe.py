"""Measures a link by small and large messages, there and back."""

from __future__ import annotations

import time

import torch

from spanwise.core.errors import PeerError
from spanwise.runtime.transport import Transport

PROBE_SIZES = (1_000, 1_000, 1_000, 1_000, 1_000, 1_000_000, 1_000_000, 1_000_000)
_TAG = 2**27 - 1000  # above the tags of training steps (``tags.py``)
TIMEOUT_S = 30.0


def probe_link(
    transport: Transport,
    peer: str,
    *,
    first: bool,
    sizes: tuple[int, ...] = PROBE_SIZES,
    timeout_s: float = TIMEOUT_S,
) -> list[tuple[int, float]]:
    """(bytes, seconds) of messages from the first device to the second, answered by one byte.

    A round trip holds one latency each way; the caller takes half of the small ones as latency. The
    second device returns an empty list.

    Raises:
        PeerError: nothing came within ``timeout_s``, or the peer is gone.
    """
    try:
        return _probed(transport, peer, first, sizes, timeout_s)
    except PeerError as error:
        raise PeerError(
            f"probe of the link with '{peer}': {error}; if nothing gets through there, take the link or the "
            "device out of the cluster file",
            device=error.device,
        ) from None


def _probed(
    transport: Transport, peer: str, first: bool, sizes: tuple[int, ...], timeout_s: float
) -> list[tuple[int, float]]:
    samples: list[tuple[int, float]] = []
    answer = torch.zeros(1, dtype=torch.uint8)
    for index, size in enumerate(sizes):
        message = torch.zeros(size, dtype=torch.uint8)
        tag = _TAG + 2 * index
        if first:
            start = time.monotonic()
            reply = transport.recv(peer, tag + 1, [answer])
            transport.send(peer, tag, [message]).wait(timeout_s)
            reply.wait(timeout_s)
            samples.append((size, time.monotonic() - start))
        else:
            transport.recv(peer, tag, [message]).wait(timeout_s)
            transport.send(peer, tag + 1, [answer]).wait(timeout_s)
    return samples
