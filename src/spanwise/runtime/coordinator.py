"""The coordinator's side of the control channel: who has joined, who is alive, requests and their answers."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from spanwise.core.errors import (
    CheckpointError,
    InputError,
    JoinError,
    PeerError,
    ResourceError,
    SpanwiseError,
    TrainingError,
)
from spanwise.runtime.control import HANDSHAKE_TIMEOUT_S, Channel, Frame, greet

_SILENT_S = 6.0  # a worker sends a heartbeat every second; survivors must end within 10 s
_ERRORS: dict[str, type[SpanwiseError]] = {
    kind.__name__: kind for kind in (CheckpointError, InputError, PeerError, ResourceError, TrainingError)
}


@dataclass
class _Member:
    device: str
    channel: Channel
    greeting: dict[str, Any]
    heard: float = field(default_factory=time.monotonic)
    clock_offset_s: float = 0.0
    fastest_s: float = float("inf")  # the fastest ping so far: its offset is off by half of that at most


class Coordinator:
    """Takes workers in at one listening socket. The first failure of any of them ends the run for all."""

    def __init__(
        self, server: socket.socket, token: str, devices: tuple[str, ...], versions: dict[str, str]
    ) -> None:
        self._token, self._devices, self._versions = token, devices, versions
        self._server = server
        self.host, self.port = self._server.getsockname()[:2]
        self._members: dict[str, _Member] = {}
        self._changed = threading.Condition()
        self._values: dict[str, bytes] = {}
        self._wanted: dict[str, list[Channel]] = {}
        self._failure: SpanwiseError | None = None
        self._refusals: list[str] = []
        self._closing = False
        self.events: queue.SimpleQueue[tuple[str, Frame]] = queue.SimpleQueue()
        for target in (self._accept, self._watch):
            threading.Thread(target=target, name=f"coordinator-{target.__name__}", daemon=True).start()

    def wait_for_all(self, timeout_s: float) -> None:
        """Returns when every device has joined; ``JoinError`` names those that have not."""
        end = time.monotonic() + timeout_s
        with self._changed:
            while missing := [d for d in self._devices if d not in self._members]:
                if self._failure is not None:
                    raise self._failure
                left = end - time.monotonic()
                if left <= 0:
                    refused = f"; refused: {'; '.join(self._refusals)}" if self._refusals else ""
                    raise JoinError(
                        f"workers: {', '.join(missing)} did not join {self.host}:{self.port} within "
                        f"{timeout_s:g} s; start 'spanwise worker' there{refused}"
                    )
                self._changed.wait(left)

    def greeting(self, device: str) -> dict[str, Any]:
        """What a worker said of itself when it joined."""
        return self._members[device].greeting

    def clock_offset_s(self, device: str) -> float:
        """Its monotonic clock minus ours, from the fastest of several pings."""
        return self._members[device].clock_offset_s

    def tell(self, device: str, kind: str, payload: bytes = b"", **head: Any) -> None:
        """Sends a request; its answer comes by ``gather`` or ``events``."""
        self._raise()
        self._members[device].channel.send(kind, payload, **head)

    def gather(self, kind: str, devices: Iterable[str], timeout_s: float) -> dict[str, Frame]:
        """One frame of this kind from each device; other frames are handed to ``on_event`` order kept."""
        waiting = set(devices)
        found: dict[str, Frame] = {}
        end = time.monotonic() + timeout_s
        while waiting:
            device, frame = self.next_event(
                end - time.monotonic(), f"'{kind}' from {', '.join(sorted(waiting))}"
            )
            if frame.kind == kind and device in waiting:
                waiting.discard(device)
                found[device] = frame
        return found

    def next_event(self, timeout_s: float, what: str) -> tuple[str, Frame]:
        """The next frame of any worker; raises the failure of the run as soon as there is one."""
        found = self.event_within(max(timeout_s, 0.0))
        if found is None:
            self._raise()
            raise PeerError(f"waiting for {what}: nothing within {timeout_s:.0f} s")
        return found

    def event_within(self, seconds: float) -> tuple[str, Frame] | None:
        """The same; none if nothing comes so soon."""
        try:
            device, frame = self.events.get(timeout=seconds)
        except queue.Empty:
            return None
        if frame.kind == "failure":
            self._raise()
        return device, frame

    def fail(self, error: SpanwiseError) -> None:
        """Ends the run: every worker is told the reason, every waiter gets the error."""
        with self._changed:
            if self._failure is not None or self._closing:
                return
            self._failure = error
            self._changed.notify_all()
            members = list(self._members.values())
        for member in members:
            try:
                member.channel.send("abort", reason=str(error), code=error.exit_code)
            except PeerError:
                continue
        self.events.put(("", Frame({"kind": "failure"})))

    def close(self) -> None:
        """Dismisses the workers and stops listening."""
        self._closing = True
        for member in self._members.values():
            try:
                member.channel.send("stop")
            except PeerError:
                continue
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def drop(self) -> None:
        """Closes the connections, after the workers have ended or have had their time."""
        for member in self._members.values():
            member.channel.close()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, str(address[0])), daemon=True).start()

    def _serve(self, connection: socket.socket, address: str) -> None:
        connection.settimeout(HANDSHAKE_TIMEOUT_S)
        channel = Channel(connection, address)
        try:
            hello = greet(channel, self._token, self._devices, self._versions)
            member = self._admit(channel, hello)
        except SpanwiseError as error:
            with self._changed:
                self._refusals.append(str(error))
            channel.close()
            return
        try:
            while True:
                frame = channel.receive()
                member.heard = time.monotonic()
                self._dispatch(member, frame)
        except PeerError:
            self.fail(
                PeerError(f"device '{member.device}' is lost: its connection ended", device=member.device)
            )

    def _admit(self, channel: Channel, hello: dict[str, Any]) -> _Member:
        device = str(hello["device"])
        channel.peer = device
        with self._changed:
            if device in self._members:
                reason = f"worker '{device}': this device has joined already; stop the other one"
                channel.send("abort", reason=reason, code=JoinError.exit_code)
                raise JoinError(reason)
            member = _Member(device, channel, hello)
            self._members[device] = member
            self._changed.notify_all()
        return member

    def _dispatch(self, member: _Member, frame: Frame) -> None:
        head = frame.head
        match frame.kind:
            case "heartbeat":
                member.channel.send("ping", stamp=time.monotonic())
            case "pong":
                sent, now = float(head["stamp"]), time.monotonic()
                if now - sent < member.fastest_s:
                    member.fastest_s = now - sent
                    member.clock_offset_s = float(head["clock"]) - (sent + now) / 2
            case "put":
                with self._changed:
                    self._values[head["key"]] = frame.payload
                    waiting = self._wanted.pop(head["key"], [])
                for channel in waiting:
                    channel.send("value", frame.payload, key=head["key"])
            case "get":
                with self._changed:
                    value = self._values.get(head["key"])
                    if value is None:
                        self._wanted.setdefault(head["key"], []).append(member.channel)
                if value is not None:
                    member.channel.send("value", value, key=head["key"])
            case "error":
                kind = _ERRORS.get(str(head.get("error")), PeerError)
                self.fail(kind(str(head.get("reason"))))
            case _:
                self.events.put((member.device, frame))

    def _watch(self) -> None:
        """Notices a worker whose connection stands but who is silent: stopped, hung, unplugged."""
        while not self._closing and self._failure is None:
            time.sleep(0.5)
            now = time.monotonic()
            with self._changed:
                members = list(self._members.values())
            for member in members:
                if now - member.heard > _SILENT_S:
                    reason = f"device '{member.device}' is lost: silent for {now - member.heard:.0f} s"
                    self.fail(PeerError(reason, device=member.device))
                    return
