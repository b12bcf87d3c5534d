"""Small, named collectives over any Transport, with a fixed order of summation and a deadline a message."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spanwise.runtime.transport import Transport


def ring_all_reduce(
    transport: Transport, members: Sequence[str], me: str, flat: Tensor, *, tag: int, timeout_s: float
) -> None:
    """Sums ``flat`` over the members in place, by reduce-scatter and all-gather around a ring.

    Every piece is added up in ring order and then copied, so all members end with the same bits.
    Uses tags ``tag .. tag + 2(n-1) - 1``. Patarasuk and Yuan, JPDC 2009.
    """
    n = len(members)
    rank = members.index(me)
    after, before = members[(rank + 1) % n], members[(rank - 1) % n]
    pieces = flat.tensor_split(n)
    spare = torch.empty_like(pieces[0])
    ends = (after, before)
    for turn in range(n - 1):
        outgoing, incoming = pieces[(rank - turn) % n], pieces[(rank - turn - 1) % n]
        buffer = spare[: incoming.numel()]
        _pass_on(transport, ends, tag + turn, outgoing, buffer, timeout_s)
        incoming.add_(buffer)
    for turn in range(n - 1):
        outgoing, incoming = pieces[(rank + 1 - turn) % n], pieces[(rank - turn) % n]
        _pass_on(transport, ends, tag + n - 1 + turn, outgoing, incoming, timeout_s)


def _pass_on(
    transport: Transport, ends: tuple[str, str], tag: int, outgoing: Tensor, buffer: Tensor, timeout_s: float
) -> None:
    """Sends to the one after and receives from the one before; empty pieces do not travel."""
    after, before = ends
    pending = [transport.recv(before, tag, [buffer])] if buffer.numel() else []
    if outgoing.numel():
        pending.append(transport.send(after, tag, [outgoing]))
    for transfer in pending:
        transfer.wait(timeout_s)


def ring_tags(members: int) -> int:
    """How many tags one ``ring_all_reduce`` uses."""
    return 2 * (members - 1)


def exchange_sum(
    transport: Transport, members: Sequence[str], me: str, value: Tensor, *, tag: int, timeout_s: float
) -> Tensor:
    """Sums a small tensor over the members: everybody sends to everybody, one latency in all.

    Added in member order, so the result has the same bits everywhere. Uses one tag.
    """
    buffers = {peer: torch.empty_like(value) for peer in members if peer != me}
    received = [transport.recv(peer, tag, [buffer]) for peer, buffer in buffers.items()]
    sent = [transport.send(peer, tag, [value]) for peer in buffers]
    for pending in (*received, *sent):
        pending.wait(timeout_s)
    total = torch.zeros_like(value)
    for member in members:
        total += value if member == me else buffers[member]
    return total
