"""A session on threads of this process: for tests, for one device, for reading the code."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from spanwise.core.errors import PeerError, SpanwiseError
from spanwise.runtime.device_run import Assignment, DeviceRun, Snapshot
from spanwise.runtime.emulate import Ledger, PacedTransport, ledger_path
from spanwise.runtime.executor import StepResult
from spanwise.runtime.feed import Rows
from spanwise.runtime.local import LocalFabric
from spanwise.runtime.session import DeviceSpans, StepGatherer, StepReport, merge_states
from spanwise.runtime.transport import Transport


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
        self._assignment = assignment
        self._fabric = LocalFabric()
        self._ledger_path: Path | None = ledger_path() if assignment.emulate else None
        self._transports: list[Transport] = []
        self._runs: dict[str, DeviceRun] = {}
        for device in assignment.plan.devices:
            transport = self._transport(device, wrap)
            run = DeviceRun(assignment, device, transport, tensors=tensors, data=data)
            if isinstance(transport, PacedTransport):
                transport.on_passed = run.recorder.passed
            if resume is not None:
                run.resume(resume.optimizer, resume.options, resume.scheduler)
            run.calibrate()
            self._runs[device] = run

    def run(self, first: int, count: int) -> Iterator[StepReport]:
        """Starts a thread a device, yields steps as they end."""
        done: queue.SimpleQueue[tuple[str, StepResult | BaseException | None]] = queue.SimpleQueue()
        gatherer = StepGatherer(tuple(self._runs))

        def work(device: str, run: DeviceRun) -> None:
            try:
                run.run(first, count, lambda result: done.put((device, result)))
                done.put((device, None))
            except BaseException as error:
                done.put((device, error))

        threads = [
            threading.Thread(target=work, args=(device, run), name=f"device-{device}", daemon=True)
            for device, run in self._runs.items()
        ]
        for thread in threads:
            thread.start()
        left = len(threads)
        try:
            while left:
                device, result = done.get()
                if result is None:
                    left -= 1
                elif isinstance(result, BaseException):
                    raise result
                else:
                    report = gatherer.add(
                        device, result.step, result.loss, result.record.start, result.record.end
                    )
                    if report is not None:
                        yield report
        except BaseException as error:
            reason = str(error) if isinstance(error, SpanwiseError) else f"{type(error).__name__}: {error}"
            self._fabric.fail(f"the run ended on another device: {reason}")
            raise
        finally:
            for thread in threads:
                thread.join(10.0)
        if any(thread.is_alive() for thread in threads):  # pragma: no cover - a hung kernel
            raise PeerError("threads: a device did not end within 10 s")

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
        for transport in self._transports:
            transport.close()
        if self._ledger_path is not None:
            self._ledger_path.unlink(missing_ok=True)

    def _transport(self, device: str, wrap: Callable[[str, Transport], Transport]) -> Transport:
        transport: Transport = self._fabric.transport(device)
        if self._ledger_path is not None:
            cluster = self._assignment.cluster
            transport = PacedTransport(transport, device, cluster, Ledger(self._ledger_path, cluster))
        transport = wrap(device, transport)
        self._transports.append(transport)
        return transport
