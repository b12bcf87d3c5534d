"""CPU shares and memory limits by Linux control groups, version 1 or 2, whichever the machine has.

Kernel documentation: "CFS Bandwidth Control" and cgroup-v1 "memory"; "Control Group v2", cpu and memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from spanwise.core.errors import ResourceError
from spanwise.lab.layout import PREFIX, Share

ROOT = Path("/sys/fs/cgroup")
_KILL_S = 5.0


@dataclass(frozen=True)
class Groups(ABC):
    """Control groups of one lab: one for each device and one without limits for the hub."""

    lab: str
    root: Path = ROOT

    @property
    @abstractmethod
    def bases(self) -> tuple[Path, ...]:
        """The lab's folder in every hierarchy."""

    @abstractmethod
    def limit_memory(self, name: str, nbytes: int) -> None:
        """What a group may use, page cache included, with no way out into swap."""

    @abstractmethod
    def set_share(self, name: str, share: Share | None) -> None:
        """Another CPU share; none lifts the limit."""

    @abstractmethod
    def peak_memory_bytes(self, name: str) -> int:
        """The most memory that the group has used, page cache included."""

    @abstractmethod
    def cpu_s(self, name: str) -> float:
        """Processor seconds that the group has used so far."""

    @abstractmethod
    def throttled_s(self, name: str) -> float:
        """Seconds for which its share held the group back so far."""

    def create(self, name: str, share: Share | None, memory_bytes: int | None) -> None:
        """Makes a group with these limits."""
        for base in self.bases:
            _make(base / name)
        self.set_share(name, share)
        if memory_bytes is not None:
            self.limit_memory(name, memory_bytes)

    def entries(self, name: str) -> tuple[Path, ...]:
        """Files into which a process writes its id to enter the group."""
        return tuple(base / name / "cgroup.procs" for base in self.bases)

    def processes(self, name: str) -> tuple[int, ...]:
        """Processes in the group."""
        return _processes(self.bases[0] / name)

    def names(self) -> tuple[str, ...]:
        """Groups that exist."""
        return _subfolders(self.bases[0])

    def signal(self, name: str, number: int) -> int:
        """Sends a signal to every process of a group; returns to how many."""
        return _signal(self.processes(name), number)

    def remove(self) -> None:
        """Ends every process in the groups and removes them, also those that enter meanwhile.

        Raises:
            ResourceError: a process outlives SIGKILL.
        """
        end = time.monotonic() + _KILL_S
        for base in self.bases:
            for folder in [*(base / name for name in _subfolders(base)), base]:
                _remove(folder, end)


class GroupsV1(Groups):
    """Version 1: a hierarchy for each controller."""

    @property
    def bases(self) -> tuple[Path, ...]:
        """Under ``cpu``, ``memory`` and, for the accounts, ``cpuacct`` where it is apart."""
        return tuple(self.root / c / f"{PREFIX}{self.lab}" for c in ("cpu", "memory", "cpuacct")
                     if (self.root / c).is_dir())  # fmt: skip

    def limit_memory(self, name: str, nbytes: int) -> None:
        """``memory.limit_in_bytes``, and the same with swap."""
        memory = self.bases[1] / name
        _write(memory / "memory.limit_in_bytes", nbytes)
        if (memory / "memory.memsw.limit_in_bytes").exists():
            _write(memory / "memory.memsw.limit_in_bytes", nbytes)

    def set_share(self, name: str, share: Share | None) -> None:
        """``cpu.cfs_quota_us`` and its period; ``cpu.shares`` in proportion."""
        cpu = self.bases[0] / name
        _write(cpu / "cpu.cfs_quota_us", -1)
        if share is not None:
            _write(cpu / "cpu.cfs_period_us", round(share.period_s * 1e6))
            _write(cpu / "cpu.cfs_quota_us", round(share.quota_s * 1e6))
            _write(cpu / "cpu.shares", max(2, round(share.cores * 4096)))

    def peak_memory_bytes(self, name: str) -> int:
        """``memory.max_usage_in_bytes``."""
        return int(_read(self.bases[1] / name / "memory.max_usage_in_bytes"))

    def cpu_s(self, name: str) -> float:
        """``cpuacct.usage``."""
        return int(_read(self.root / "cpuacct" / f"{PREFIX}{self.lab}" / name / "cpuacct.usage")) / 1e9

    def throttled_s(self, name: str) -> float:
        """``throttled_time`` of ``cpu.stat``."""
        return _pairs(_read(self.bases[0] / name / "cpu.stat"))["throttled_time"] / 1e9


class GroupsV2(Groups):
    """Version 2: one tree; limits hold in the children of a group that passes the controllers on."""

    @property
    def bases(self) -> tuple[Path, ...]:
        """The one folder."""
        return (self.root / f"{PREFIX}{self.lab}",)

    def create(self, name: str, share: Share | None, memory_bytes: int | None) -> None:
        """Makes a group with these limits, below parents that pass the controllers on."""
        _make(self.bases[0])
        for parent in (self.root, self.bases[0]):
            _write(parent / "cgroup.subtree_control", "+cpu +memory")
        super().create(name, share, memory_bytes)

    def limit_memory(self, name: str, nbytes: int) -> None:
        """``memory.max``, and no swap."""
        group = self.bases[0] / name
        _write(group / "memory.max", nbytes)
        if (group / "memory.swap.max").exists():
            _write(group / "memory.swap.max", 0)

    def set_share(self, name: str, share: Share | None) -> None:
        """``cpu.max``; ``cpu.weight`` in proportion."""
        quota = "max" if share is None else str(round(share.quota_s * 1e6))
        period = round((share.period_s if share else 0.1) * 1e6)
        _write(self.bases[0] / name / "cpu.max", f"{quota} {period}")
        if share is not None:
            _write(self.bases[0] / name / "cpu.weight", min(10000, max(1, round(share.cores * 400))))

    def peak_memory_bytes(self, name: str) -> int:
        """``memory.peak``."""
        return int(_read(self.bases[0] / name / "memory.peak"))

    def cpu_s(self, name: str) -> float:
        """``usage_usec`` of ``cpu.stat``."""
        return _pairs(_read(self.bases[0] / name / "cpu.stat"))["usage_usec"] / 1e6

    def throttled_s(self, name: str) -> float:
        """``throttled_usec`` of ``cpu.stat``."""
        return _pairs(_read(self.bases[0] / name / "cpu.stat"))["throttled_usec"] / 1e6


def detect(lab: str, root: Path = ROOT) -> Groups:
    """Control groups as this machine has them.

    Raises:
        ResourceError: neither version offers the cpu and the memory controller.
    """
    if (root / "cpu").is_dir() and (root / "memory").is_dir():
        return GroupsV1(lab, root)
    controllers = root / "cgroup.controllers"
    offered = controllers.read_text(encoding="ascii").split() if controllers.exists() else []
    if {"cpu", "memory"} <= set(offered):
        return GroupsV2(lab, root)
    raise ResourceError(
        f"lab: no cpu and memory controllers in {root} (version 2 offers {' '.join(offered) or 'nothing'}); "
        "mount them, or train without a lab"
    )


def leftovers(root: Path = ROOT) -> tuple[str, ...]:
    """Ids of labs that have control groups."""
    places = [root / "cpu", root] if (root / "cpu").is_dir() else [root]
    found = [p.name for place in places for p in place.glob(f"{PREFIX}*") if p.is_dir()]
    return tuple(sorted({name.removeprefix(PREFIX) for name in found}))


def _remove(folder: Path, end: float) -> None:
    """Removes one group; a process on its way in when the others were killed is killed in its turn."""
    while folder.exists():
        _signal(_processes(folder), signal.SIGKILL)
        try:
            folder.rmdir()
        except OSError as error:  # a killed process may take a moment to leave
            if time.monotonic() > end:
                raise ResourceError(
                    f"lab: control group {folder} cannot be removed ({error.strerror}), {_KILL_S:g} s after "
                    f"SIGKILL to its processes {list(_processes(folder))}"
                ) from None
            time.sleep(0.02)


def _signal(processes: tuple[int, ...], number: int) -> int:
    count = 0
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            count += 1
    return count


def _processes(folder: Path) -> tuple[int, ...]:
    try:
        return tuple(int(pid) for pid in (folder / "cgroup.procs").read_text(encoding="ascii").split())
    except OSError:  # the group, or its file, is gone
        return ()


def _subfolders(base: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in base.iterdir() if p.is_dir())) if base.is_dir() else ()


def _pairs(text: str) -> dict[str, int]:
    return {key: int(value) for key, _, value in (line.partition(" ") for line in text.splitlines())}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"lab: control group {folder} cannot be made ({error.strerror}); is this root?"
        ) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError as error:
        raise ResourceError(f"lab: {path} cannot be read ({error.strerror})") from None


def _write(path: Path, value: object) -> None:
    try:
        path.write_text(str(value), encoding="ascii")
    except OSError as error:
        raise ResourceError(f"lab: {path} does not take '{value}' ({error.strerror})") from None
