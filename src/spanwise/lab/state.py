"""What is known of labs on this machine: a folder each, which its processes and ``lab down`` can read."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spanwise.core.cluster import Cluster
from spanwise.core.errors import InputError, ResourceError
from spanwise.core.noun import write_whole
from spanwise.lab import cgroups
from spanwise.lab.commands import NAMESPACES, call
from spanwise.lab.layout import PREFIX, Layout

HOME = Path("/run/spanwise")


@dataclass(frozen=True)
class LabFolder:
    """Files of one lab."""

    path: Path

    @staticmethod
    def of(lab: str) -> LabFolder:
        """The folder of a lab by its id."""
        return LabFolder(HOME / f"lab-{lab}")

    @property
    def lab(self) -> str:
        """The lab's id."""
        return self.path.name.removeprefix("lab-")

    @property
    def description(self) -> Path:
        """Cluster and owner, in JSON."""
        return self.path / "lab.json"

    @property
    def control(self) -> Path:
        """Socket on which the relay takes orders."""
        return self.path / "control"

    @property
    def log(self) -> Path:
        """What the relay has to say."""
        return self.path / "relay.log"

    def write(self, cluster: Cluster, owner: int, relay: int) -> None:
        """Describes the lab."""
        data = {"lab": self.lab, "owner": owner, "relay": relay, "cluster": cluster.to_data()}
        write_whole(self.description, json.dumps(data, indent=1) + "\n")

    def read(self) -> dict[str, Any]:
        """What ``write`` wrote; ``InputError`` if there is no such lab."""
        try:
            return json.loads(self.description.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(
                f"lab '{self.lab}': not known on this machine; 'spanwise lab status' lists those that are up"
            ) from None

    def layout(self) -> Layout:
        """The lab on paper."""
        cluster = Cluster.parse(self.read()["cluster"], f"lab '{self.lab}'")
        return Layout.of(self.lab, cluster, 10**6)  # it was checked when it was made


def known() -> tuple[LabFolder, ...]:
    """Labs with a folder, running or left behind."""
    return tuple(LabFolder(p) for p in sorted(HOME.glob("lab-*"))) if HOME.is_dir() else ()


def left_behind() -> tuple[str, ...]:
    """Ids of all labs of which anything exists: a folder, a namespace or a control group."""
    found = {folder.lab for folder in known()} | set(cgroups.leftovers())
    if NAMESPACES.is_dir():
        names = [p.name for p in NAMESPACES.glob(f"{PREFIX}*")]
        found |= {name.removeprefix(PREFIX).partition(".")[0] for name in names}
    return tuple(sorted(found))


@contextmanager
def one_at_a_time() -> Generator[None]:
    """Held while a lab is made: two at once would not see each other."""
    try:
        HOME.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(HOME / "making", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ResourceError(f"lab: {HOME} cannot be used ({error.strerror}); a lab needs root") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove(lab: str) -> None:
    """Ends all processes of a lab and removes everything that carries its id. Twice is no error."""
    try:
        cgroups.detect(lab).remove()
    finally:  # a process that cannot be killed must not keep the network up
        if NAMESPACES.is_dir():
            for path in sorted(NAMESPACES.glob(f"{PREFIX}{lab}.*")):
                call("ip", "netns", "del", path.name, check=False)
    shutil.rmtree(LabFolder.of(lab).path, ignore_errors=True)
