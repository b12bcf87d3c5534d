"""The one seam between executor and network: asynchronous sends, receives posted ahead, deadlines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

Tensors = Sequence[Tensor]


class Pending(Protocol):
    """A transfer under way."""

    def wait(self, timeout_s: float) -> None:
        """Returns when it is done. ``PeerError`` when the peer is gone or ``timeout_s`` has passed."""
        ...


class Transport(Protocol):
    """Moves tensors between this device and its peers.

    Both ends must use the same tag and the same shapes, in the same order. A tag may be used again once
    the transfer that used it is done on both ends.
    """

    def send(self, peer: str, tag: int, tensors: Tensors) -> Pending:
        """Starts to send and returns at once. The tensors must stay unchanged until it is done."""
        ...

    def recv(self, peer: str, tag: int, buffers: Tensors) -> Pending:
        """Starts to receive into ``buffers`` (contiguous) and returns at once."""
        ...

    def close(self) -> None:
        """Frees what it holds; pending transfers fail."""
        ...
