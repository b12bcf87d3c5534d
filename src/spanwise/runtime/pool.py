"""Worker processes that have met: spawned here for an emulated cluster, started by hand on real devices."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spanwise.core.cluster import Cluster
from spanwise.ops.allocator import HUGE_PAGES
from spanwise.runtime.control import listen
from spanwise.runtime.coordinator import Coordinator
from spanwise.runtime.emulate import ledger_path
from spanwise.runtime.joining import versions
from spanwise.runtime.link_probe import PROBE_SIZES

SETUP_S = 120.0  # within which devices do what is asked of them between steps
_ENDING_S = 5.0

Start = Callable[[str, Sequence[str], Mapping[str, str]], "subprocess.Popen[bytes]"]


def start_here(device: str, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:  # noqa: ARG001
    """Starts a worker as a process of this machine like any other."""
    return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL)


@dataclass(frozen=True)
class Meeting:
    """Where workers join: address, token, and whether train starts them itself.

    ``listen`` makes the listening socket and ``start`` (device, command line, environment) the process of
    a worker: a lab has places of its own for both. ``huge_pages``: workers will hand freed memory back, and
    get it anew in huge pages where the kernel has them.
    """

    host: str = "127.0.0.1"
    port: int = 0
    token: str = ""
    spawned: bool = True
    join_timeout_s: float = 120.0
    listen: Callable[[str, int], socket.socket] = listen
    start: Start = start_here
    huge_pages: bool = False


class WorkerPool:
    """Worker processes that have joined and met each other; plans come and go."""

    def __init__(
        self,
        cluster: Cluster,
        devices: Sequence[str],
        meeting: Meeting,
        *,
        emulate: bool,
        on_listen: Callable[[WorkerPool], None] = lambda _: None,
    ) -> None:
        """Listens, starts workers if it is to, and waits until all have joined.

        ``on_listen`` is called as soon as workers may join: ``token``, ``host`` and ``port`` are known then.
        """
        self.cluster, self.devices = cluster, tuple(devices)
        self.same_clock = meeting.spawned  # spawned workers share this machine's monotonic clock
        self.token = meeting.token or secrets.token_urlsafe(24)
        self.coordinator = Coordinator(
            meeting.listen(meeting.host, meeting.port), self.token, self.devices, versions()
        )
        self._ledger: Path | None = ledger_path() if emulate else None
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            on_listen(self)
            if meeting.spawned:
                self._spawn(meeting)
            self.coordinator.wait_for_all(meeting.join_timeout_s)
            self._meet()
        except BaseException:
            self.close()
            raise

    def _spawn(self, meeting: Meeting) -> None:
        endpoint = f"{self.coordinator.host}:{self.coordinator.port}"
        for device in self.devices:
            threads = str(self.cluster.device(device).threads)
            env = os.environ | {"SPANWISE_TOKEN": self.token, "OMP_NUM_THREADS": threads}
            if meeting.huge_pages:
                env = HUGE_PAGES | env
            command = [
                sys.executable,
                "-m",
                "spanwise",
                "worker",
                "--join",
                endpoint,
                "--quiet",
                "--device",
                device,
            ]
            self._processes.append(meeting.start(device, command, env))

    def _meet(self) -> None:
        for device in self.devices:
            self.coordinator.tell(
                device,
                "meet",
                cluster=self.cluster.to_data(),
                members=list(self.devices),
                epoch=0,
                timeout_s=SETUP_S,
                ledger=str(self._ledger) if self._ledger else "",
            )
        self.coordinator.gather("met", self.devices, SETUP_S)

    def probe_links(self) -> dict[tuple[str, str], tuple[tuple[int, float], ...]]:
        """(bytes, round-trip seconds) for every ordered pair that the cluster joins, one pair at a time."""
        found: dict[tuple[str, str], tuple[tuple[int, float], ...]] = {}
        for a in self.devices:
            for b in self.devices:
                if a == b or not (self.cluster.connected(a, b) and self.cluster.connected(b, a)):
                    continue
                self.coordinator.tell(b, "probe", peer=a, first=False, sizes=PROBE_SIZES)
                self.coordinator.tell(a, "probe", peer=b, first=True, sizes=PROBE_SIZES)
                frames = self.coordinator.gather("probed", (a, b), SETUP_S)
                found[a, b] = tuple((int(n), float(s)) for n, s in frames[a].head["samples"])
        return found

    def message_cpu_s(self) -> dict[str, tuple[float, float]]:
        """Processor seconds of a message at each device, one and per byte; empty if a link is missing."""
        ring = self.devices
        neighbours = [(ring[i - 1], d, ring[(i + 1) % len(ring)]) for i, d in enumerate(ring)]
        if len(ring) < 2 or not all(self.cluster.connected(d, after) for _, d, after in neighbours):
            return {}
        for before, device, after in neighbours:
            self.coordinator.tell(device, "exchange", before=before, after=after)
        frames = self.coordinator.gather("exchanged", ring, SETUP_S)
        return {
            device: (float(frame.head["message_s"]), float(frame.head["message_s_per_byte"]))
            for device, frame in frames.items()
        }

    def close(self) -> None:
        """Dismisses the workers; those that do not go are killed."""
        self.coordinator.close()
        end = time.monotonic() + _ENDING_S
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.coordinator.drop()
        if self._ledger is not None:
            self._ledger.unlink(missing_ok=True)

    def clock_offset_s(self, device: str) -> float:
        """A worker's monotonic clock minus ours."""
        return 0.0 if self.same_clock else self.coordinator.clock_offset_s(device)

    @property
    def process_ids(self) -> dict[str, int]:
        """Process of every spawned worker."""
        return {d: p.pid for d, p in zip(self.devices, self._processes, strict=False)}
