"""Links measured while steps go on, by a thread beside them."""

from __future__ import annotations

import contextlib
import queue
import threading

from spanwise.core.errors import PeerError
from spanwise.runtime.control import Channel, Frame
from spanwise.runtime.link_probe import probe_link
from spanwise.runtime.transport import Transport


class Looks:
    """A device's part in such measurements, one after the other in the order in which they were asked for.

    All devices are asked in the same order, so none waits for one that waits for it.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._due: queue.SimpleQueue[tuple[Transport, Frame]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, transport: Transport, frame: Frame) -> None:
        """Measures as soon as those before it are done; the answer goes to the coordinator."""
        self._due.put((transport, frame))
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="looks", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while True:
            self.carry_out(*self._due.get())

    def carry_out(self, transport: Transport, frame: Frame) -> None:
        """Measures now. If nothing gets through there is nothing to tell: steps will show what is broken."""
        head = frame.head
        samples: list[tuple[int, float]] = []
        with contextlib.suppress(PeerError):
            samples = probe_link(
                transport, str(head["peer"]), first=bool(head["first"]), sizes=tuple(head["sizes"]),
                turn=int(head["turn"]), timeout_s=float(head["timeout_s"]),
            )  # fmt: skip
        with contextlib.suppress(PeerError):  # the coordinator's end is noticed by the next read
            self._channel.send("looked", peer=head["peer"], samples=samples)
