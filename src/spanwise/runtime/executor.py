"""Runs one device's actions in order. The only place where a Program becomes compute."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from spanwise.core.errors import PeerError
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.program import SEGMENTS, Action, Program
from spanwise.core.syncs import ServerSync
from spanwise.cost.halves import portions
from spanwise.ops.deferred import Deferred, run_together
from spanwise.runtime.assembly import Tensors, cut
from spanwise.runtime.collectives import exchange_sum, ring_all_reduce
from spanwise.runtime.exchange import Exchange, gradient
from spanwise.runtime.feed import Feed
from spanwise.runtime.groups import Groups
from spanwise.runtime.inbox import Inbox
from spanwise.runtime.outbox import Outbox
from spanwise.runtime.parts import DeviceParts, Pace
from spanwise.runtime.recorder import Recorder, StepRecord
from spanwise.runtime.tags import Tags
from spanwise.runtime.transport import Transport
from spanwise.runtime.wire import pack

_BLOCKED_S = 5e-5  # a wait shorter than this is no wait

_Key = tuple[str, int, int]  # payload, stage (before the cut) or sync, micro-batch or segment


@dataclass(frozen=True)
class StepResult:
    """``loss`` is this device's part of the mean loss over the global batch."""

    step: int
    loss: float
    record: StepRecord


class Executor:
    """Takes one device through the actions of a step, again and again."""

    def __init__(
        self,
        parts: DeviceParts,
        plan: Plan,
        graph: ModelGraph,
        program: Program,
        transport: Transport,
        *,
        recorder: Recorder,
        pace: Pace,
        feed: Feed | None = None,
        clip_norm: float | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._parts, self._plan, self._graph, self._program = parts, plan, graph, program
        self._transport, self._recorder, self._pace = transport, recorder, pace
        self._feed, self._clip, self._timeout_s = feed, clip_norm, timeout_s
        self._me = parts.device
        self._actions = program.devices.get(self._me, ())
        self._tags = Tags.of(program)
        self._last = len(plan.stages) - 1
        self._handlers: dict[str, Callable[[Action], None]] = {
            "load": self._load, "send": self._send, "recv": self._recv, "forward": self._forward,
            "backward": self._backward, "backward_input": self._backward,
            "backward_weight": self._backward_weight,
            "reduce": self._reduce, "norm": self._norm, "update": self._update_segment,
            "step": self._update, "average": self._pass_on, "broadcast": self._pass_on,
        }  # fmt: skip
        self._in_halves = {(a.stage, a.micro_batch) for a in self._actions if a.kind == "backward_input"}
        self._sends = Counter(_key(a) for a in self._actions if a.kind == "send")
        self._exchange = Exchange(self._me, plan, program, parts.parameters, parts.optimizer)
        self._inbox = Inbox(parts, plan, graph, program, transport, self._exchange, self._tags)
        self._outbox = Outbox(self._me, self._timeout_s)
        # A thread a sync: segments follow each other, and no sync can keep another from its peers.
        self._rings = {
            number: ThreadPoolExecutor(1, f"ring-{self._me}-{number}")
            for number, sync in enumerate(plan.syncs)
            if not isinstance(sync, ServerSync) and self._me in sync.devices
        }
        self._groups = None
        if parts.trained is not None and plan.sparse:
            self._groups = Groups(self._me, plan, program, parts.trained, transport, self._tags, timeout_s)
        self._reset(-1)

    def step(self, index: int, *, more: bool = False) -> StepResult:
        """One training step. ``PeerError`` names the device and the action at which it failed.

        What a server sent in the step before is taken in on the way. The first step, and the one after
        ``settle``, waits for none of it. ``more``: step ``index + 1`` will follow, so that what comes for it
        may come during this one.
        """
        self._reset(index)
        self._recorder.begin(index)
        self._inbox.begin(index, more=more)
        for action in self._actions:
            self._do(action, self._handlers[action.kind])
        if self._reductions:  # that pass values on after the update
            self._finish_reductions()
        self._outbox.drain()
        loss = float(self._loss) if self._loss is not None else 0.0
        return StepResult(index, loss, self._recorder.end())

    def settle(self) -> None:
        """Takes in what a server sent for a next step: then all copies of a parameter are equal."""
        for action in self._inbox.crossed:
            self._do(action, self._settle)

    def _settle(self, action: Action) -> None:
        receipt = self._inbox.take_crossed(action)
        receipt.pending.wait(self._timeout_s)
        self._exchange.arrived(action, receipt.values)

    def _do(self, action: Action, handler: Callable[[Action], None]) -> None:
        try:
            handler(action)
        except PeerError as error:
            where = f"{self._me}: step {self._step}, '{action}'"
            raise PeerError(f"{where}: {error}", device=error.device) from None

    def close(self) -> None:
        """Takes in what is on its way and stops the threads that run reductions and watch over sends.

        A receive that is given up leaves its message in the way of all that follow on the connection.
        """
        with suppress(PeerError):
            self.settle()
        self._outbox.close()
        for ring in self._rings.values():
            ring.shutdown(wait=False, cancel_futures=True)

    def _reset(self, index: int) -> None:
        self._step = index
        self._exchange.reset()
        self._scale: Tensor | None = None
        self._outgoing: dict[_Key, tuple[int, Tensors]] = {}
        self._unsent = dict(self._sends)
        self._saved: dict[tuple[int, int], tuple[Tensors, Tensors]] = {}
        self._deferred: dict[tuple[int, int], Deferred] = {}
        self._reductions: list[tuple[Action, Future[None]]] = []
        self._loss: Tensor | None = None
        self._scaled = False

    def _tag(self, number: int, ahead: int = 0) -> int:
        return self._tags.tag(self._step + ahead, number)

    # Receiving

    def _recv(self, action: Action) -> None:
        receipt = self._inbox.take(action)
        if receipt is not None:  # nothing has crossed into a first step
            start = time.monotonic()
            receipt.pending.wait(self._timeout_s)
            end = time.monotonic()
            if end - start > _BLOCKED_S:
                self._recorder.span("wait", action, start, end, busy=False)
                self._pace.idle()
            if action.payload in SEGMENTS:
                self._exchange.arrived(action, receipt.values)
        self._inbox.post()

    # Sending

    def _send(self, action: Action) -> None:
        key = _key(action)
        if action.payload in SEGMENTS:
            if key not in self._outgoing:
                self._outgoing[key] = (0, self._exchange.outgoing(action))
            values = self._outgoing[key][1]
        else:
            base, tensors = self._outgoing[key]
            values = pack(cut(tensors, base, action.rows), action.precision)
        tag = self._tag(action.transfer, ahead=action.crosses)
        pending = self._transport.send(action.peer, tag, values)
        self._outbox.put(f"{self._me}: step {self._step}, '{action}'", pending)
        self._unsent[key] -= 1
        if not self._unsent[key]:
            del self._outgoing[key]

    def _load(self, action: Action) -> None:
        """Own data rows: kept for sends, and handed to own stages where they are used here."""
        assert self._feed is not None
        m, rows = action.micro_batch, action.rows
        inputs, labels = self._feed.rows(self._step, m)
        inputs = tuple(t.to(self._parts.torch_device) for t in inputs)
        labels = tuple(t.to(self._parts.torch_device) for t in labels)
        for payload, tensors, stage in (("input", inputs, 0), ("label", labels, self._last)):
            self._hand_over(payload, -1, m, rows, stage, tensors)

    # Compute

    def _forward(self, action: Action) -> None:
        s, m = action.stage, action.micro_batch
        start = time.monotonic()
        with self._pace.work("forward", s):
            entry = ("input", -1) if s == 0 else ("activation", s - 1)
            specs = self._inbox.specs(*entry)
            inputs = tuple(
                tensor.detach().requires_grad_(spec.differentiable and s > 0)
                for tensor, spec in zip(self._inbox.whole(*entry, m), specs, strict=True)
            )
            labels: Tensors = ()
            if s == self._last and self._graph.labels:
                labels = self._inbox.whole("label", -1, m)
            later = None
            if (s, m) in self._in_halves:
                later = self._deferred[s, m] = Deferred()
            outputs = self._parts.stages[s](inputs, labels, later)
            if s == self._last:
                share = (action.rows[1] - action.rows[0]) / self._plan.batch
                outputs = (outputs[0] * share,)
                part = outputs[0].detach()
                self._loss = part if self._loss is None else self._loss + part
        self._recorder.span("forward", action, start, time.monotonic(), busy=True)
        self._saved[s, m] = (inputs, outputs)
        if s != self._last:
            self._hand_over("activation", s, m, action.rows, s + 1, tuple(t.detach() for t in outputs))

    def _backward(self, action: Action) -> None:
        """The whole backward, or its input half where the forward pass deferred the weight gradients."""
        s, m = action.stage, action.micro_batch
        inputs, outputs = self._saved.pop((s, m))
        start = time.monotonic()
        with self._pace.work(action.work, s):
            if s == self._last:
                if outputs[0].requires_grad:  # a device may train nothing
                    outputs[0].backward()  # pyright: ignore[reportUnknownMemberType]
            else:
                specs = self._inbox.specs("activation", s)
                gradients = self._inbox.whole("gradient", s, m)
                targets = [t for t, spec in zip(outputs, specs, strict=True) if spec.differentiable]
                pairs = [(t, g) for t, g in zip(targets, gradients, strict=True) if t.requires_grad]
                if pairs:
                    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
            own = tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in inputs if t.requires_grad)
        self._recorder.span(action.kind, action, start, time.monotonic(), busy=True)
        if s > 0:
            self._hand_over("gradient", s - 1, m, action.rows, s - 1, own)

    def _backward_weight(self, action: Action) -> None:
        waiting = [self._deferred[action.stage, m] for m in action.micro_batches]
        layers, rows = self._graph.layers, action.rows[1] - action.rows[0]
        start = time.monotonic()
        with self._pace.work(action.work, action.stage):
            run_together(
                waiting, *(action.layers or ()), portions=lambda i: portions(layers[i], rows, action.at_once)
            )
        self._recorder.span("backward_weight", action, start, time.monotonic(), busy=True)

    def _hand_over(
        self, payload: str, stage: int, m: int, rows: tuple[int, int], to: int, tensors: Tensors
    ) -> None:
        """Makes rows ready for sends, and for stage ``to`` if this device holds rows of it too."""
        if self._sends.get((payload, stage, m)):
            self._outgoing[payload, stage, m] = (rows[0], tensors)
        self._inbox.put((payload, stage, m), rows, to, tensors)

    # Gradients

    def _reduce(self, action: Action) -> None:
        self._reductions.append((action, self._rings[action.sync].submit(self._sum, action)))

    def _sum(self, action: Action) -> None:
        if self._groups is not None and action.sync in self._groups:
            self._groups.sum(action, self._step)
            return
        names = self._program.buckets[action.sync][action.segment]
        parameters = [self._parts.parameters[name] for name in names]
        gradients = [gradient(p) for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        tag = self._tag(self._tags.rings[action.sync][action.segment])
        ring_all_reduce(self._transport, action.members, self._me, flat, tag=tag, timeout_s=self._timeout_s)
        parts = flat.split_with_sizes([g.numel() for g in gradients])
        for own, part in zip(gradients, parts, strict=True):
            own.copy_(part.view_as(own))

    def _pass_on(self, action: Action) -> None:
        """Gives values of units to those who do not train them, beside whatever follows."""
        assert self._groups is not None
        if action.due(self._step):
            work = self._groups.average if action.kind == "average" else self._groups.broadcast
            self._reductions.append((action, self._rings[action.sync].submit(work, action, self._step)))

    def _finish_reductions(self) -> None:
        start = time.monotonic()
        for action, future in self._reductions:
            try:
                # A ring's own messages have deadlines; this one only guards against a lost thread.
                future.result(self._timeout_s * (2 * len(action.members) + 1))
            except PeerError as error:
                raise PeerError(f"'{action}': {error}", device=error.device) from None
            except TimeoutError:
                raise PeerError(f"'{action}': not done in time") from None
        if self._reductions and time.monotonic() - start > _BLOCKED_S:
            last = self._reductions[-1][0]
            self._recorder.span("wait", last, start, time.monotonic(), busy=False)
            self._pace.idle()
        self._reductions.clear()
        if self._groups is not None and not self._scaled:
            self._scaled = True
            self._groups.scale()

    def _norm(self, action: Action) -> None:
        """Global gradient norm over all devices; a parameter counts where it is held first."""
        self._finish_reductions()
        own = torch.zeros((), dtype=torch.float64)
        trained = self._parts.trained
        for name in self._program.owned.get(self._me, ()):
            found = trained.gradient(name) if trained is not None else gradient(self._parts.parameters[name])
            own += found.detach().double().pow(2).sum().cpu()
        start = time.monotonic()
        total = exchange_sum(
            self._transport, action.members, self._me, own,
            tag=self._tag(self._tags.norm), timeout_s=self._timeout_s,
        )  # fmt: skip
        self._recorder.span("wait", action, start, time.monotonic(), busy=False)
        self._pace.idle()
        assert self._clip is not None
        self._scale = (self._clip / (total.sqrt() + 1e-6)).clamp(max=1.0)

    def _update_segment(self, action: Action) -> None:
        start = time.monotonic()
        with self._pace.work(action.kind, -1):
            self._exchange.update(action, self._scale)
        self._recorder.span(action.kind, action, start, time.monotonic(), busy=True)

    def _update(self, action: Action) -> None:
        self._finish_reductions()
        optimizer = self._parts.optimizer
        start = time.monotonic()
        if optimizer is None:
            return
        with self._pace.work("step", -1):
            trained = self._parts.trained
            if self._scale is not None:
                leaves = self._parts.parameters if trained is None else trained.leaves
                for parameter in leaves.values():
                    if parameter.grad is not None:
                        parameter.grad.mul_(self._scale.to(parameter.grad.dtype))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if trained is not None:
                trained.write_back()
        self._recorder.span("step", action, start, time.monotonic(), busy=True)


def _key(action: Action) -> _Key:
    """What a send takes its values from: several sends may share it."""
    if action.payload in SEGMENTS:
        return action.payload or "", action.sync, action.segment
    return action.payload or "", action.stage, action.micro_batch
