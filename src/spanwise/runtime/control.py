"""The control channel: size-checked frames over TCP, and a handshake in which both sides prove the token.

A frame is two lengths, a JSON object and bytes (safetensors). Nothing is unpickled, nothing is read before
its length has been checked, and before the handshake only small frames are accepted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any, cast

from spanwise.core.errors import InputError, JoinError, PeerError, ResourceError

_LENGTHS = struct.Struct(">IQ")
_GREETING_BYTES = 4096
HEADER_BYTES = 256 * 2**20
PAYLOAD_BYTES = 64 * 2**30
HANDSHAKE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Frame:
    """One message."""

    head: dict[str, Any]
    payload: bytes = b""

    @property
    def kind(self) -> str:
        """What it is about."""
        return str(self.head.get("kind", ""))


class Channel:
    """Frames over a connected socket. Sending is safe from several threads, receiving is for one."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self.peer = peer
        self._socket = connection
        self._lock = threading.Lock()
        self._header_bytes, self._payload_bytes = _GREETING_BYTES, 0
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def open_up(self) -> None:
        """The handshake is done: larger frames may come, and there is no deadline between them."""
        self._header_bytes, self._payload_bytes = HEADER_BYTES, PAYLOAD_BYTES
        self._socket.settimeout(None)

    def send(self, kind: str, payload: bytes = b"", **head: Any) -> None:
        """Sends one frame; ``PeerError`` if the other side is gone."""
        text = json.dumps({"kind": kind, **head}).encode()
        try:
            with self._lock:
                self._socket.sendall(_LENGTHS.pack(len(text), len(payload)) + text)
                if payload:
                    self._socket.sendall(payload)
        except OSError:
            raise PeerError(f"{self.peer}: the control connection broke", device=self.peer) from None

    def receive(self) -> Frame:
        """The next frame; ``PeerError`` if the other side is gone or breaks the protocol."""
        size, more = _LENGTHS.unpack(self._read(_LENGTHS.size))
        if size > self._header_bytes or more > self._payload_bytes:
            raise PeerError(
                f"{self.peer}: a frame of {size} + {more} bytes, at most {self._header_bytes} + "
                f"{self._payload_bytes} are accepted here; the connection is closed",
                device=self.peer,
            )
        try:
            head = json.loads(self._read(size))
        except ValueError:
            raise PeerError(f"{self.peer}: sent a frame that is not JSON", device=self.peer) from None
        if not isinstance(head, dict):
            raise PeerError(f"{self.peer}: sent a frame that is not an object", device=self.peer)
        return Frame(cast("dict[str, Any]", head), self._read(more) if more else b"")

    def close(self) -> None:
        """Closes the connection; a thread that receives gets a ``PeerError``."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        while done < size:
            try:
                got = self._socket.recv_into(view[done:])
            except TimeoutError:
                raise PeerError(f"{self.peer}: silent during the handshake", device=self.peer) from None
            except OSError:
                got = 0
            if got == 0:
                raise PeerError(f"{self.peer}: the control connection ended", device=self.peer)
            done += got
        return bytes(data)


def parse_endpoint(text: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port``."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InputError(f"endpoint '{text}': write it as HOST:PORT, like 192.0.2.10:7000")
    return host.strip("[]"), int(port)


def listen(host: str, port: int) -> socket.socket:
    """Listens on exactly the address asked for; ``ResourceError`` if it is taken."""
    server: socket.socket | None = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(128)
    except OSError as error:
        if server is not None:
            server.close()
        raise ResourceError(
            f"listen on {host}:{port}: {error.strerror or error}; choose another port or 0 for a free one"
        ) from None
    return server


def greet(channel: Channel, token: str, known: tuple[str, ...], versions: dict[str, str]) -> dict[str, Any]:
    """Coordinator's half of the handshake; returns the worker's greeting.

    Raises:
        JoinError: wrong token, unknown device or another torch version. The worker is told why.
    """
    nonce = secrets.token_hex(16)
    channel.send("challenge", nonce=nonce)
    hello = channel.receive().head
    device = str(hello.get("device", ""))
    expected = _proof(token, "worker", nonce, device)
    reason = ""
    if not hmac.compare_digest(expected, str(hello.get("proof", ""))):
        reason = f"worker '{device}': wrong token; give it the token that train printed or --token-file"
    elif device not in known:
        reason = f"worker '{device}': not a device of this cluster; known: {', '.join(known)}"
    else:
        theirs = {name: str(hello.get("versions", {}).get(name)) for name in versions}
        for name, version in versions.items():
            if theirs[name] != version:
                reason = (
                    f"worker '{device}': runs {name} {theirs[name]}, the coordinator {version}; "
                    "install the same version on both"
                )
                break
    if reason:
        channel.send("refused", reason=reason)
        raise JoinError(reason)
    channel.send("welcome", proof=_proof(token, "coordinator", str(hello.get("nonce", "")), device))
    channel.open_up()
    return hello


def introduce(channel: Channel, token: str, device: str, greeting: dict[str, Any]) -> None:
    """Worker's half of the handshake; ``JoinError`` if either side fails to prove the token."""
    challenge = channel.receive()
    nonce = secrets.token_hex(16)
    proof = _proof(token, "worker", str(challenge.head.get("nonce", "")), device)
    channel.send("hello", device=device, nonce=nonce, proof=proof, **greeting)
    answer = channel.receive()
    if answer.kind == "refused":
        raise JoinError(str(answer.head.get("reason", "the coordinator refused")))
    expected = _proof(token, "coordinator", nonce, device)
    if not hmac.compare_digest(expected, str(answer.head.get("proof", ""))):
        raise JoinError(f"coordinator {channel.peer}: does not know the token; is this the right address?")
    channel.open_up()


def _proof(token: str, role: str, nonce: str, device: str) -> str:
    message = f"spanwise {role} {nonce} {device}".encode()
    return hmac.new(token.encode(), message, hashlib.sha256).hexdigest()
