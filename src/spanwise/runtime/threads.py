"""A session on threads of this process: for tests, for one device, for reading the code."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from spanwise.core.errors import PeerError, SpanwiseError
from spanwise.core.observed import DeviceStep
from spanwise.core.profile import LinkTimes, StageTimes
from spanwise.lowering import moves
from spanwise.ops.allocator import keep_freed_memory_of_threads
from spanwise.runtime.device_run import Assignment, DeviceRun, Snapshot
from spanwise.runtime.emulate import Ledger, PacedTransport, ledger_path
from spanwise.runtime.executor import StepResult
from spanwise.runtime.feed import Rows
from spanwise.runtime.link_probe import probe_link
from spanwise.runtime.local import LocalFabric
from spanwise.runtime.migrate import Change
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
from spanwise.runtime.transport import Transport

_END = -1
_Done = tuple[str, StepReport | BaseException]


class ThreadSession:
    """One thread a device; messages go through a mailbox."""

    def __init__(
        self,
        assignment: Assignment,
        tensors: dict[str, Tensor],
        data: Rows,
        *,
        resume: Snapshot | None = None,
        wrap: Callable[[str, Transport], Transport] = lambda _, transport: transport,
    ) -> None:
        """Builds every device's part; ``wrap`` puts something around its transport, such as a recorder."""
        keep_freed_memory_of_threads()
        self._assignment, self._data, self._wrap = assignment, data, wrap
        self._fabric = LocalFabric()
        self._ledger_path: Path | None = ledger_path() if assignment.emulate else None
        self._transports: dict[str, Transport] = {}
        self._runs: dict[str, DeviceRun] = {}
        for device in assignment.plan.devices:
            run = DeviceRun(assignment, device, self._transport(device), tensors=tensors, data=data)
            if resume is not None:
                run.resume(resume.optimizer, resume.options, resume.scheduler)
            if assignment.emulate:
                run.calibrate()
            self._runs[device] = run

    def run(self, first: int, count: int, guide: Guide | None = None) -> Iterator[StepReport]:
        """Starts a thread a device, yields steps as they end."""
        done: queue.SimpleQueue[_Done] = queue.SimpleQueue()
        horizon = Horizon(first, count, guide)
        limits = {device: queue.SimpleQueue[int]() for device in self._runs}
        threads: list[threading.Thread] = []
        for device, run in self._runs.items():
            limits[device].put(horizon.step)
            work = (device, run, first, limits[device], done)
            threads.append(threading.Thread(target=_work, args=work, name=f"device-{device}", daemon=True))
            threads[-1].start()
        try:
            yield from self._gathered(first, horizon, guide, limits, done)
        except BaseException as error:
            reason = str(error) if isinstance(error, SpanwiseError) else f"{type(error).__name__}: {error}"
            self._fabric.fail(f"the run ended on another device: {reason}")
            raise
        finally:
            for limit in limits.values():
                limit.put(_END)
            for thread in threads:
                thread.join(10.0)
        if any(thread.is_alive() for thread in threads):  # pragma: no cover - a hung kernel
            raise PeerError("threads: a device did not end within 10 s")

    def _gathered(
        self, first: int, horizon: Horizon, guide: Guide | None,
        limits: Mapping[str, queue.SimpleQueue[int]], done: queue.SimpleQueue[_Done],
    ) -> Iterator[StepReport]:  # fmt: skip
        """Reports of whole steps; hands steps out as far as the horizon goes."""
        gatherer, step = StepGatherer(tuple(self._runs)), first
        while step < horizon.step:
            device, result = done.get()
            if isinstance(result, BaseException):
                raise result
            report = gatherer.add(device, result)
            if report is None:
                continue
            step = report.step + 1
            yield report
            if guide is not None:
                for probe in guide.wanted_probes():
                    guide.probed(probe, self._probe(probe))
            before = horizon.step
            if horizon.heard(report) > before:
                for limit in limits.values():
                    limit.put(horizon.step)

    def _probe(self, probe: Probe) -> tuple[tuple[int, float], ...]:
        """Measures a link beside the steps: threads here have no queue of orders to stand in."""
        ends = ((probe.source, probe.target, True), (probe.target, probe.source, False))
        with ThreadPoolExecutor(2, "probe") as pool:
            futures = [
                pool.submit(probe_link, self._transport(a), b, first=first, sizes=probe.sizes)
                for a, b, first in ends
            ]
            return tuple(futures[0].result())

    def stage_times(self) -> tuple[StageTimes, ...]:
        """Here in the calling thread, while no other runs."""
        return tuple(times for run in self._runs.values() for times in run.stage_times())

    def switch(self, assignment: Assignment, links: Sequence[LinkTimes] = ()) -> Switched:
        """Goes on under another plan; all devices send, receive and build at once, a thread each."""
        start, before = time.monotonic(), self._assignment
        found = moves(before.plan, assignment.plan, before.graph, before.cluster, links)
        devices = tuple(dict.fromkeys((*before.plan.devices, *assignment.plan.devices)))
        changes = {
            d: Change(assignment, d, self._transport(d), found, self._runs.get(d), before.plan, self._data)
            for d in devices
        }
        with ThreadPoolExecutor(len(devices), "switch") as pool:
            futures = {device: pool.submit(change.carry_out) for device, change in changes.items()}
            try:
                built = {device: future.result() for device, future in futures.items()}
            except BaseException as error:
                self._fabric.fail(f"the change of plans failed on another device: {error}")
                raise
        self._runs = {d: run for d in assignment.plan.devices if (run := built[d]) is not None}
        self._assignment = assignment
        ready = time.monotonic()
        for run in self._runs.values() if assignment.emulate else ():
            run.calibrate()
        moved = sum(change.received_bytes for change in changes.values())
        return Switched(moved, ready - start, time.monotonic() - ready)

    def snapshot(self) -> Snapshot:
        """All state after the last step."""
        return merge_states(self._assignment, {d: run.state() for d, run in self._runs.items()})

    def spans(self) -> tuple[DeviceSpans, ...]:
        """What the devices recorded; memory is not known apart, as they share a process."""
        return tuple(
            DeviceSpans(
                device,
                tuple((r.step, r.start, r.end, r.busy_s, tuple(r.spans)) for r in run.recorder.records),
                0,
            )
            for device, run in self._runs.items()
        )

    def fail(self, error: SpanwiseError) -> None:
        """Wakes every device that waits, with this as the reason."""
        self._fabric.fail(str(error))

    def close(self) -> None:
        """Ends all threads and removes the ledger."""
        for run in self._runs.values():
            run.close()
        for transport in self._transports.values():
            transport.close()
        if self._ledger_path is not None:
            self._ledger_path.unlink(missing_ok=True)

    def _transport(self, device: str) -> Transport:
        if device not in self._transports:
            transport: Transport = self._fabric.transport(device)
            if self._ledger_path is not None:
                cluster = self._assignment.cluster
                transport = PacedTransport(transport, device, cluster, Ledger(self._ledger_path, cluster))
            self._transports[device] = self._wrap(device, transport)
        return self._transports[device]


def _work(
    device: str, run: DeviceRun, step: int, limits: queue.SimpleQueue[int], done: queue.SimpleQueue[_Done]
) -> None:
    """One device: goes on up to each step that it is told, until it is told to end."""

    def tell(result: StepResult, seen: DeviceStep | None) -> None:
        record = result.record
        observed = () if seen is None else (seen,)
        done.put((device, StepReport(result.step, result.loss, record.start, record.end, observed)))

    try:
        while (limit := limits.get()) != _END:
            run.run(step, limit - step, tell)
            step = limit
    except BaseException as error:
        done.put((device, error))
