"""A session on worker processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from spanwise.core.errors import PeerError, SpanwiseError
from spanwise.core.job import LIVE
from spanwise.core.observed import DeviceStep
from spanwise.core.profile import LinkTimes, StageTimes
from spanwise.cost.training import optimizer_copies
from spanwise.lowering import Move, move_bytes, moves
from spanwise.runtime import orders
from spanwise.runtime.control import Frame
from spanwise.runtime.device_run import Assignment, Snapshot
from spanwise.runtime.feed import Rows, read_rows
from spanwise.runtime.pool import SETUP_S, WorkerPool
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
        self._coordinator.gather("ready", self._devices, SETUP_S)
        if assignment.observe:
            self._acquaint([device for device in pool.devices if device not in self._known])
        if assignment.emulate:
            self.stage_times()

    def _acquaint(self, others: Sequence[str]) -> None:
        """Tells devices without a part of the run, as it may come to have one for them."""
        for device in others:
            self._coordinator.tell(device, "acquaint", **orders.whole(self._assignment))
        self._coordinator.gather("acquainted", others, SETUP_S)
        self._known.update(others)

    def stage_times(self) -> tuple[StageTimes, ...]:
        """Each device in turn, so that it is undisturbed; what it knows already it does not time again."""
        found: list[StageTimes] = []
        for device in self._devices:
            self._coordinator.tell(device, "calibrate")
            frames = self._coordinator.gather("calibrated", (device,), SETUP_S)
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
        step, report = first, None
        try:
            while step < horizon.step or horizon.held_s(report) > 0:
                event = self._next_event(horizon.held_s(report))
                found = None if event is None else self._taken(*event, gatherer, guide)
                if found is not None:
                    step, report = found.step + 1, found
                    yield found
                    for probe in guide.wanted_probes() if guide is not None else ():
                        self._ask(probe)
                if report is not None:
                    before = horizon.step
                    self._order(before, horizon.heard(report))
        except GeneratorExit:
            raise
        except SpanwiseError as error:
            self._coordinator.fail(error)
            raise

    def _next_event(self, most_s: float) -> tuple[str, Frame] | None:
        """The next frame of any device; none if ``most_s`` is not zero and nothing came within it."""
        if most_s > 0:
            return self._coordinator.event_within(most_s)
        patience = 4 * self._assignment.job.transfer_timeout_s + 60.0
        return self._coordinator.next_event(patience, f"step of {self._devices}")

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

    def _taken(
        self, device: str, frame: Frame, gatherer: StepGatherer, guide: Guide | None
    ) -> StepReport | None:
        """Takes a frame in; the step that has ended with it, if one has."""
        if frame.kind == "step":
            return gatherer.add(device, self._part(device, frame.head))
        if frame.kind == "probed" and guide is not None:
            samples = tuple((int(n), float(t)) for n, t in frame.head["samples"])
            if samples:  # none from the end that answers
                guide.probed(Probe(device, str(frame.head["peer"]), tuple(n for n, _ in samples)), samples)
        return None

    def _part(self, device: str, head: dict[str, Any]) -> StepReport:
        shift = self._pool.clock_offset_s(device)
        seen = head.get("observed")
        return StepReport(
            int(head["step"]), float(head["loss"]), float(head["start"]) - shift, float(head["end"]) - shift,
            () if seen is None else (DeviceStep.parse(device, seen, shift),),
        )  # fmt: skip

    def switch(self, assignment: Assignment, links: Sequence[LinkTimes] = ()) -> Switched:
        """Goes on under another plan; its devices must be of the pool.

        State travels between the devices; only rows of live data, for a device that becomes a source, come
        from here.
        """
        start, before = time.monotonic(), self._assignment
        found = moves(before.plan, assignment.plan, before.graph, before.cluster, links)
        change: dict[str, Any] = {"before": before.plan.to_data(), "moves": orders.moves_data(found)}
        devices = tuple(dict.fromkeys((*before.plan.devices, *assignment.plan.devices)))
        for device in devices:
            head = orders.plan_only(assignment) if device in self._known else orders.whole(assignment)
            rows = self._live_rows(assignment, device)
            payload = safetensors.torch.save(rows) if rows else b""
            self._coordinator.tell(device, "switch", payload, **head, **change)
        self._known.update(devices)
        frames = self._coordinator.gather("switched", devices, SETUP_S + self._moving_s(found))
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
        for device, frame in self._coordinator.gather("collected", self._devices, SETUP_S).items():
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
        for device, frame in self._coordinator.gather("spanned", self._devices, SETUP_S).items():
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
