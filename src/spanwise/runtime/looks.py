"""Links measured while steps go on, by threads beside them."""

from __future__ import annotations

import contextlib
import threading

from spanwise.core.errors import PeerError
from spanwise.runtime.control import Channel, Frame
from spanwise.runtime.link_probe import probe_link
from spanwise.runtime.transport import Transport


class Looks:
    """A device's part in such measurements: a thread each, as none may wait for another."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def add(self, transport: Transport, frame: Frame) -> None:
        """Measures at once; the answer goes to the coordinator."""
        threading.Thread(target=self.carry_out, args=(transport, frame), name="look", daemon=True).start()

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
