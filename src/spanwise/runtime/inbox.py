"""What a device receives: posted ahead of its need, in this step and on into the next."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from spanwise.core.model import ModelGraph, TensorSpec
from spanwise.core.plan import Plan
from spanwise.core.program import SEGMENTS, Action, Program
from spanwise.runtime.assembly import Assembly, Tensors, cut, meet
from spanwise.runtime.exchange import Exchange, Flat
from spanwise.runtime.parts import DeviceParts
from spanwise.runtime.tags import Tags
from spanwise.runtime.transport import Pending, Transport
from spanwise.runtime.wire import Unpacking, empty_packed

_AHEAD = 4  # receives posted before they are needed, per device; bounds the memory of early messages
_AHEAD_OF_PUSHES = 8  # per device that pushes: none waits for the others, nor for word that it may send

_Key = tuple[str, int, int]  # payload, stage (before the cut), micro-batch


@dataclass(frozen=True, slots=True)
class Receipt:
    """A receive under way, and where a segment's values go."""

    pending: Pending
    values: Flat = ()


@dataclass(slots=True)
class _Coming:
    """Of one step: receives that are not posted, those that are, and rows that come together."""

    due: deque[Action] = field(default_factory=deque[Action])
    posted: dict[int, Receipt] = field(default_factory=dict[int, Receipt])
    rows: dict[_Key, Assembly] = field(default_factory=dict[_Key, Assembly])


class Inbox:
    """Keeps a device's receives posted, a few at a time and in the order of their need.

    A sender may not begin before its message's receive is posted. So receives of the next step are posted as
    soon as all of this one are: rows from a device that only reads data travel while this step is computed.
    """

    def __init__(
        self, parts: DeviceParts, plan: Plan, graph: ModelGraph, program: Program, transport: Transport,
        exchange: Exchange, tags: Tags,
    ) -> None:  # fmt: skip
        self._parts, self._plan, self._graph = parts, plan, graph
        self._transport, self._exchange, self._tags = transport, exchange, tags
        found = tuple(a for a in program.devices.get(parts.device, ()) if a.kind == "recv")
        self._recvs = tuple(a for a in found if not a.crosses)
        self._crossing = tuple(a for a in found if a.crosses)
        pushing = {a.peer for a in found if a.payload == "push"}
        self._ahead = max(_AHEAD, _AHEAD_OF_PUSHES * len(pushing))
        self._ranges = [{d: (a, b) for d, a, b in s.row_ranges()} for s in plan.stages]
        self._step, self._left, self._fetched = -1, 0, False
        self._now, self._next = _Coming(), _Coming()

    @property
    def crossed(self) -> tuple[Action, ...]:
        """Receives of the next step that a server has sent for in this one, and that are not taken."""
        return tuple(a for a in self._crossing if a.transfer in self._next.posted)

    def begin(self, step: int, *, more: bool) -> None:
        """A step begins. ``more``: another follows for sure, so what is received for it will come."""
        self._step = step
        self._left = len(self._recvs) + len(self._crossing)  # that have not been taken
        self._now, self._next = self._next, _Coming()
        if not self._fetched:
            self._now.due.extend(self._recvs)
        self._fetched = more
        if more:
            self._next.due.extend(self._recvs)
        self.post()

    def post(self) -> None:
        """Posts what may be posted."""
        for ahead, coming in enumerate((self._now, self._next)):
            if self._now.due and ahead:
                break
            while coming.due and len(self._now.posted) + len(self._next.posted) < self._ahead:
                action = coming.due.popleft()
                coming.posted[action.transfer] = self._receive(action, coming, ahead)
        if not self._left:
            for action in self._crossing:
                if action.transfer not in self._next.posted:
                    self._next.posted[action.transfer] = self._receive(action, self._next, 1)

    def take(self, action: Action) -> Receipt | None:
        """What was posted for an action of this step; none if nothing has crossed into it."""
        self._left -= 1
        return self._now.posted.pop(action.transfer, None)

    def take_crossed(self, action: Action) -> Receipt:
        """What was posted for an action of the next step, ahead of that step."""
        return self._next.posted.pop(action.transfer)

    def _receive(self, action: Action, coming: _Coming, ahead: int) -> Receipt:
        tag = self._tags.tag(self._step + ahead, action.transfer)
        if action.payload in SEGMENTS:
            values = self._exchange.room(action)
            return Receipt(self._transport.recv(action.peer, tag, values), values)
        key = (action.payload or "", action.stage, action.micro_batch)
        part = self._assembly(coming, key).part(action.rows)
        buffers = empty_packed(part, action.precision)
        pending = self._transport.recv(action.peer, tag, buffers)
        if action.precision != "full":
            pending = Unpacking(pending, buffers, part, action.precision)
        return Receipt(pending)

    # Rows

    def put(self, key: _Key, rows: tuple[int, int], stage: int, tensors: Tensors) -> None:
        """Rows that are on this device already, for ``stage``, if it has rows of that."""
        mine = self._ranges[stage].get(self._parts.device)
        common = meet(rows, mine) if mine is not None else None
        if common is not None:
            self._assembly(self._now, key).put(common, cut(tensors, rows[0], common))

    def whole(self, payload: str, stage: int, micro_batch: int) -> Tensors:
        """The rows of a payload, all of them; they are given away."""
        return self._now.rows.pop((payload, stage, micro_batch)).whole()

    def specs(self, payload: str, stage: int) -> tuple[TensorSpec, ...]:
        """The tensors of a payload."""
        match payload:
            case "input":
                return self._graph.inputs
            case "label":
                return self._graph.labels
            case "activation":
                return self._graph.layers[self._plan.stages[stage].stop - 1].outputs
            case _:
                outputs = self._graph.layers[self._plan.stages[stage].stop - 1].outputs
                return tuple(spec for spec in outputs if spec.differentiable)

    def _assembly(self, coming: _Coming, key: _Key) -> Assembly:
        found = coming.rows.get(key)
        if found is None:
            payload, stage, _ = key
            last = len(self._ranges) - 1
            consumer = {"input": 0, "label": last, "activation": stage + 1}.get(payload, stage)
            rows = self._ranges[consumer][self._parts.device]
            found = Assembly(self.specs(payload, stage), rows, self._parts.torch_device)
            coming.rows[key] = found
        return found
