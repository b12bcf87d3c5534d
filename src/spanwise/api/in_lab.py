"""Workers as devices of a lab: the same processes as anywhere, started in the lab's places."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from spanwise.api.services import profile_request
from spanwise.api.times import profile_prepared
from spanwise.core.cluster import Cluster
from spanwise.core.profile import DeviceTimes, Profile, TimeTable
from spanwise.lab import Lab
from spanwise.runtime.control import listen
from spanwise.runtime.pool import Meeting, WorkerPool

if TYPE_CHECKING:
    from spanwise.api.prepare import Prepared

_FEW_ROWS = 2
_PACE_ROWS = 8  # about what a device gets of a micro-batch
_SOON_S = 1.0  # until all devices know when to begin
_PACE_S = 3.0  # for each row count
_PASSES = 3  # at least, in that time
_TIMEOUT_S = 300.0


def meet_in_lab(
    lab: Lab, devices: tuple[str, ...], join_timeout_s: float, on_listen: Callable[[WorkerPool], None], *,
    huge_pages: bool = False,
) -> WorkerPool:  # fmt: skip
    """One worker in the namespace of every device, joined out of band; tensors go over the shaped network.

    ``huge_pages``: see ``Meeting``.
    """

    def start(device: str, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return lab.start(device, argv, env=env, stdin=subprocess.DEVNULL)

    def listen_at_hub(host: str, port: int) -> socket.socket:
        return lab.at_hub(lambda: listen(host, port))

    meeting = Meeting(
        lab.hub_address, join_timeout_s=join_timeout_s, listen=listen_at_hub, start=start,
        huge_pages=huge_pages,
    )  # fmt: skip
    return WorkerPool(lab.cluster, devices, meeting, emulate=False, on_listen=on_listen)


def profile_in_lab(
    prepared: Prepared, cluster: Cluster, lab: Lab, pool: WorkerPool, cache: Path | None
) -> Profile:
    """Layer times of this machine, stretched by each device's share and by what it takes under its limits.

    Times of single layers do not show through a CPU quota, which comes in portions of about a millisecond.
    So layers are timed once at full speed, and the whole model under the quotas: on all devices at the same
    time, with few rows, some and many, and on one device of every share while the others rest. A device's
    factor is what it then needs over what its layers add up to, with some rows; its table has what few and
    many rows need beside that. What a message costs a processor, which matters where a device has a tenth
    of one, is measured under the quotas too.
    """
    base = profile_prepared(prepared, cluster, cache)
    rows = _pace_rows(base, prepared.job.batch)
    usual = min(rows, key=lambda count: abs(count - _PACE_ROWS))
    shares = {d: lab.share(d) for d in pool.devices}
    alike = {share: d for d, share in shares.items()}  # devices of one share stand for each other
    _set_up(prepared, rows, lab, pool)

    def slower(
        devices: tuple[str, ...], counts: list[int], keep: Collection[str]
    ) -> dict[str, dict[int, float]]:
        found = _passes_s(counts, pool, devices, keep)
        return {d: _slower(base.table(d)[0], counts, seconds) for d, seconds in found.items()}

    together = slower(pool.devices, rows, alike.values())
    alone = {share: slower((d,), [usual], ())[d][usual] for share, d in alike.items()}
    per_message = [
        (a / together[d][usual], b / together[d][usual]) for d, (a, b) in pool.message_cpu_s().items()
    ]
    each_s, byte_s = (median(found) for found in zip(*per_message, strict=True)) if per_message else (0, 0)
    costs = {"message_s": each_s, "message_s_per_byte": byte_s}
    return _stretched(base, shares, together, alone, usual, costs)


def _stretched(
    base: Profile, shares: dict[str, float], together: dict[str, dict[int, float]], alone: dict[float, float],
    usual: int, costs: Mapping[str, float],
) -> Profile:  # fmt: skip
    """Each device's factor is that of the usual row count; devices of a share have a table with the rest."""
    tables: dict[tuple[float, int], TimeTable] = {}
    devices: list[DeviceTimes] = []
    for entry in base.devices:
        key = share, table = shares[entry.device], entry.table
        if key not in tables:
            curves = [curve for device, curve in together.items() if shares[device] == share]
            by_rows = {count: median(curve[count] / curve[usual] for curve in curves) for count in curves[0]}
            tables[key] = base.tables[table].stretched(by_rows).model_copy(update=costs)
        by = together[entry.device][usual]
        devices.append(
            DeviceTimes(
                device=entry.device,
                table=list(tables).index(key),
                factor=entry.factor * by,
                alone=min(1.0, alone[share] / by),
            )
        )
    return base.model_copy(update={"devices": tuple(devices), "tables": tuple(tables.values())})


def _slower(table: TimeTable, rows: list[int], seconds: list[float]) -> dict[int, float]:
    """By row count, how much longer a pass took than its layers undisturbed."""
    return {count: s / _layers_s(table, count) for count, s in zip(rows, seconds, strict=True)}


def _layers_s(table: TimeTable, rows: int) -> float:
    return sum(table.forward(layer, rows) + table.backward(layer, rows) for layer in range(len(table.layers)))


def _pace_rows(base: Profile, batch: int) -> list[int]:
    """Few rows, some, and as many as the slowest device gets through several times in the time it has."""
    slowest = max(base.devices, key=lambda d: d.factor * _layers_s(base.tables[d.table], _PACE_ROWS))
    table = base.tables[slowest.table]
    fits = [r for r in table.rows if slowest.factor * _layers_s(table, r) <= _PACE_S / _PASSES]
    return sorted({min(r, max(2, batch)) for r in (_FEW_ROWS, _PACE_ROWS, max(fits, default=_PACE_ROWS))})


def _set_up(prepared: Prepared, rows: list[int], lab: Lab, pool: WorkerPool) -> None:
    """All devices build the model, without quotas: with a twentieth of a core that would take minutes."""
    head, payload = profile_request(prepared)
    with lab.eased():
        for device in pool.devices:
            pool.coordinator.tell(device, "service", payload, name="pace_set_up", pace_rows=rows, **head)
        pool.coordinator.gather("served", pool.devices, _TIMEOUT_S)


def _passes_s(
    rows: list[int], pool: WorkerPool, devices: tuple[str, ...], keep: Collection[str]
) -> dict[str, list[float]]:
    """Seconds of a pass of the whole model on these devices at once, under their quotas, by row counts.

    Those to ``keep`` the model are asked again.
    """
    coordinator = pool.coordinator
    begin_s = time.monotonic() + _SOON_S
    for device in devices:
        coordinator.tell(
            device, "service", name="pace", begin_s=begin_s, last_s=_PACE_S, pace_rows=rows,
            keep=device in keep,
        )  # fmt: skip
    frames = coordinator.gather("served", devices, _TIMEOUT_S)
    return {device: [float(s) for s in frame.head["passes_s"]] for device, frame in frames.items()}
