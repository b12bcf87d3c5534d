"""Workers as devices of a lab: the same processes as anywhere, started in the lab's places."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence

from spanwise.lab import Lab
from spanwise.runtime.processes import Meeting, WorkerPool


def meet_in_lab(
    lab: Lab, devices: tuple[str, ...], join_timeout_s: float, on_listen: Callable[[WorkerPool], None]
) -> WorkerPool:
    """One worker in the namespace of every device, joined out of band; tensors go over the shaped network."""

    def start(device: str, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return lab.start(device, argv, env=env, stdin=subprocess.DEVNULL)

    meeting = Meeting(lab.hub_address, 0, join_timeout_s=join_timeout_s, listen=lab.listen, start=start)
    return WorkerPool(lab.cluster, devices, meeting, emulate=False, on_listen=on_listen)


def current_lab() -> str:
    """Id of the lab in which this process runs: ``spanwise lab run`` names it; empty outside of labs."""
    return os.environ.get("SPANWISE_LAB", "")
