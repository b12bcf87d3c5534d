"""The event loop: devices take their actions in order, messages cross the network, reductions run beside."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import permutations
from typing import Any

from spanwise.core.errors import PlanError
from spanwise.core.program import Action, Program
from spanwise.cost import ring_edge_bytes, ring_rounds
from spanwise.simulator.memory import MemoryMeter
from spanwise.simulator.network import Network
from spanwise.simulator.setup import Costs, Way, Work, all_ways, ring_edges

_LOST = Action("step")  # what a lost device does not do


@dataclass(slots=True)
class _Message:
    action: Action
    step: int
    started: float = 0.0


@dataclass(slots=True)
class _Lane:
    """One device: where it is in its list. ``messages_s`` is what the messages of each action take of it.

    ``busy`` and ``sent`` are those of the Trace.
    """

    name: str
    actions: tuple[Action, ...]
    messages_s: list[float]
    busy: list[float]
    sent: list[float]
    channels: dict[str, _Channel] = field(default_factory=dict[str, "_Channel"])  # by receiver
    at: int = 0
    step: int = 0
    blocked_since: float | None = None
    reductions: int = 0  # own reductions that are not complete
    consumed: int = 0  # bytes received since the last compute
    unsent: int = 0  # own messages that have not arrived
    drains: bool = False  # all actions of the step taken; waits for them to arrive
    lost: bool = False
    feeds: bool = False  # only sends raw rows to others


@dataclass(slots=True)
class _Channel:
    """The messages of an ordered pair of devices, one after the other; the first is under way."""

    name: str
    source: _Lane
    target: str
    way: Way
    queue: deque[_Message] = field(default_factory=deque[_Message])


@dataclass(slots=True)
class Trace:
    """What the loop saw: ends of steps, busy seconds and sent bytes per step and device, spans.

    ``spans`` are the fields of ``Span``, to be validated all at once: one by one takes twice as long.
    """

    ends: list[float]
    busy: dict[str, list[float]]
    sent: dict[str, list[float]]
    spans: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def feeders(program: Program) -> frozenset[str]:
    """Devices that only send raw rows: nothing that others do holds them up."""
    return frozenset(
        device
        for device, actions in program.devices.items()
        if actions and all(action.kind in ("load", "send") for action in actions)
    )


class Engine:
    """Runs a Program ``steps`` times in virtual time."""

    def __init__(self, costs: Costs, *, steps: int, spans: bool) -> None:
        all_ways(costs)
        self.costs, self.steps, self.keep_spans = costs, steps, spans
        self.lanes = {
            d: _Lane(d, actions, costs.all_messages_s(d, actions), [0.0] * steps, [0.0] * steps)
            for d, actions in costs.program.devices.items()
        }
        self.memory = MemoryMeter(costs.base, points=spans)
        self.network = Network(costs.capacities, self._at)
        lanes = self.lanes.values()
        self.trace = Trace([0.0] * steps, {x.name: x.busy for x in lanes}, {x.name: x.sent for x in lanes})
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0
        self._texts: dict[int, str] = {}  # by identity: the actions of the Program outlive the loop
        self._arrived: set[tuple[int, int]] = set()
        self._waiting: dict[tuple[int, int], _Lane] = {}
        self._joined: dict[tuple[int, int, int], list[_Lane]] = {}
        self._ready: dict[tuple[int, int], deque[tuple[Action, list[_Lane]]]] = {}
        self._normed: dict[int, list[_Lane]] = {}
        feeding = feeders(costs.program)
        for name in feeding:
            self.lanes[name].feeds = True
        self._feeding = bool(feeding)

    def run(self) -> Trace:
        """Until every device has ended its last step, or nothing moves any more."""
        for lane in self.lanes.values():
            self._advance(lane, 0.0)
        now = 0.0
        events = self._events
        while events:
            now, _, call = heappop(events)
            call(now)
        stuck = [lane for lane in self.lanes.values() if lane.step < self.steps and not lane.lost]
        if stuck and not self.costs.faults:
            where = "; ".join(f"{x.name} at '{x.actions[x.at]}' of step {x.step}" for x in stuck)
            raise PlanError(f"simulation: it never ends; waiting: {where}")
        for lane in stuck:
            self._waited(lane, now)
        return self.trace

    def _at(self, when: float, call: Callable[[float], None]) -> None:
        self._count += 1
        heappush(self._events, (when, self._count, call))

    # Devices

    def _advance(self, lane: _Lane, now: float) -> None:
        """Takes actions until one takes time or must wait."""
        if lane.blocked_since is not None:
            self._waited(lane, now)
        while lane.step < self.steps and not lane.lost:
            if lane.at == 0 and self.costs.faults and self.costs.lost(lane.name, lane.step):
                lane.lost = True
                self._span(lane.name, "lost", _LOST, now, now, lane.step)
                return
            if lane.at == 0 and self._is_ahead(lane):
                return
            if lane.at == len(lane.actions):
                lane.drains = lane.unsent > 0  # so that sources do not run ahead by whole steps
                if lane.drains:
                    return
                self.trace.ends[lane.step] = max(self.trace.ends[lane.step], now)
                lane.step, lane.at = lane.step + 1, 0
                if self._feeding and not lane.feeds:
                    self._at(now, self._wake_feeders)
                continue
            if self._take(lane, lane.actions[lane.at], now):
                return

    def _is_ahead(self, lane: _Lane) -> bool:
        """Whether a device that only feeds others is with its rows a step ahead of them.

        Receives for a step are posted in the one before, no earlier.
        """
        return lane.feeds and lane.step > 1 + min(o.step for o in self.lanes.values() if not o.feeds)

    def _wake_feeders(self, now: float) -> None:
        """Lets those go on that were a step ahead."""
        for lane in self.lanes.values():
            if lane.feeds and lane.at == 0 and lane.step:
                self._advance(lane, now)

    def _waited(self, lane: _Lane, now: float) -> None:
        """Ends the wait of a device, if it waits."""
        if lane.blocked_since is not None and now > lane.blocked_since:
            self._span(lane.name, "wait", lane.actions[lane.at], lane.blocked_since, now, lane.step)
        lane.blocked_since = None

    def _take(self, lane: _Lane, action: Action, now: float) -> bool:
        """Takes one action; true when the device goes on later."""
        match action.kind:
            case "forward":
                self._consume(lane, now)  # first: what came in is kept as part of what is saved
                return self._compute(lane, action, self.costs.work(lane.name, action), now)
            case "backward" | "backward_input" | "backward_weight":
                return self._compute(lane, action, self.costs.work(lane.name, action), now)
            case "send":
                self._send(lane, action, now)
            case "recv":
                crosses = action.crosses
                if crosses and not lane.step:  # nothing was sent before the first step
                    lane.at += 1
                    return False
                key = (lane.step, action.transfer)
                if key not in self._arrived:
                    self._waiting[key] = lane
                    lane.blocked_since = now
                    return True
                self._arrived.discard(key)
                lane.consumed += 0 if crosses else action.nbytes
            case "reduce":
                self._join(lane, action, now)
            case "norm":
                return (lane.reductions > 0 and self._block(lane, now)) or self._norm(lane, action, now)
            case "update":
                return self._compute(lane, action, Work(self.costs.update_s(lane.name, action)), now)
            case "step":
                if lane.reductions:
                    return self._block(lane, now)
                return self._compute(lane, action, Work(self.costs.update[lane.name]), now)
            case "load":
                pass
        cost = lane.messages_s[lane.at]
        lane.at += 1
        return bool(cost) and self._pay_messages(lane, cost, now)

    def _pay_messages(self, lane: _Lane, cost: float, now: float) -> bool:
        """Takes the processor time of messages from the device; a ring's is taken where the ring begins."""
        cost = self._slowed(lane, cost)
        lane.busy[lane.step] += cost
        self._at(now + cost, partial(self._advance, lane))
        return True

    def _slowed(self, lane: _Lane, seconds: float) -> float:
        return seconds * self.costs.slowdown(lane.name, lane.step) if self.costs.faults else seconds

    def _block(self, lane: _Lane, now: float) -> bool:
        lane.blocked_since = now
        return True

    def _compute(self, lane: _Lane, action: Action, work: Work, now: float) -> bool:
        seconds = self._slowed(lane, work.seconds)
        self.memory.add(lane.name, work.begins_bytes, now)
        self._consume(lane, now)
        lane.busy[lane.step] += seconds
        end = now + seconds
        if self.keep_spans:
            self._span(lane.name, action.kind, action, now, end, lane.step)
        self._at(end, partial(self._computed, lane, work.ends_bytes))
        return True

    def _consume(self, lane: _Lane, now: float) -> None:
        if lane.consumed:
            self.memory.add(lane.name, -lane.consumed, now)
            lane.consumed = 0

    def _computed(self, lane: _Lane, more_bytes: int, now: float) -> None:
        self.memory.add(lane.name, more_bytes, now)
        lane.at += 1
        self._advance(lane, now)

    # Messages

    def _send(self, lane: _Lane, action: Action, now: float) -> None:
        channel = lane.channels.get(action.peer)
        if channel is None:
            way = self.costs.way(lane.name, action.peer)
            channel = _Channel(f"{lane.name}>{action.peer}", lane, action.peer, way)
            lane.channels[action.peer] = channel
        lane.sent[lane.step] += action.nbytes
        self.memory.add(lane.name, action.nbytes, now)
        channel.queue.append(_Message(action, lane.step))
        lane.unsent += 1
        if len(channel.queue) == 1:
            self._transmit(channel, now)

    def _transmit(self, channel: _Channel, now: float) -> None:
        message = channel.queue[0]
        message.started = now
        factor = self._factor(channel.source.name, channel.target, message.step)
        if factor is None:
            return  # a cut link: this message and all behind it never arrive
        passed = partial(self._passed, channel, channel.way.latency_s * factor)
        self.network.start(now, channel.way.resources, message.action.nbytes * factor, passed)

    def _factor(self, source: str, target: str, step: int) -> float | None:
        """By how much a fault stretches messages on a link; None if it cuts the link."""
        return self.costs.stretch(source, target, step) if self.costs.faults else 1.0

    def _passed(self, channel: _Channel, latency_s: float, now: float) -> None:
        message = channel.queue.popleft()
        action = message.action
        if self.keep_spans:
            self._span(channel.name, action.payload or "", action, message.started, now, message.step)
        self.memory.add(channel.source.name, -action.nbytes, now)
        self._at(now + latency_s, partial(self._arrive, channel.source, message))
        if channel.queue:
            self._transmit(channel, now)

    def _arrive(self, source: _Lane, message: _Message, now: float) -> None:
        action = message.action
        crosses = action.crosses
        key = (message.step + crosses, action.transfer)
        if not crosses:  # its buffer is part of the base
            self.memory.add(action.peer, action.nbytes, now)
        self._arrived.add(key)
        lane = self._waiting.pop(key, None)
        if lane is not None:
            self._advance(lane, now)
        source.unsent -= 1
        if source.drains and not source.unsent:
            self._advance(source, now)

    # Collectives

    def _join(self, lane: _Lane, action: Action, now: float) -> None:
        lane.reductions += 1
        key = (lane.step, action.sync, action.segment)
        joined = self._joined.setdefault(key, [])
        joined.append(lane)
        if len(joined) < len(action.members):
            return
        queue = self._ready.setdefault((lane.step, action.sync), deque())
        queue.append((action, self._joined.pop(key)))
        if len(queue) == 1:
            self._ring(queue, lane.step, now)

    def _ring(self, queue: deque[tuple[Action, list[_Lane]]], step: int, now: float) -> None:
        """One flow per edge; done when the slowest is, plus one latency a round, plus what the messages take.

        A round's messages are taken from the processors before and after its flow, not beside it, as each
        round waits for the one before. The slowest member holds up all.
        """
        action, lanes = queue[0]
        edges = ring_edges(action)
        nbytes = ring_edge_bytes(len(edges), action.nbytes)
        latency_s = ring_rounds(len(edges)) * self._farthest(edges, step)
        latency_s += max(self._slowed(lane, self.costs.messages_s(lane.name, action)) for lane in lanes)
        left = len(edges)

        def edge_done(source: str, target: str, t: float) -> None:
            nonlocal left
            left -= 1
            self._span(f"{source}>{target}", "reduce", action, now, t, step)
            if not left:
                self._at(t + latency_s, lambda end: self._reduced(queue, step, end))

        for a, b in edges:
            self.trace.sent[a][step] += nbytes
            factor = self._factor(a, b, step)
            if factor is not None:
                self.network.start(
                    now,
                    self.costs.way(a, b).resources,
                    nbytes * factor,
                    lambda t, a=a, b=b: edge_done(a, b, t),
                )

    def _farthest(self, pairs: Iterable[tuple[str, str]], step: int) -> float:
        """Most latency of any of these links; infinite if one is cut."""
        most = 0.0
        for a, b in pairs:
            factor = self._factor(a, b, step)
            most = max(most, float("inf") if factor is None else self.costs.way(a, b).latency_s * factor)
        return most

    def _reduced(self, queue: deque[tuple[Action, list[_Lane]]], step: int, now: float) -> None:
        _, lanes = queue.popleft()
        if queue:
            self._ring(queue, step, now)
        for lane in lanes:
            lane.reductions -= 1
            waits = lane.blocked_since is not None and lane.actions[lane.at].kind in ("step", "norm")
            if waits and not lane.reductions:
                self._advance(lane, now)

    def _norm(self, lane: _Lane, action: Action, now: float) -> bool:
        """Everybody sends a number to everybody: all go on one latency after the last has come."""
        lane.blocked_since = now
        arrived = self._normed.setdefault(lane.step, [])
        arrived.append(lane)
        if len(arrived) == len(action.members):
            del self._normed[lane.step]
            latency_s = self._farthest(permutations(action.members, 2), lane.step)
            if latency_s < float("inf"):
                self._at(now + latency_s, lambda t: self._go_on(arrived, t))
        return True

    def _go_on(self, lanes: list[_Lane], now: float) -> None:
        for lane in lanes:
            self._waited(lane, now)
            lane.at += 1
        for lane in lanes:
            self._advance(lane, now)

    def _span(self, lane: str, kind: str, action: Action, start: float, end: float, step: int) -> None:
        if self.keep_spans:
            text = self._texts.get(id(action))
            if text is None:
                text = self._texts[id(action)] = str(action)
            self.trace.spans.append(
                {"lane": lane, "kind": kind, "action": text, "start_s": start, "end_s": end, "step": step}
            )
