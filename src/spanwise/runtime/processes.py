"""A session on worker processes: spawned here for an emulated cluster, started by hand on real devices."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from spanwise.core.cluster import Cluster
from spanwise.core.errors import PeerError, SpanwiseError
from spanwise.core.job import LIVE
from spanwise.core.observed import DeviceStep
from spanwise.core.profile import StageTimes
from spanwise.cost.training import optimizer_copies
from spanwise.lowering import Move, move_bytes, moves
from spanwise.ops.allocator import HUGE_PAGES
from spanwise.runtime import orders
from spanwise.runtime.control import listen
from spanwise.runtime.coordinator import Coordinator
from spanwise.runtime.device_run import Assignment, Snapshot
from spanwise.runtime.emulate import ledger_path
from spanwise.runtime.feed import Rows, read_rows
from spanwise.runtime.link_probe import PROBE_SIZES
from spanwise.runtime.session import (
    DeviceSpans,
    Guide,
    Horizon,
    Probe,
    StepGatherer,
    StepReport,
    Switched,
    merge_states,
)
from spanwise.runtime.worker import versions

_SETUP_S = 120.0
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
                timeout_s=_SETUP_S,
                ledger=str(self._ledger) if self._ledger else "",
            )
        self.coordinator.gather("met", self.devices, _SETUP_S)

    def probe_links(self) -> dict[tuple[str, str], tuple[tuple[int, float], ...]]:
        """(bytes, round-trip seconds) for every ordered pair that the cluster joins, one pair at a time."""
        found: dict[tuple[str, str], tuple[tuple[int, float], ...]] = {}
        for a in self.devices:
            for b in self.devices:
                if a == b or not (self.cluster.connected(a, b) and self.cluster.connected(b, a)):
                    continue
                self.coordinator.tell(b, "probe", peer=a, first=False, sizes=PROBE_SIZES)
                self.coordinator.tell(a, "probe", peer=b, first=True, sizes=PROBE_SIZES)
                frames = self.coordinator.gather("probed", (a, b), _SETUP_S)
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
        frames = self.coordinator.gather("exchanged", ring, _SETUP_S)
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


class ProcessSession:
    """One worker process a device."""

    def __init__(
        self,
        pool: WorkerPool,
        assignment: Assignment,
        tensors: dict[str, Tensor],
        data: Rows | None,
        *,
        resume: Snapshot | None = None,
    ) -> None:
        self._pool, self._coordinator, self._assignment = pool, pool.coordinator, assignment
        self._devices, self._data = assignment.plan.devices, data
        self._known = set(self._devices)  # those that know job, graph and operations
        self._fed: set[str] = set()  # those that have got rows of live data
        for device in self._devices:
            self._set_up(device, tensors, resume)
        self._coordinator.gather("ready", self._devices, _SETUP_S)
        if assignment.emulate:
            self.stage_times()

    def stage_times(self) -> tuple[StageTimes, ...]:
        """Each device in turn, so that it is undisturbed; what it knows already it does not time again."""
        found: list[StageTimes] = []
        for device in self._devices:
            self._coordinator.tell(device, "calibrate")
            frames = self._coordinator.gather("calibrated", (device,), _SETUP_S)
            found += [StageTimes.parse(data) for data in frames[device].head["stages"]]
        return tuple(found)

    def _set_up(self, device: str, tensors: dict[str, Tensor], resume: Snapshot | None) -> None:
        a = self._assignment
        held, updated = (set(names.get(device, ())) for names in (a.program.held, a.program.updated))
        parts = {f"state/{k}": tensors[k].detach().cpu().contiguous() for k in held | a.buffers_of(device)}
        if resume is not None:
            parts |= {
                f"optimizer/{k}": v.contiguous()
                for k, v in resume.optimizer.items()
                if k.partition("::")[0] in updated
            }
        parts |= self._live_rows(a, device)
        head = orders.whole(a)
        if resume is not None:
            head["resume"] = {"options": resume.options, "scheduler": resume.scheduler}
        payload = safetensors.torch.save({k: v.clone() for k, v in parts.items()})
        self._coordinator.tell(device, "setup", payload, **head)

    def _live_rows(self, assignment: Assignment, device: str) -> dict[str, Tensor]:
        """Live data: the rows that a source reads from, and no others, travel to its worker, once."""
        source = device in [source.device for source in assignment.plan.sources]
        if assignment.job.data.name != LIVE or self._data is None or not source or device in self._fed:
            return {}
        self._fed.add(device)
        inputs, labels = read_rows(self._data, assignment.held_by(device))
        # Sorted by name on arrival, so numbers keep the order.
        return {f"data/{i:03d}": torch.as_tensor(t).contiguous() for i, t in enumerate((*inputs, *labels))}

    def run(self, first: int, count: int, guide: Guide | None = None) -> Iterator[StepReport]:
        """Tells all workers to run, yields steps as they end."""
        horizon = Horizon(first, count, guide)
        self._order(first, horizon.step)
        gatherer = StepGatherer(self._devices)
        patience = 4 * self._assignment.job.transfer_timeout_s + 60.0
        step = first
        try:
            while step < horizon.step:
                device, frame = self._coordinator.next_event(patience, f"step of {self._devices}")
                if guide is not None and frame.kind == "probed" and frame.head["samples"]:
                    samples = tuple((int(n), float(t)) for n, t in frame.head["samples"])
                    sizes = tuple(n for n, _ in samples)
                    guide.probed(Probe(device, str(frame.head["peer"]), sizes), samples)
                if frame.kind != "step":
                    continue
                report = gatherer.add(device, self._part(device, frame.head))
                if report is None:
                    continue
                step = report.step + 1
                yield report
                for probe in guide.wanted_probes() if guide is not None else ():
                    self._ask(probe)
                before = horizon.step
                self._order(before, horizon.heard(report))
        except GeneratorExit:
            raise
        except SpanwiseError as error:
            self._coordinator.fail(error)
            raise

    def _order(self, first: int, stop: int) -> None:
        for device in self._devices if stop > first else ():
            self._coordinator.tell(device, "run", first=first, count=stop - first)

    def _ask(self, probe: Probe) -> None:
        """Both ends measure the link once they have ended the steps that they know of."""
        patience = 4 * self._assignment.job.transfer_timeout_s
        ends = ((probe.source, probe.target, True), (probe.target, probe.source, False))
        for device, peer, first in ends:
            self._coordinator.tell(
                device, "probe", peer=peer, first=first, sizes=probe.sizes, timeout_s=patience
            )

    def _part(self, device: str, head: dict[str, Any]) -> StepReport:
        shift = self._pool.clock_offset_s(device)
        seen = head.get("observed")
        return StepReport(
            int(head["step"]), float(head["loss"]), float(head["start"]) - shift, float(head["end"]) - shift,
            () if seen is None else (DeviceStep.parse(device, seen, shift),),
        )  # fmt: skip

    def switch(self, assignment: Assignment) -> Switched:
        """Goes on under another plan; its devices must be of the pool.

        State travels between the devices; only rows of live data, for a device that becomes a source, come
        from here.
        """
        start, before = time.monotonic(), self._assignment
        found = moves(before.plan, assignment.plan, before.graph, before.cluster)
        change: dict[str, Any] = {"before": before.plan.to_data(), "moves": orders.moves_data(found)}
        devices = tuple(dict.fromkeys((*before.plan.devices, *assignment.plan.devices)))
        for device in devices:
            head = orders.plan_only(assignment) if device in self._known else orders.whole(assignment)
            rows = self._live_rows(assignment, device)
            payload = safetensors.torch.save(rows) if rows else b""
            self._coordinator.tell(device, "switch", payload, **head, **change)
        self._known.update(devices)
        frames = self._coordinator.gather("switched", devices, _SETUP_S + self._moving_s(found))
        self._assignment, self._devices = assignment, assignment.plan.devices
        ready = time.monotonic()
        if assignment.emulate:
            self.stage_times()
        moved = sum(int(frame.head["received_bytes"]) for frame in frames.values())
        return Switched(moved, ready - start, time.monotonic() - ready)

    def _moving_s(self, found: Sequence[Move]) -> float:
        """At most so long: all bytes one after the other over the slowest of their links, eight times."""
        a = self._assignment
        rates = [a.cluster.route(m.source, m.target).bandwidth_bytes_per_s for m in found]
        nbytes = sum(move_bytes(m, a.graph, optimizer_copies(a.job.optimizer)) for m in found)
        return 8 * nbytes / min(rates, default=1.0)

    def snapshot(self) -> Snapshot:
        """Collects every parameter once, from the first device that updates it."""
        reported = self._assignment.program.reported
        for device in self._devices:
            self._coordinator.tell(device, "collect", names=reported.get(device, ()))
        states: dict[str, Snapshot] = {}
        for device, frame in self._coordinator.gather("collected", self._devices, _SETUP_S).items():
            state = Snapshot(options=frame.head["options"], scheduler=frame.head["scheduler"])
            places = {"state": state.parameters, "buffer": state.buffers, "optimizer": state.optimizer}
            for name, tensor in safetensors.torch.load(frame.payload).items():
                part, _, rest = name.partition("/")
                if part not in places:
                    raise PeerError(f"device '{device}': sent an unknown tensor '{name}'", device=device)
                places[part][rest] = tensor
            states[device] = state
        return merge_states(self._assignment, states)

    def spans(self) -> tuple[DeviceSpans, ...]:
        """Asks all workers for their recorded spans and brings them to this machine's clock."""
        for device in self._devices:
            self._coordinator.tell(device, "spans")
        out: list[DeviceSpans] = []
        for device, frame in self._coordinator.gather("spanned", self._devices, _SETUP_S).items():
            shift = self._pool.clock_offset_s(device)
            steps = tuple(
                (
                    int(r["step"]), r["start"] - shift, r["end"] - shift, float(r["busy_s"]),
                    tuple((lane, kind, text, a - shift, b - shift) for lane, kind, text, a, b in r["spans"]),
                )
                for r in frame.head["records"]
            )  # fmt: skip
            out.append(DeviceSpans(device, steps, int(frame.head["peak_bytes"])))
        return tuple(sorted(out, key=lambda spans: self._devices.index(spans.device)))

    def fail(self, error: SpanwiseError) -> None:
        """Ends the run on all devices."""
        self._coordinator.fail(error)

    def close(self) -> None:
        """The workers stay with their pool, ready for the next plan."""
