"""Watches over sends under way, so that compute never waits for one."""

from __future__ import annotations

import queue
import threading

from spanwise.core.errors import PeerError
from spanwise.runtime.transport import Pending


class Outbox:
    """Waits for sends in a thread of its own and frees their tensors as soon as they are done.

    A failed send is raised by the next ``put`` or ``drain``.
    """

    def __init__(self, device: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._queue: queue.SimpleQueue[tuple[str, Pending] | None] = queue.SimpleQueue()
        self._left = 0
        self._changed = threading.Condition()
        self._error: PeerError | None = None
        self._thread = threading.Thread(target=self._run, name=f"outbox-{device}", daemon=True)
        self._thread.start()

    def put(self, what: str, pending: Pending) -> None:
        """Takes over a send; ``what`` stands in front of its error."""
        with self._changed:
            self._raise()
            self._left += 1
        self._queue.put((what, pending))

    def drain(self) -> None:
        """Returns when every send is done."""
        with self._changed:
            while self._left and self._error is None:
                self._changed.wait()
            self._raise()

    def close(self) -> None:
        """Ends the thread once the sends before are done or failed."""
        self._queue.put(None)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            what, pending = entry
            error: PeerError | None = None
            try:
                pending.wait(self._timeout_s)
            except PeerError as failure:
                error = PeerError(f"{what}: {failure}", device=failure.device)
            del pending, entry
            with self._changed:
                self._left -= 1
                self._error = self._error or error
                self._changed.notify_all()
