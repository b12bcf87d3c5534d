"""Transport between threads of one process: a mailbox that all devices share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from spanwise.core.errors import PeerError
from spanwise.runtime.transport import Tensors

_Key = tuple[str, str, int]  # source, target, tag


@dataclass
class LocalFabric:
    """The mailbox. ``fail`` ends every transfer that is under way or comes later."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    mail: dict[_Key, list[Tensor]] = field(default_factory=dict[_Key, list[Tensor]])
    failure: str | None = None

    def transport(self, device: str) -> LocalTransport:
        """The end that belongs to one device."""
        return LocalTransport(self, device)

    def fail(self, reason: str) -> None:
        """Wakes everybody who waits, with a ``PeerError`` of this reason."""
        with self.changed:
            self.failure = self.failure or reason
            self.changed.notify_all()

    def wait_for(self, ready: Callable[[], bool], timeout_s: float, what: str, peer: str) -> None:
        """Waits, with ``changed`` held, until ``ready()``; ``PeerError`` on failure or timeout."""
        end = time.monotonic() + timeout_s
        while not ready():
            if self.failure is not None:
                raise PeerError(self.failure)
            left = end - time.monotonic()
            if left <= 0:
                raise PeerError(f"{what} '{peer}': nothing within {timeout_s:g} s", device=peer)
            self.changed.wait(left)


@dataclass(frozen=True)
class _Sent:
    def wait(self, timeout_s: float) -> None:  # noqa: ARG002 - the mailbox took a copy at once
        return


@dataclass(frozen=True)
class _Receipt:
    fabric: LocalFabric
    key: _Key
    buffers: Tensors

    def wait(self, timeout_s: float) -> None:
        with self.fabric.changed:
            self.fabric.wait_for(
                lambda: self.key in self.fabric.mail, timeout_s, "receiving from", self.key[0]
            )
            tensors = self.fabric.mail.pop(self.key)
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer.copy_(tensor)


@dataclass(frozen=True)
class LocalTransport:
    """One device's end of a ``LocalFabric``."""

    fabric: LocalFabric
    device: str

    def send(self, peer: str, tag: int, tensors: Tensors) -> _Sent:
        """Puts copies into the mailbox."""
        copies = [tensor.detach().clone() for tensor in tensors]
        with self.fabric.changed:
            if self.fabric.failure is not None:
                raise PeerError(self.fabric.failure)
            key = (self.device, peer, tag)
            if key in self.fabric.mail:
                raise PeerError(f"sending to '{peer}': tag {tag} is still in use", device=peer)
            self.fabric.mail[key] = copies
            self.fabric.changed.notify_all()
        return _Sent()

    def recv(self, peer: str, tag: int, buffers: Tensors) -> _Receipt:
        """Waits for the peer's copies when asked to."""
        return _Receipt(self.fabric, (peer, self.device, tag), buffers)

    def close(self) -> None:
        """Nothing to free."""
