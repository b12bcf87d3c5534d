"""The relay of a lab: one process that carries packets between sites, metered and delayed, and keeps the lab.

Run as ``python -m spanwise.lab.relay FOLDER [--watch]``. It holds a TUN interface in the namespace of every
site. A packet that it reads is looked up by its pair of addresses, metered by the pipes on its way, kept for
the latency and written to the interface of the site that it goes to. Packets come in one piece of up to
64 KiB, as the kernel's segmentation is left undone on the way (IFF_VNET_HDR).

With ``--watch`` the lab lives as long as standard input is open: when its owner ends, however it ends, the
relay removes the lab. Orders come as lines of JSON on a socket that only the owner's user can open.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spanwise.core.cluster import Cluster
from spanwise.core.errors import SpanwiseError
from spanwise.lab import state
from spanwise.lab.commands import inside
from spanwise.lab.layout import Layout
from spanwise.lab.metering import Pipe, departure, queue_bytes

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_OFFLOADS = 0x01 | 0x02  # checksums and TCP segmentation stay undone
_HEADER = 10  # struct virtio_net_hdr
_LARGEST = 65535 + _HEADER
_READS = 16  # packets taken from one interface before the others have their turn
_TICK_S = (
    0.2e-3  # packets due within it leave together: half the wake-ups, an error far below a link's latency
)
_ORDER_BYTES = 4 * 2**20

Pair = bytes  # IPv4 addresses of source and target, 8 bytes


@dataclass(slots=True)
class _Path:
    """Where packets of one pair go."""

    pipes: list[Pipe]
    latency_s: float
    out: int


@dataclass
class Relay:
    """Packets on their way, by due time."""

    tuns: dict[str, int]
    paths: dict[Pair, _Path] = field(default_factory=dict[Pair, _Path])
    pipes: dict[str, Pipe] = field(default_factory=dict[str, Pipe])
    cut: set[Pair] = field(default_factory=set[Pair])
    waiting: list[tuple[float, int, int, bytes]] = field(default_factory=list[tuple[float, int, int, bytes]])
    count: int = 0

    def lay(self, layout: Layout) -> None:
        """Takes over the ways of a layout; what is under way stays so, and pipes keep their backlog."""
        paths: dict[Pair, _Path] = {}
        for way in layout.ways():
            for name, rate in way.resources:
                pipe = self.pipes.setdefault(name, Pipe(rate))
                pipe.bytes_per_s = rate
                pipe.queue_bytes = queue_bytes(rate, way.latency_s)
            key = pair(layout, way.source, way.target)
            out = self.tuns[layout.cluster.device(way.target).site]
            paths[key] = _Path([self.pipes[name] for name, _ in way.resources], way.latency_s, out)
        self.paths = paths

    def take(self, tun: int, now_s: float) -> None:
        """Reads what has arrived on one interface."""
        for _ in range(_READS):
            try:
                packet = os.read(tun, _LARGEST)
            except BlockingIOError:
                return
            key = packet[_HEADER + 12 : _HEADER + 20]
            path = self.paths.get(key)
            if path is None or key in self.cut or packet[_HEADER] >> 4 != 4:
                continue
            at = departure(path.pipes, len(packet) - _HEADER, now_s)
            if at is not None:
                self.count += 1
                heapq.heappush(self.waiting, (at + path.latency_s, self.count, path.out, packet))

    def hand_on(self, now_s: float) -> float | None:
        """Writes what is due; returns the seconds until the next packet is."""
        waiting = self.waiting
        while waiting and waiting[0][0] <= now_s:
            _, _, out, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # as a full or vanished interface would drop it
                os.write(out, packet)
        return waiting[0][0] - now_s if waiting else None


def pair(layout: Layout, a: str, b: str) -> Pair:
    """Key of an ordered pair of devices."""
    return socket.inet_aton(layout.address(a)) + socket.inet_aton(layout.address(b))


def open_tun(namespace: str) -> int:
    """A handle on ``tun0`` of a namespace."""

    def attach() -> int:
        handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        request = struct.pack("16sH22x", b"tun0", _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(handle, _TUNSETIFF, request)
        fcntl.ioctl(handle, _TUNSETOFFLOAD, _OFFLOADS)
        return handle

    return inside(namespace, attach)


class Keeper:
    """The relay's process: packets, orders, and the end of the lab."""

    def __init__(self, folder: state.LabFolder, *, watch: bool) -> None:
        self.folder, self.watch = folder, watch
        self.layout = folder.layout()
        sites = self.layout.sites
        self.relay = Relay({s: open_tun(self.layout.site_namespace(s)) for s in sites})
        self.relay.lay(self.layout)
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            self.server.bind(str(folder.control))
        finally:
            os.umask(mask)
        self.server.listen(8)

    def serve(self) -> None:
        """Carries packets until the owner's end of standard input closes or ``stop`` is ordered."""
        tuns = list(self.relay.tuns.values())
        others = [self.server.fileno(), *([0] if self.watch else [])]
        wait: float | None = None
        while True:
            ready, _, _ = select.select([*tuns, *others], [], [], wait)
            now = time.monotonic()
            for handle in ready:
                if handle == 0:
                    if not os.read(0, 4096):
                        return
                elif handle == self.server.fileno():
                    if not self._answer():
                        return
                else:
                    self.relay.take(handle, now)
            wait = self.relay.hand_on(time.monotonic())
            wait = None if wait is None else max(wait, _TICK_S)

    def _answer(self) -> bool:
        """One order on one connection; false ends the relay."""
        connection, _ = self.server.accept()
        with connection:
            connection.settimeout(1.0)
            try:
                order = json.loads(_line(connection))
                going_on, found = self._obey(order)
                answer = {"ok": True, **found}
            except (OSError, ValueError, KeyError, SpanwiseError) as error:
                going_on, answer = True, {"ok": False, "reason": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b"\n")
        return going_on

    def _obey(self, order: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        match order["do"]:
            case "lay":
                cluster = Cluster.parse(order["cluster"], "order to the relay")
                self.layout = Layout.of(self.layout.lab, cluster, 10**6)
                self.relay.lay(self.layout)
                self.relay.cut = {pair(self.layout, a, b) for a, b in order["cut"]}
            case "pipes":
                pipes = self.relay.pipes.items()
                return True, {
                    "pipes": {n: {"sent_bytes": p.sent_bytes, "dropped": p.dropped} for n, p in pipes}
                }
            case "stop":
                return False, {}
            case _:
                return True, {"known": ["lay", "pipes", "stop"]}
        return True, {}


def _line(connection: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        piece = connection.recv(65536)
        if not piece or len(text) > _ORDER_BYTES:
            raise ValueError("an order is one line of JSON of at most 4 MiB")
        text += piece
    return text


def _prefer_this_process() -> None:
    """Packets do not wait for a time slice behind the devices' compute."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _leave(_number: int, _frame: object) -> None:
    sys.exit(0)


def main(argv: Sequence[str]) -> int:
    """Keeps a lab until its end, then removes it."""
    folder = state.LabFolder(Path(argv[0]))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the owner; its end will be noticed
    signal.signal(signal.SIGTERM, _leave)
    try:
        keeper = Keeper(folder, watch="--watch" in argv)
        _prefer_this_process()
        print("ready", flush=True)
        keeper.serve()
    finally:
        state.remove(folder.lab)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
