"""Changing plans at a step boundary: devices keep what they hold and send each other what changes owner.

All devices have ended the same step and none has begun the next. Each builds its part of the new plan from
what it had and what it gets; parameters, optimizer state, learning rate and step counters go over as they
are, so the run goes on as if nothing had happened. A buffer that a device did not hold is the mean of its
holders' by rows, as in a checkpoint; one that it held stays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import safetensors.torch
import torch
from torch import Tensor

from spanwise.core.errors import PeerError
from spanwise.core.plan import Plan
from spanwise.lowering import Move, buffer_holders, move_bytes
from spanwise.runtime.device_run import Assignment, DeviceRun, Snapshot
from spanwise.runtime.feed import Rows
from spanwise.runtime.tags import STEP_TAGS
from spanwise.runtime.transport import Pending, Transport

_TAG = STEP_TAGS  # above those of training steps, below those of the probes
_RELAYED = 500_000  # further on: what is passed on
_PIECE_BYTES = 8 * 2**20  # each has the deadline of a transfer
_MOST_COPIES = 8  # of a parameter in the state of any optimizer
_SLACK_BYTES = 2**20  # names, shapes, learning rates
_GROUP = "group"  # options and scheduler, as JSON


@dataclass
class Change:
    """What one device needs to go over from the plan ``before`` to that of ``assignment``.

    ``run`` is its part of the plan before, none if it had none.
    """

    assignment: Assignment
    device: str
    transport: Transport
    moves: tuple[Move, ...]
    run: DeviceRun | None
    before: Plan
    data: Rows | None = None
    held: bool = False
    received_bytes: int = field(default=0, init=False)

    def carry_out(self) -> DeviceRun | None:
        """Sends, receives and builds; returns the device's part of the new plan, none if it has none.

        Raises:
            PeerError: a peer sent nothing within the deadline of a transfer, or what it may not.
        """
        state = self.run.state() if self.run is not None else Snapshot()
        self._exchange(state)
        if self.run is not None:
            self.run.close()
        if self.device not in self.assignment.plan.devices:
            return None
        run = DeviceRun(
            self.assignment, self.device, self.transport, tensors=state.parameters | state.buffers,
            data=self.data, held=self.held,
        )  # fmt: skip
        run.resume(state.optimizer, state.options, state.scheduler)
        return run

    def _exchange(self, state: Snapshot) -> None:
        """Sends what others lack, adds what was received to the state, passes on what others wait for."""
        sent: list[tuple[Move, Pending]] = []
        for relayed in (False, True):
            moves = [move for move in self.moves if move.relayed == relayed]
            sent += [
                (move, pending)
                for move in moves
                if move.source == self.device
                for pending in _send(self.transport, move, _pack(state, move))
            ]
            self._receive([move for move in moves if move.target == self.device], state)
        for move, pending in sent:
            # The target takes its senders in turn, and each piece of theirs within the deadline.
            timeout_s, graph = self.assignment.job.transfer_timeout_s, self.assignment.graph
            before = sum(move_bytes(m, graph, _MOST_COPIES) for m in self.moves if m.target == move.target)
            pending.wait(timeout_s * (2 + before // _PIECE_BYTES))

    def _receive(self, moves: Sequence[Move], state: Snapshot) -> None:
        timeout_s = self.assignment.job.transfer_timeout_s
        parts: dict[str, dict[str, Tensor]] = {}
        for move in moves:
            most = move_bytes(move, self.assignment.graph, _MOST_COPIES) + _SLACK_BYTES
            payload = _received(self.transport, move, most, timeout_s)
            self.received_bytes += len(payload)
            parts[move.source] = _unpacked(payload, move)
        self._inherit(state, parts)

    def _inherit(self, state: Snapshot, parts: dict[str, dict[str, Tensor]]) -> None:
        """Adds to the device's own state what it received."""
        for tensors in parts.values():
            group = json.loads(bytes(tensors[_GROUP].numpy()))
            state.options = state.options or group["options"]
            state.scheduler = state.scheduler or group["scheduler"]
            state.parameters |= _named("parameter", tensors)
            state.optimizer |= _named("optimizer", tensors)
        rows = buffer_holders(self.before, self.assignment.graph)
        lacking = {name for tensors in parts.values() for name in _named("buffer", tensors)}
        for name in lacking:
            state.buffers[name] = mean_by_rows(
                [(parts[d][f"buffer/{name}"], n) for d, n in rows[name] if d in parts]
            )


def mean_by_rows(values: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Mean of the replicas' copies of a buffer, by the rows that each computes; of integers the first."""
    first = values[0][0]
    if len(values) == 1 or not first.is_floating_point():
        return first
    total = sum(rows for _, rows in values)
    mean = sum((value.double() * (rows / total) for value, rows in values), start=first.double() * 0)
    return mean.to(first.dtype)


def _pack(state: Snapshot, move: Move) -> bytes:
    group = json.dumps({"options": state.options, "scheduler": state.scheduler}).encode()
    tensors = {_GROUP: torch.frombuffer(bytearray(group), dtype=torch.uint8)}
    tensors |= {f"parameter/{name}": state.parameters[name] for name in move.parameters}
    wanted = set(move.parameters)
    tensors |= {f"optimizer/{k}": v for k, v in state.optimizer.items() if k.partition("::")[0] in wanted}
    tensors |= {f"buffer/{name}": state.buffers[name] for name in move.buffers}
    return safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})


def _unpacked(payload: bytes, move: Move) -> dict[str, Tensor]:
    """The tensors of a payload; ``PeerError`` if they are not those of the move."""
    try:
        tensors = safetensors.torch.load(payload)
    except Exception as error:  # the library's own errors are of several kinds
        raise PeerError(
            f"receiving from '{move.source}': its part of the new plan cannot be read ({error})",
            device=move.source,
        ) from None
    found = {"parameter": _named("parameter", tensors), "buffer": _named("buffer", tensors)}
    right = found["parameter"].keys() == set(move.parameters) and found["buffer"].keys() == set(move.buffers)
    if not right or _GROUP not in tensors:
        raise PeerError(
            f"receiving from '{move.source}': it sent {len(tensors)} tensors that are not the "
            f"{len(move.parameters)} parameters and {len(move.buffers)} buffers asked for",
            device=move.source,
        )
    return tensors


def _named(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{part}/")}


def _send(transport: Transport, move: Move, payload: bytes) -> list[Pending]:
    whole = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    length, tag = torch.tensor([len(payload)], dtype=torch.int64), _tag(move)
    return [
        transport.send(move.target, tag, [length]),
        *(transport.send(move.target, tag + 1 + i, [piece]) for i, piece in enumerate(_pieces(whole))),
    ]


def _received(transport: Transport, move: Move, most_bytes: int, timeout_s: float) -> bytes:
    source, tag = move.source, _tag(move)
    length = torch.zeros(1, dtype=torch.int64)
    transport.recv(source, tag, [length]).wait(timeout_s)
    size = int(length)
    if not 0 < size <= most_bytes:
        raise PeerError(
            f"receiving from '{source}': it announced {size} bytes for its part of the new plan, at most "
            f"{most_bytes} are expected",
            device=source,
        )
    whole = torch.empty(size, dtype=torch.uint8)
    for index, piece in enumerate(_pieces(whole)):
        transport.recv(source, tag + 1 + index, [piece]).wait(timeout_s)
    return whole.numpy().tobytes()


def _tag(move: Move) -> int:
    """Two devices may exchange both what one had and what it passes on."""
    return _TAG + (_RELAYED if move.relayed else 0)


def _pieces(whole: Tensor) -> list[Tensor]:
    """Views of a flat tensor, one after the other."""
    return [whole[first : first + _PIECE_BYTES] for first in range(0, len(whole), _PIECE_BYTES)]
