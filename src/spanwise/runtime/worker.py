"""The one worker process: joins a coordinator, builds its part of the plan, runs it, ends with it."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from spanwise.core.cluster import EVERYWHERE, Cluster
from spanwise.core.errors import InputError, PeerError, SpanwiseError
from spanwise.core.job import LIVE
from spanwise.core.observed import DeviceStep
from spanwise.core.plan import Plan
from spanwise.ops.allocator import give_back_what_is_free, give_freed_memory_back, keep_freed_memory
from spanwise.runtime import orders
from spanwise.runtime.control import Channel, Frame, introduce, parse_endpoint
from spanwise.runtime.device_run import Assignment, DeviceRun
from spanwise.runtime.emulate import Ledger, PacedTransport
from spanwise.runtime.executor import StepResult
from spanwise.runtime.feed import Rows
from spanwise.runtime.imports import build, data_sets
from spanwise.runtime.joining import connect, machine, versions
from spanwise.runtime.link_probe import TIMEOUT_S, probe_link
from spanwise.runtime.memory import MemoryWatch
from spanwise.runtime.message_probe import message_cpu_s
from spanwise.runtime.migrate import Change
from spanwise.runtime.torch_dist import DistTransport, KeyValueStore, backend_for
from spanwise.runtime.transport import Transport

_HEARTBEAT_S = 1.0
_SILENT_S = 60.0  # the coordinator answers every heartbeat


# Answers a request of the coordinator: (head, payload) to (head, payload).
Service = Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]


def join(
    endpoint: str,
    device: str,
    token: str,
    *,
    services: Mapping[str, Service] = MappingProxyType({}),
    patience_s: float = 30.0,
    quiet: bool = False,
) -> int:
    """Works for a coordinator until it says stop. Returns the process's exit code.

    Args:
        endpoint: ``host:port`` of the coordinator.
        device: which device of the cluster this is.
        token: the run's secret.
        services: further requests that this worker answers, by name, such as ``profile``.
        patience_s: how long to wait for a coordinator to listen.
        quiet: the coordinator, who started this worker, says why the run ended; this one need not.

    Raises:
        JoinError: nobody listens there within ``patience_s``, or the handshake fails.
    """
    keep_freed_memory()
    host, port = parse_endpoint(endpoint)
    channel = Channel(connect(host, port, patience_s), endpoint)
    introduce(channel, token, device, {"versions": versions(), "machine": machine(), "cores": os.cpu_count()})
    return _Worker(channel, device, services, quiet).serve()


class _Worker:
    """Two threads: one reads frames and reacts to abort at once, this one obeys commands in order."""

    def __init__(self, channel: Channel, device: str, services: Mapping[str, Service], quiet: bool) -> None:
        self.channel, self.device, self.services, self.quiet = channel, device, services, quiet
        self.commands: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self.values: dict[str, bytes] = {}
        self.arrived = threading.Condition()
        self.assignment: Assignment | None = None
        self.data: Rows | None = None
        self.held = False  # whether ``data`` is only what this device reads
        self.run: DeviceRun | None = None
        self.transport: Transport | None = None
        self.memory = MemoryWatch()
        self.heard = time.monotonic()

    def serve(self) -> int:
        for target in (self._read, self._beat):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        while True:
            frame = self.commands.get()
            if frame.kind == "stop":
                self._close()
                return 0
            try:
                self._obey(frame)
            except SpanwiseError as error:
                return self._report(type(error).__name__, str(error), error.exit_code)
            except Exception as error:
                traceback.print_exc()
                reason = f"device '{self.device}': {type(error).__name__}: {str(error).splitlines()[0][:300]}"
                return self._report("PeerError", reason, 6)

    def _obey(self, frame: Frame) -> None:
        commands = {
            "meet": self._on_meet, "probe": self._on_probe, "service": self._on_service,
            "exchange": self._on_exchange, "setup": self._on_setup, "calibrate": self._on_calibrate,
            "switch": self._on_switch, "run": self._on_run, "collect": self._on_collect,
            "spans": self._on_spans, "acquaint": self._on_acquaint,
        }  # fmt: skip
        if frame.kind not in commands:
            raise PeerError(f"device '{self.device}': the coordinator asked for unknown '{frame.kind}'")
        commands[frame.kind](frame)

    def _report(self, kind: str, reason: str, code: int) -> int:
        """Tells the coordinator, then waits for its verdict: the cause may lie with another device."""
        try:
            self.channel.send("error", error=kind, reason=reason)
            time.sleep(8.0)  # abort ends this process sooner
        except PeerError:
            pass
        return code

    def _read(self) -> None:
        while True:
            try:
                frame = self.channel.receive()
            except PeerError:
                self._end(f"{self.device}: the coordinator is gone; this worker ends", PeerError.exit_code)
                return
            self.heard = time.monotonic()
            if frame.kind == "abort":
                self._end(f"{self.device}: {frame.head.get('reason')}", int(frame.head.get("code", 6)))
            elif frame.kind == "value":
                with self.arrived:
                    self.values[frame.head["key"]] = frame.payload
                    self.arrived.notify_all()
            elif frame.kind == "ping":
                self._pong(frame)
            else:
                self.commands.put(frame)
                if frame.kind == "stop":
                    return

    def _end(self, reason: str, code: int) -> None:
        """Ends the process at once: a transfer that hangs cannot keep it."""
        if not self.quiet:
            print(reason, file=sys.stderr, flush=True)
        os._exit(code)

    def _beat(self) -> None:
        while True:
            if time.monotonic() - self.heard > _SILENT_S:
                self._end(f"{self.device}: the coordinator is silent; this worker ends", PeerError.exit_code)
            try:
                self.channel.send("heartbeat")
            except PeerError:
                return
            time.sleep(_HEARTBEAT_S)

    def _pong(self, frame: Frame) -> None:
        """Answers at once, so that the coordinator learns how far the clocks are apart."""
        with contextlib.suppress(PeerError):  # its end is noticed by the next read
            self.channel.send("pong", stamp=frame.head["stamp"], clock=time.monotonic())

    def _put(self, key: str, value: bytes) -> None:
        self.channel.send("put", value, key=key)

    def _fetch(self, key: str, timeout_s: float) -> bytes:
        with self.arrived:
            known = key in self.values
        if not known:
            self.channel.send("get", key=key)
        with self.arrived:
            if not self.arrived.wait_for(lambda: key in self.values, timeout_s):
                raise PeerError(f"{self.device}: meeting the other devices took more than {timeout_s:g} s")
            return self.values[key]

    def _close(self) -> None:
        if self.run is not None:
            self.run.close()
        if self.transport is not None:
            self.transport.close()

    def _on_meet(self, frame: Frame) -> None:
        """Connects to the other devices."""
        head = frame.head
        cluster = Cluster.parse(head["cluster"])
        spec = cluster.device(self.device)
        torch.set_num_threads(spec.threads)
        members = [cluster.device(d) for d in head["members"]]
        epoch = int(head["epoch"])
        store = KeyValueStore(
            lambda key, value: self._put(f"{epoch}/{key}", value),
            lambda key, timeout_s: self._fetch(f"{epoch}/{key}", timeout_s),
            float(head["timeout_s"]),
        )
        self.transport = DistTransport(
            store,
            self.device,
            tuple(head["members"]),
            backend=backend_for(members),
            address=spec.address or "127.0.0.1",
            timeout_s=float(head["timeout_s"]),
        )
        if head.get("ledger"):
            ledger = Ledger(Path(head["ledger"]), cluster)
            self.transport = PacedTransport(self.transport, self.device, cluster, ledger)
        self.channel.send("met")

    def _on_probe(self, frame: Frame) -> None:
        """Measures the link to a peer, together with it."""
        assert self.transport is not None
        head = frame.head
        samples = probe_link(
            self.transport, head["peer"], first=bool(head["first"]), sizes=tuple(head["sizes"]),
            timeout_s=float(head.get("timeout_s", TIMEOUT_S)),
        )  # fmt: skip
        self.channel.send("probed", peer=head["peer"], samples=samples)

    def _on_exchange(self, frame: Frame) -> None:
        """Measures what a message costs this device, while all devices send to their next."""
        assert self.transport is not None
        each_s, byte_s = message_cpu_s(self.transport, frame.head["before"], frame.head["after"])
        self.channel.send("exchanged", message_s=each_s, message_s_per_byte=byte_s)

    def _on_setup(self, frame: Frame) -> None:
        """Builds this device's part of the plan."""
        assert self.transport is not None
        head, parts = frame.head, orders.parts(frame.payload)
        self.memory = MemoryWatch()
        assignment = self._begin(head, parts["data"])
        self.run = DeviceRun(
            assignment, self.device, self.transport, tensors=parts["state"], data=self.data, held=self.held
        )
        if head.get("resume"):
            self.run.resume(parts["optimizer"], head["resume"]["options"], head["resume"]["scheduler"])
        self.channel.send("ready")

    def _on_acquaint(self, frame: Frame) -> None:
        """Learns of a run in which it has no part yet, so that a change that gives it one takes no longer."""
        self._begin(frame.head, {})
        self.channel.send("acquainted")

    def _on_switch(self, frame: Frame) -> None:
        """Goes over to another plan, together with the other devices of both."""
        assert self.transport is not None
        head, data = frame.head, orders.parts(frame.payload)["data"]
        if orders.is_whole(head):
            assignment = self._begin(head, data)
        else:
            assert self.assignment is not None
            assignment = self.assignment = orders.read_plan(head, self.assignment)
            self._take_data(assignment, data)
        moves, before = orders.read_moves(head["moves"]), Plan.parse(head["before"])
        change = Change(
            assignment, self.device, self.transport, moves, self.run, before, self.data, self.held
        )
        self.run = change.carry_out()
        self.channel.send("switched", received_bytes=change.received_bytes)

    def _begin(self, head: dict[str, Any], data: dict[str, Tensor]) -> Assignment:
        """A run from the ground up: nothing of an earlier one stays."""
        if self.run is not None:
            self.run.close()
        self.run, self.data = None, None
        self.assignment = orders.read_whole(head)
        # What is not kept must not stay as holes between what is, where memory has no room for them.
        (give_freed_memory_back if self._hands_back else keep_freed_memory)()
        self._take_data(self.assignment, data)
        return self.assignment

    def _take_data(self, assignment: Assignment, sent: dict[str, Tensor]) -> None:
        """Keeps what arrived, or makes the data set once if this device reads it."""
        if sent:
            self.data, self.held = orders.sent_data(sent), True
        elif self.data is None and self._reads(assignment):
            named = assignment.job.data
            self.data, self.held = data_sets(build(named.name, named.args, "data"))[0], False

    def _on_calibrate(self, _: Frame) -> None:
        """Times this device's compute while the others rest."""
        assert self.run is not None
        self._make_room()
        self.channel.send("calibrated", stages=[times.to_data() for times in self.run.stage_times()])

    def _make_room(self) -> None:
        """Where memory is tight, what was needed only to take the state in goes back."""
        if self._hands_back:
            give_back_what_is_free()

    @property
    def _hands_back(self) -> bool:
        """Whether freed memory goes back at once."""
        a = self.assignment
        return a is not None and (a.plan.sparse or self.device in a.tight)

    def _reads(self, assignment: Assignment) -> bool:
        """Whether this device needs the data set now: as a source, or as one that may become it any time."""
        live = assignment.job.data.name == LIVE
        if self.device in [source.device for source in assignment.plan.sources]:
            if live:
                raise InputError(f"device '{self.device}': live data did not arrive")
            return True
        ahead = assignment.observe and assignment.cluster.data == EVERYWHERE
        return ahead and not live and self.device not in assignment.tight

    def _on_service(self, frame: Frame) -> None:
        """Answers one of the requests that this worker was started with."""
        name = str(frame.head.get("name"))
        if name not in self.services:
            raise InputError(f"device '{self.device}': knows no service '{name}'")
        head, payload = self.services[name](frame.head, frame.payload)
        self.channel.send("served", payload, **head)

    def _on_run(self, frame: Frame) -> None:
        """Runs steps and reports each as it ends."""
        assert self.run is not None
        self._make_room()
        self.run.run(int(frame.head["first"]), int(frame.head["count"]), self._on_step)

    def _on_step(self, result: StepResult, seen: DeviceStep | None) -> None:
        self.memory.sample()
        record = result.record
        self.channel.send(
            "step",
            step=result.step,
            loss=result.loss,
            start=record.start,
            end=record.end,
            busy_s=record.busy_s,
            observed=None if seen is None else seen.to_data(),
        )

    def _on_collect(self, frame: Frame) -> None:
        """Sends a copy of all state that a checkpoint needs, or only the names asked for."""
        assert self.run is not None
        state = self.run.state()
        wanted = frame.head.get("names")
        tensors = {f"state/{k}": v for k, v in state.parameters.items() if wanted is None or k in wanted}
        tensors |= {f"buffer/{k}": v for k, v in state.buffers.items()}
        tensors |= {
            f"optimizer/{k}": v
            for k, v in state.optimizer.items()
            if wanted is None or k.partition("::")[0] in wanted
        }
        self.channel.send(
            "collected",
            safetensors.torch.save(tensors),
            options=state.options,
            scheduler=state.scheduler,
        )

    def _on_spans(self, _: Frame) -> None:
        """Sends the recorded spans and the memory used."""
        assert self.run is not None
        records = [
            {"step": r.step, "start": r.start, "end": r.end, "busy_s": r.busy_s, "spans": r.spans}
            for r in self.run.recorder.records
        ]
        self.channel.send("spanned", records=records, peak_bytes=self.memory.peak_bytes())
