"""Workers as devices of a lab: the same processes as anywhere, started in the lab's places."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from spanwise.api.services import profile_request
from spanwise.api.times import profile_prepared
from spanwise.core.cluster import Cluster
from spanwise.core.profile import Profile
from spanwise.lab import Lab
from spanwise.runtime.control import listen
from spanwise.runtime.processes import Meeting, WorkerPool

if TYPE_CHECKING:
    from spanwise.api.prepare import Prepared

_PACE_ROWS = 8  # about what a device gets of a micro-batch
_SET_UP_S = 4.5  # until all devices have built the model
_SET_UP_ALONE_S = 1.5
_PACE_S = 3.5
_TIMEOUT_S = 300.0


def meet_in_lab(
    lab: Lab, devices: tuple[str, ...], join_timeout_s: float, on_listen: Callable[[WorkerPool], None]
) -> WorkerPool:
    """One worker in the namespace of every device, joined out of band; tensors go over the shaped network."""

    def start(device: str, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return lab.start(device, argv, env=env, stdin=subprocess.DEVNULL)

    def listen_at_hub(host: str, port: int) -> socket.socket:
        return lab.at_hub(lambda: listen(host, port))

    meeting = Meeting(lab.hub_address, join_timeout_s=join_timeout_s, listen=listen_at_hub, start=start)
    return WorkerPool(lab.cluster, devices, meeting, emulate=False, on_listen=on_listen)


def profile_in_lab(
    prepared: Prepared, cluster: Cluster, lab: Lab, pool: WorkerPool, cache: Path | None
) -> Profile:
    """Layer times of this machine, stretched by each device's share and by what it takes under its limits.

    Times of single layers do not show through a CPU quota, which comes in portions of about a millisecond.
    So layers are timed once at full speed, and the whole model under the quotas: on all devices at the same
    time, and on one device of every share while the others rest. A device's factor is what it then needs
    over what its layers add up to. What a message costs a processor, which matters where a device has a
    tenth of one, is measured under the quotas too.
    """
    base = profile_prepared(prepared, cluster, cache)
    rows = min(_PACE_ROWS, prepared.job.batch)
    layers = range(len(prepared.traced.graph))
    undisturbed_s: dict[str, float] = {}
    for entry in base.devices:
        table = base.tables[entry.table]
        seconds = [table.forward(layer, rows) + table.backward(layer, rows) for layer in layers]
        undisturbed_s[entry.device] = sum(seconds)
    head, payload = profile_request(prepared)
    request = {**head, "name": "pace", "pace_rows": rows, "last_s": _PACE_S}
    together = _pass_s(request, payload, lab, pool, pool.devices, set_up_s=_SET_UP_S)
    slower = {d: max(1.0, s / undisturbed_s[d]) for d, s in together.items()}
    alike = {lab.share(d): d for d in pool.devices}  # devices of one share stand for each other
    alone: dict[float, float] = {}
    for share, device in alike.items():
        found = _pass_s(request, payload, lab, pool, (device,), set_up_s=_SET_UP_ALONE_S)
        alone[share] = max(1.0, found[device] / undisturbed_s[device])
    messages = {d: (a / slower[d], b / slower[d]) for d, (a, b) in pool.message_cpu_s().items()}
    each_s, byte_s = (median(found) for found in zip(*messages.values(), strict=True)) if messages else (0, 0)
    devices = [
        d.model_copy(
            update={
                "factor": d.factor * slower[d.device],
                "alone": min(1.0, alone[lab.share(d.device)] / slower[d.device]),
            }
        )
        for d in base.devices
    ]
    costs = {"message_s": each_s, "message_s_per_byte": byte_s}
    tables = [table.model_copy(update=costs) for table in base.tables]
    return base.model_copy(update={"devices": tuple(devices), "tables": tuple(tables)})


def _pass_s(
    request: dict[str, Any], payload: bytes, lab: Lab, pool: WorkerPool, devices: tuple[str, ...], *,
    set_up_s: float,
) -> dict[str, float]:  # fmt: skip
    """Seconds of a pass of the whole model on these devices at once, under their quotas."""
    with lab.eased():
        begin_s = time.monotonic() + set_up_s
        for device in devices:
            pool.coordinator.tell(device, "service", payload, begin_s=begin_s, **request)
        time.sleep(max(0.0, begin_s - time.monotonic()))
    frames = pool.coordinator.gather("served", devices, _TIMEOUT_S)
    return {device: float(frame.head["pass_s"]) for device, frame in frames.items()}
