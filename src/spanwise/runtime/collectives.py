"""Small, named collectives over any Transport, with a fixed order of summation and a deadline a message."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from spanwise.cost.sparse import chain_piece_bytes
from spanwise.runtime.transport import Pending, Transport

_AHEAD = 3  # receives of a ring posted at once


def ring_all_reduce(
    transport: Transport, members: Sequence[str], me: str, flat: Tensor, *, tag: int, timeout_s: float
) -> None:
    """Sums ``flat`` over the members in place, by reduce-scatter and all-gather around a ring.

    Every piece is added up in ring order and then copied, so all members end with the same bits.
    Uses tags ``tag .. tag + 2(n-1) - 1``. Patarasuk and Yuan, JPDC 2009.

    Receives are posted some turns ahead. A sender may not begin before it hears that the receiver is ready,
    and that word would otherwise queue behind the pieces that travel the other way. A piece that is posted
    in place is not overwritten too early: what comes for it was made from what went out of it.
    """
    n = len(members)
    rank = members.index(me)
    after, before = members[(rank + 1) % n], members[(rank - 1) % n]
    pieces = flat.tensor_split(n)
    spare = [torch.empty_like(pieces[0]) for _ in range(min(_AHEAD, n - 1))]
    # Per turn: what goes out, where what comes in lands, and what it is added to.
    turns: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for turn in range(n - 1):
        outgoing, incoming = pieces[(rank - turn) % n], pieces[(rank - turn - 1) % n]
        turns.append((outgoing, spare[turn % len(spare)][: incoming.numel()], incoming))
    turns += [(pieces[(rank + 1 - turn) % n], pieces[(rank - turn) % n], None) for turn in range(n - 1)]
    posted: deque[Pending | None] = deque()
    for turn, (outgoing, _, total) in enumerate(turns):
        for ahead in range(turn + len(posted), min(turn + _AHEAD, len(turns))):
            posted.append(_receive(transport, before, tag + ahead, turns[ahead][1]))
        sent = transport.send(after, tag + turn, [outgoing]) if outgoing.numel() else None
        for transfer in (posted.popleft(), sent):
            if transfer is not None:
                transfer.wait(timeout_s)
        if total is not None:
            total.add_(turns[turn][1])


def chain_broadcast(
    transport: Transport, chain: Sequence[str], me: str, flat: Tensor, *, tag: int, timeout_s: float
) -> None:
    """Gives every device of a chain the values of ``flat`` that the first has, in place.

    Each passes a piece on as soon as it has it, while the next comes in: the last has all of it little later
    than the second. Uses tags ``tag .. tag + chain_pieces(bytes) - 1``.
    """
    rank = chain.index(me)
    before = chain[rank - 1] if rank else None
    after = chain[rank + 1] if rank + 1 < len(chain) else None
    size = max(1, chain_piece_bytes(flat.nbytes) // flat.element_size())
    pieces = [flat[first : first + size] for first in range(0, flat.numel(), size)]
    posted: deque[Pending] = deque()
    sent: list[Pending] = []
    for number, piece in enumerate(pieces):
        if before is not None:
            for ahead in range(number + len(posted), min(number + _AHEAD, len(pieces))):
                posted.append(transport.recv(before, tag + ahead, [pieces[ahead]]))
            posted.popleft().wait(timeout_s)
        if after is not None:
            sent.append(transport.send(after, tag + number, [piece]))
    for pending in sent:
        pending.wait(timeout_s)


def _receive(transport: Transport, peer: str, tag: int, buffer: Tensor) -> Pending | None:
    """Empty pieces do not travel."""
    return transport.recv(peer, tag, [buffer]) if buffer.numel() else None


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
