"""The lab: every device of a cluster as a network namespace with a CPU share and a memory limit."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from spanwise.core.cluster import Cluster
from spanwise.core.errors import InputError, PeerError, ResourceError
from spanwise.core.units import parse_rate, parse_seconds
from spanwise.lab import cgroups, network, state
from spanwise.lab.commands import inside, require_tools
from spanwise.lab.layout import Layout, Share, changed_cluster

T = TypeVar("T")

LIBRARY_BYTES = 448 * 2**20  # interpreter, torch and spanwise, beside the tensors of a device's budget
HUB = "hub"
_START_S = 20.0
_ORDER_S = 5.0


def reason_against() -> str:
    """Why this machine, or this user, cannot have a lab; empty if it can."""
    if not sys.platform.startswith("linux"):
        return f"a lab needs Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "a lab makes network namespaces and control groups, which needs root"
    if not Path("/dev/net/tun").exists():
        return "a lab relays packets through /dev/net/tun, which this machine does not have"
    return ""


class Lab:
    """An emulated testbed on this machine; a context manager that leaves nothing behind.

    Example:
        >>> with Lab(cluster) as lab:
        ...     lab.start("edge", ["python", "train.py"])
        ...     lab.cut("edge", "cloud")

    Attributes:
        id: part of every name that the lab gives.
        cluster: the cluster as its workers see it: with addresses on the shaped network.
    """

    def __init__(self, cluster: Cluster, *, keep: bool = False) -> None:
        """Describes a lab; ``up`` or ``with`` makes it.

        Args:
            cluster: its devices; ``[emulation] core_share`` says what part of a core speed 1.0 is.
            keep: the lab outlives this process, until ``spanwise lab down``.
        """
        self.id = secrets.token_hex(3)
        self.keep = keep
        self.layout = Layout.of(self.id, cluster, os.cpu_count() or 1)
        self._cut: set[tuple[str, str]] = set()
        self._relay: subprocess.Popen[bytes] | None = None
        self._children: list[subprocess.Popen[Any]] = []
        self._easing = 0  # blocks of ``eased`` under way

    @staticmethod
    def attach(lab: str) -> Lab:
        """A lab that is up, by its id, to start processes in and to change; leaving it does not end it."""
        layout = state.LabFolder.of(lab).layout()
        found = Lab.__new__(Lab)
        found.id, found.keep, found.layout = lab, True, layout
        found._cut, found._relay, found._children, found._easing = set(), None, [], 0
        return found

    @property
    def cluster(self) -> Cluster:
        """The cluster with the lab's addresses and no emulation of its own."""
        return self.layout.placed()

    @property
    def groups(self) -> cgroups.Groups:
        """Control groups of the lab."""
        return cgroups.detect(self.id)

    def up(self) -> Lab:
        """Makes everything; on failure nothing stays.

        Raises:
            ResourceError: not root, no TUN, a missing program, or another lab is up.
        """
        reason = reason_against()
        if reason:
            raise ResourceError(f"lab: {reason}; run as root, or train without a lab: the portable emulation "
                                "slows and paces the same cluster without root")  # fmt: skip
        require_tools()
        cgroups.detect(self.id)
        with state.one_at_a_time():
            self._refuse_second()
            try:
                self._build()
            except BaseException:
                self._end()
                raise
        return self

    def _refuse_second(self) -> None:
        for lab in state.left_behind():
            folder = state.LabFolder.of(lab)
            known: dict[str, Any] = folder.read() if folder.description.exists() else {"relay": 0}
            if _alive(int(known["relay"])):
                name = known["cluster"].get("name")
                raise ResourceError(
                    f"lab: lab {lab} ('{name}', process {known['owner']}) is up, and two would "
                    f"share the cores; wait for it, or end it with 'spanwise lab down {lab}'"
                )
            state.remove(lab)  # its relay is gone, so nothing of it works any more

    def _build(self) -> None:
        layout, groups = self.layout, self.groups
        folder = state.LabFolder.of(self.id)
        folder.write(layout.cluster, os.getpid(), 0)
        network.build(layout)
        groups.create(HUB, None, None)
        for device in layout.cluster.devices:
            groups.create(device.id, Share.of(layout.share(device.id)), device.memory_bytes + LIBRARY_BYTES)
        self._relay = self._start_relay(folder)
        folder.write(layout.cluster, os.getpid(), self._relay.pid)

    def _start_relay(self, folder: state.LabFolder) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "spanwise.lab.relay", str(folder.path)]
        if not self.keep:
            argv.append("--watch")
        with folder.log.open("wb") as log:
            relay = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL if self.keep else subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        assert relay.stdout is not None
        ready, _, _ = select.select([relay.stdout], [], [], _START_S)
        if not ready or relay.stdout.readline() != b"ready\n":
            relay.kill()
            words = (
                " ".join(folder.log.read_text(errors="replace").split()[-40:]) if folder.log.exists() else ""
            )
            raise ResourceError(
                f"lab: the relay did not start within {_START_S:g} s: {words or 'no message'}"
            )
        relay.stdout.close()
        return relay

    def down(self) -> None:
        """Ends all processes of the lab and removes it."""
        with state.one_at_a_time():
            self._end()

    def _end(self) -> None:
        if self._relay is None:
            folder = state.LabFolder.of(self.id)
            relay = int(folder.read().get("relay", 0)) if folder.description.exists() else 0
            if relay and _alive(relay):
                with contextlib.suppress(ResourceError, ProcessLookupError):
                    self._order(do="stop")
                _wait_gone(relay, 10.0)
        else:
            if self._relay.stdin is not None:
                self._relay.stdin.close()
            else:
                self._relay.terminate()
            try:
                self._relay.wait(10.0)
            except subprocess.TimeoutExpired:
                self._relay.kill()
                self._relay.wait()
            self._relay = None
        state.remove(self.id)
        for child in self._children:  # killed with their group: here only so that none stays a zombie
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5.0)

    def __enter__(self) -> Lab:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def address(self, device: str) -> str:
        """A device's address on the shaped network."""
        return self.layout.address(self._known(device))

    def control_address(self, device: str) -> str:
        """A device's address out of band."""
        return self.layout.control_address(self._known(device))

    @property
    def hub_address(self) -> str:
        """The hub's address out of band."""
        return self.layout.hub_address

    def share(self, device: str) -> float:
        """Cores that a device has."""
        return self.layout.share(self._known(device))

    def at_hub(self, work: Callable[[], T]) -> T:
        """What ``work`` returns when done at the hub: a socket made there stays there."""
        return inside(self.layout.hub, work)

    def command(self, device: str | None, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` as a device, or at the hub for none."""
        name = HUB if device is None else self._known(device)
        namespace = self.layout.hub if device is None else self.layout.device_namespace(name)
        enter = " && ".join(f"echo $$ > {shlex.quote(str(path))}" for path in self.groups.entries(name))
        script = f'{enter} && exec "$@"'
        return ["sh", "-c", script, "lab", "ip", "netns", "exec", namespace, *argv]

    def start(
        self, device: str | None, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Starts a process as a device (or at the hub), under its limits; it ends with the lab.

        ``env`` replaces the environment; ``options`` go to ``subprocess.Popen``.
        """
        child = subprocess.Popen(
            self.command(device, argv), env=None if env is None else dict(env), **options
        )
        self._children.append(child)
        return child

    @contextmanager
    def eased(self) -> Generator[None]:
        """Inside, no CPU share holds: for imports and set-up, which are not what is measured.

        One in another ends nothing: shares hold again after the last.
        """
        self._easing += 1
        for device in self.layout.cluster.ids:
            self.groups.set_share(device, None)
        try:
            yield
        finally:
            self._easing -= 1
            if not self._easing:
                self.enforce()

    def enforce(self) -> None:
        """Puts every device's CPU share in force."""
        for device in self.layout.cluster.ids:
            self.groups.set_share(device, Share.of(self.layout.share(device)))

    def set_speed(self, device: str, speed: float) -> None:
        """Another speed for a device, in units of the cluster file."""
        if not speed > 0:
            raise InputError(f"lab: speed {speed:g} of device '{device}' must be above 0")
        devices = tuple(
            d.model_copy(update={"speed": speed}) if d.id == self._known(device) else d
            for d in self.layout.cluster.devices
        )
        changed = self.layout.cluster.model_copy(update={"devices": devices})
        self.layout = Layout.of(self.id, changed, os.cpu_count() or 1)
        self.groups.set_share(device, Share.of(self.layout.share(device)))

    def set_link(
        self, a: str, b: str, *, bandwidth: str | float | None = None, latency: str | float | None = None
    ) -> None:
        """Another bandwidth or latency between two devices or two sites, both ways, from now on."""
        changed = changed_cluster(
            self.layout.cluster, a, b,
            bandwidth_bytes_per_s=None if bandwidth is None else parse_rate(bandwidth),
            latency_s=None if latency is None else parse_seconds(latency),
        )  # fmt: skip
        old, self.layout = self.layout, Layout.of(self.id, changed, os.cpu_count() or 1)
        self._lay()
        network.reroute(old, self.layout)
        self._cut -= set(self._pairs(a, b))
        self._lay()

    def cut(self, a: str, b: str) -> None:
        """No packet passes between two devices, or two sites, until ``set_link`` joins them again."""
        pairs = self._pairs(a, b)
        old = self.layout
        for one, two in pairs:
            if one < two and self.layout.direct(one, two):  # the bridge cannot cut, the relay can
                changed = changed_cluster(
                    self.layout.cluster, one, two, bandwidth_bytes_per_s=None, latency_s=None
                )
                self.layout = Layout.of(self.id, changed, os.cpu_count() or 1)
        self._cut |= set(pairs)
        self._lay()
        network.reroute(old, self.layout)

    def _pairs(self, a: str, b: str) -> list[tuple[str, str]]:
        sides = [[d.id for d in self.layout.cluster.devices if name in (d.id, d.site)] for name in (a, b)]
        for name, side in zip((a, b), sides, strict=True):
            if not side:
                known = ", ".join((*self.layout.cluster.ids, *self.layout.sites))
                raise InputError(f"lab: no device or site '{name}'; known: {known}")
        pairs = [(x, y) for x in sides[0] for y in sides[1] if x != y]
        return [*pairs, *((y, x) for x, y in pairs)]

    def _lay(self) -> None:
        self._order(do="lay", cluster=self.layout.cluster.to_data(), cut=sorted(self._cut))

    def kill(self, device: str) -> None:
        """Ends all processes of a device at once, as if its power failed."""
        self.groups.signal(self._known(device), signal.SIGKILL)

    def pause(self, device: str) -> None:
        """Stops all processes of a device where they are."""
        self.groups.signal(self._known(device), signal.SIGSTOP)

    def resume(self, device: str) -> None:
        """Lets a paused device go on."""
        self.groups.signal(self._known(device), signal.SIGCONT)

    def sent_bytes(self) -> dict[str, int]:
        """Bytes that each device has sent on the shaped network, headers included."""
        return {d: network.sent_bytes(self.layout, d) for d in self.layout.cluster.ids}

    def pipes(self) -> dict[str, dict[str, int]]:
        """Bytes and drops of every pipe of the relay."""
        return self._order(do="pipes")["pipes"]

    def peak_memory_bytes(self, device: str) -> int:
        """The most memory that a device's processes have used, by its control group."""
        return self.groups.peak_memory_bytes(self._known(device))

    def cpu_s(self, device: str) -> float:
        """Processor seconds that a device's processes have used."""
        return self.groups.cpu_s(self._known(device))

    def _known(self, device: str) -> str:
        return self.layout.cluster.device(device).id

    def _order(self, **order: Any) -> dict[str, Any]:
        path = state.LabFolder.of(self.id).control
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_ORDER_S)
                connection.connect(str(path))
                connection.sendall(json.dumps(order).encode() + b"\n")
                answer = json.loads(connection.makefile("rb").readline())
        except (OSError, ValueError) as error:
            raise ResourceError(f"lab {self.id}: its relay does not answer ({error}); end the lab with "
                                f"'spanwise lab down {self.id}'") from None  # fmt: skip
        if not answer.get("ok"):
            raise PeerError(f"lab {self.id}: the relay refused: {answer.get('reason')}")
        return answer


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_gone(pid: int, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    if _alive(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
