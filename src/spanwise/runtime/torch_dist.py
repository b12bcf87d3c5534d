"""Transport on ``torch.distributed``: gloo between CPUs, NCCL where every member has its own GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor

from spanwise.core.cluster import Device
from spanwise.core.errors import PeerError, ResourceError
from spanwise.runtime.packing import empty_packed, packed, unpack, worth_packing
from spanwise.runtime.transport import Tensors

MAX_TENSORS = 8  # tensors of one transfer; each has a tag of its own
Store: TypeAlias = dist.Store  # pyright: ignore[reportPrivateImportUsage]
_TAGS = 2**31  # gloo's tags are 32 bits wide, signed in Python's binding


def backend_for(devices: Sequence[Device]) -> str:
    """``nccl`` when every member has a GPU of its own, else ``gloo``."""
    gpus = [(d.address, d.torch_device) for d in devices if d.torch_device.startswith("cuda")]
    own = len(gpus) == len(devices) == len(set(gpus))
    return "nccl" if own and dist.is_nccl_available() else "gloo"


class KeyValueStore(Store):
    """A store over any channel that can set and get bytes.

    ``TCPStore`` listens on every interface and lets anybody in; this one lets process groups meet over
    the coordinator's authenticated connection, so that no further port is opened.
    """

    def __init__(
        self, put: Callable[[str, bytes], None], fetch: Callable[[str, float], bytes], timeout_s: float
    ) -> None:
        super().__init__()
        self._put, self._fetch, self._timeout_s = put, fetch, timeout_s

    def set(self, key: str, value: str | bytes) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Publishes a value."""
        self._put(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Waits for a value."""
        return self._fetch(key, self._timeout_s)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # pyright: ignore
        """Waits for several values."""
        seconds = self._timeout_s if timeout is None else timeout.total_seconds()
        for key in keys:
            self._fetch(key, seconds)

    def set_timeout(self, timeout: timedelta) -> None:  # pyright: ignore
        """How long ``get`` waits."""
        self._timeout_s = timeout.total_seconds()


@dataclass(frozen=True)
class _Works:
    """Several works of one transfer; keeps the tensors alive until they are done.

    ``targets`` are where the one message belongs that arrived in place of several.
    """

    peer: str
    what: str
    works: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    targets: tuple[Tensor, ...] = ()

    def wait(self, timeout_s: float) -> None:
        try:
            for work in self.works:
                work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            late = "Timed out" in reason
            detail = f"nothing within {timeout_s:g} s" if late else "the connection broke"
            raise PeerError(f"{self.what} '{self.peer}': {detail}", device=self.peer) from None
        if self.targets:
            unpack(self.tensors[0], self.targets)


class DistTransport:
    """A process group of its own, not torch's global one: several may live, one after the other."""

    def __init__(
        self,
        store: Store,
        device: str,
        members: Sequence[str],
        *,
        backend: str = "gloo",
        address: str = "127.0.0.1",
        timeout_s: float = 60.0,
    ) -> None:
        self.device = device
        self._rank = {member: rank for rank, member in enumerate(members)}
        self._lock = threading.Lock()
        self._group = _group(store, self._rank[device], len(members), backend, address, timeout_s)

    def send(self, peer: str, tag: int, tensors: Tensors) -> _Works:
        """Posts one message a tensor, or one for all where that costs less."""
        kept = tuple(t.detach() if t.is_contiguous() else t.detach().contiguous() for t in tensors)
        messages = (packed(kept),) if worth_packing(kept) else kept
        return self._post("send", "sending to", peer, tag, messages)

    def recv(self, peer: str, tag: int, buffers: Tensors) -> _Works:
        """Posts one receive a message: a tensor's straight into its buffer."""
        kept = tuple(buffers)
        if worth_packing(kept):
            return self._post("recv", "receiving from", peer, tag, (empty_packed(kept),), kept)
        return self._post("recv", "receiving from", peer, tag, kept)

    def close(self) -> None:
        """Drops the connections."""
        self._group = None

    def _post(
        self, verb: str, what: str, peer: str, tag: int, kept: tuple[Tensor, ...],
        targets: tuple[Tensor, ...] = (),
    ) -> _Works:  # fmt: skip
        if len(kept) > MAX_TENSORS:
            raise PeerError(f"{what} '{peer}': {len(kept)} tensors in one transfer, at most {MAX_TENSORS}")
        works: list[Any] = []
        if self._group is None:
            raise PeerError(f"{what} '{peer}': this transport is closed", device=peer)
        try:
            post = getattr(self._group, verb)
            with self._lock:
                for index, tensor in enumerate(kept):
                    works.append(post([tensor], self._rank[peer], (tag * MAX_TENSORS + index) % _TAGS))
        except RuntimeError:
            raise PeerError(f"{what} '{peer}': the connection broke", device=peer) from None
        return _Works(peer, what, tuple(works), kept, targets)


def _group(store: Store, rank: int, size: int, backend: str, address: str, timeout_s: float) -> Any:
    timeout = timedelta(seconds=timeout_s)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    try:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout = timeout
        return gloo(store, rank, size, options)
    except RuntimeError as error:
        raise ResourceError(
            f"device address '{address}': gloo cannot meet the {size - 1} other devices there "
            f"({str(error).splitlines()[0][:200]}); set the device's address in the cluster file"
        ) from None
