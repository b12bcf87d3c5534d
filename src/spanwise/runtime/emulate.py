"""Portable emulation, no root needed: compute is slowed and messages are paced to the cluster's numbers.

Devices of an emulated cluster are processes (or threads) of one machine. Compute: after an action that takes
``c`` seconds on the undisturbed machine, the device rests until ``c / (speed * core_share)`` seconds have
passed.
Messages: each is sent in quanta; a quantum books time on every capacity that its route shares, in a ledger
that all processes map, so concurrent messages share links as they would on the wire. The message is handed on
when its last quantum has passed, plus the latency.
"""

from __future__ import annotations

import fcntl
import heapq
import mmap
import os
import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

from spanwise.core.cluster import Cluster, Route
from spanwise.core.errors import PeerError
from spanwise.runtime.transport import Pending, Tensors, Transport

_SLOT = struct.Struct("d")
_QUANTUM_S = 2e-3  # short enough to share a link fairly, long enough for the pacer's thread
_SMALLEST_QUANTUM = 4096


class Ledger:
    """Until when each shared capacity of the emulated network is booked, in ``time.monotonic`` seconds.

    A small file that all processes map; a lock on it makes bookings atomic.
    """

    def __init__(self, path: Path, cluster: Cluster) -> None:
        names = sorted(
            {
                name
                for a in cluster.ids
                for b in cluster.ids
                if a != b and cluster.connected(a, b)
                for name, _ in cluster.route(a, b).resources
            }
        )
        self._slot = {name: index * _SLOT.size for index, name in enumerate(names)}
        size = max(len(names), 1) * _SLOT.size
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if os.fstat(self._file).st_size < size:
            os.ftruncate(self._file, size)
        self._map = mmap.mmap(self._file, size)
        self._threads = threading.Lock()  # flock does not keep threads of one process apart

    def book(self, route: Route, nbytes: float, not_before: float) -> float:
        """Books ``nbytes`` on every capacity of the route; returns when the last of them has passed."""
        end = not_before
        with self._threads:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                for name, rate in route.resources:
                    at = self._slot[name]
                    (free,) = _SLOT.unpack_from(self._map, at)
                    until = max(free, not_before) + nbytes / rate
                    _SLOT.pack_into(self._map, at, until)
                    end = max(end, until)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        return end

    def close(self) -> None:
        """Unmaps the file; the owner of its folder removes it."""
        self._map.close()
        os.close(self._file)


def ledger_path() -> Path:
    """A fresh file for the ledger of one emulated cluster."""
    handle, name = tempfile.mkstemp(prefix="spanwise-ledger-")
    os.close(handle)
    return Path(name)


Work = tuple[str, int]  # kind of action and stage


class Throttle:
    """Makes compute take as long as on a device of ``share`` of this machine's core.

    An action is due to end when ``undisturbed seconds / share`` have passed. What it takes undisturbed was
    measured by the device itself at set-up (``calibrate``), with the other devices at rest: caches that
    neighbours share and wake-ups after a rest make the same work 10 to 30 % dearer on this machine, which
    the emulated device has nothing to do with. Work without such a measurement counts by processor time.
    What the machine was late with is made up for while the device has work without a break. ``slowdown`` is
    the factor of a fault, and may change between steps.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.slowdown = 1.0
        self.undisturbed_s: Mapping[Work, float] = {}
        self._owed_until = 0.0  # when the device is free in its own, undisturbed time
        self._start = 0.0
        self._cpu = 0.0
        self._work: Work = ("", -1)

    def work(self, kind: str, stage: int) -> Throttle:
        """A context in which this kind of work is done."""
        self._work = (kind, stage)
        return self

    def idle(self) -> None:
        """The device had to wait: lateness before the wait is no longer made up for."""
        self._owed_until = 0.0

    def __enter__(self) -> None:
        now = time.monotonic()
        self._start = min(now, self._owed_until) if self._owed_until else now
        self._cpu = time.thread_time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        seconds = self.undisturbed_s.get(self._work)
        if seconds is None:
            seconds = time.thread_time() - self._cpu
        self._owed_until = self._start + seconds * self.slowdown / self.share
        rest = self._owed_until - time.monotonic()
        if rest > 0:
            time.sleep(rest)


class Unthrottled:
    """A real device: compute takes as long as it takes."""

    def work(self, kind: str, stage: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """Nothing around the work."""
        return nullcontext()

    def idle(self) -> None:
        """Nothing to forget."""


class _Paced:
    """A message on its way through the emulated network, then through the real transport."""

    def __init__(self, peer: str, tensors: Tensors, forward: Callable[[], Pending]) -> None:
        self.peer, self.tensors = peer, tensors
        self.left = sum(t.numel() * t.element_size() for t in tensors)
        self.forward = forward
        self.started = self.passed = 0.0
        self.inner: Pending | None = None
        self.error: BaseException | None = None
        self.handed_on = threading.Event()

    def wait(self, timeout_s: float) -> None:
        if not self.handed_on.wait(timeout_s):
            raise PeerError(f"sending to '{self.peer}': not sent within {timeout_s:g} s", device=self.peer)
        if self.error is not None:
            raise self.error
        assert self.inner is not None
        self.inner.wait(timeout_s)


OnPassed = Callable[[str, float, float, int], None]


class PacedTransport:
    """Wraps a Transport: sends leave at the pace of the emulated links, receives are untouched.

    Messages to one peer are transmitted one after the other, those to different peers at once. One thread
    does it all, woken when a quantum ends or a latency has passed.
    """

    def __init__(self, inner: Transport, device: str, cluster: Cluster, ledger: Ledger) -> None:
        self._inner, self._device, self._ledger = inner, device, ledger
        self._routes = {
            peer: cluster.route(device, peer)
            for peer in cluster.ids
            if peer != device and cluster.connected(device, peer)
        }
        self._queues: dict[str, deque[_Paced]] = {peer: deque() for peer in self._routes}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0
        self._wake = threading.Condition()
        self._open = True
        self.on_passed: OnPassed | None = None
        self.stretch: Mapping[str, float] = {}  # factor of a fault on bytes and latency, by peer
        self._thread = threading.Thread(target=self._run, name=f"pacer-{device}", daemon=True)
        self._thread.start()

    def send(self, peer: str, tag: int, tensors: Tensors) -> _Paced:
        """Queues the message on the emulated link to the peer."""
        if peer not in self._routes:
            raise PeerError(f"sending to '{peer}': the cluster has no link {self._device} -> {peer}")
        message = _Paced(peer, tensors, lambda: self._inner.send(peer, tag, tensors))
        with self._wake:
            queue = self._queues[peer]
            queue.append(message)
            if len(queue) == 1:
                self._at(time.monotonic(), lambda at: self._transmit(peer, at))
        return message

    def recv(self, peer: str, tag: int, buffers: Tensors) -> Pending:
        """Straight through."""
        return self._inner.recv(peer, tag, buffers)

    def close(self) -> None:
        """Stops the thread and closes the wrapped transport."""
        with self._wake:
            self._open = False
            self._wake.notify()
        self._thread.join(5.0)
        self._inner.close()

    def _at(self, when: float, call: Callable[[float], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, call))
        self._wake.notify()

    def _run(self) -> None:
        with self._wake:
            while self._open:
                if not self._events:
                    self._wake.wait()
                    continue
                when, _, call = self._events[0]
                wait = when - time.monotonic()
                if wait > 0:
                    self._wake.wait(wait)
                    continue
                heapq.heappop(self._events)
                call(when)

    def _transmit(self, peer: str, at: float) -> None:
        """Books the next quantum of the first message to this peer; ``at`` is due time, not wake-up time."""
        queue, route = self._queues[peer], self._routes[peer]
        message = queue[0]
        if not message.started:
            message.started = at
        quantum = min(message.left, max(_SMALLEST_QUANTUM, int(route.bandwidth_bytes_per_s * _QUANTUM_S)))
        stretch = self.stretch.get(peer, 1.0)
        end = self._ledger.book(route, quantum * stretch, at)
        message.left -= quantum
        if message.left > 0:
            self._at(end, lambda when: self._transmit(peer, when))
            return
        message.passed = end
        self._at(end, lambda when: self._next(peer, when))
        self._at(end + route.latency_s * stretch, lambda _: self._hand_on(message))

    def _next(self, peer: str, at: float) -> None:
        message = self._queues[peer].popleft()
        if self.on_passed is not None:
            nbytes = sum(t.numel() * t.element_size() for t in message.tensors)
            self.on_passed(peer, message.started, message.passed, nbytes)
        if self._queues[peer]:
            self._at(at, lambda when: self._transmit(peer, when))

    def _hand_on(self, message: _Paced) -> None:
        try:
            message.inner = message.forward()
        except PeerError as error:
            message.error = error
        message.handed_on.set()
