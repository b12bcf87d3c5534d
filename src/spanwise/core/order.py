"""The order of compute inside one stage, as values and as text: ``F0 F1 I0 W0 I1 W1``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from spanwise.core.errors import PlanError

OpKind = Literal["forward", "backward", "backward_input", "backward_weight"]

_LETTERS: dict[OpKind, str] = {
    "forward": "F", "backward": "B", "backward_input": "I", "backward_weight": "W",
}  # fmt: skip
_KINDS: dict[str, OpKind] = {letter: kind for kind, letter in _LETTERS.items()}
# What comes before what in a backward of two halves.
_BEFORE: dict[OpKind, OpKind | None] = {
    "forward": None, "backward_input": "forward", "backward_weight": "backward_input",
}  # fmt: skip


class Op(NamedTuple):
    """A forward, a backward or half of one, of one micro-batch; prints as ``F0``, ``B0``, ``I0`` or ``W0``.

    The input half of a backward gives what the stage before waits for, the weight half the gradients of the
    products' weights, which nobody waits for before the end of the step. Weight halves next to each other in
    an order, ``W2 W3 W4``, are done at once.
    """

    kind: OpKind
    micro_batch: int

    def __str__(self) -> str:
        return f"{_LETTERS[self.kind]}{self.micro_batch}"


def joined(ops: Iterable[Op]) -> Iterator[tuple[Op, int]]:
    """The order as it is done: with each entry over how many micro-batches.

    Weight halves that follow each other are done at once; the entry is the first of them.
    """
    first: Op | None = None
    count = 0
    for op in ops:
        if op.kind == "backward_weight":
            first, count = first or op, count + 1
            continue
        if first is not None:
            yield first, count
            first, count = None, 0
        yield op, 1
    if first is not None:
        yield first, count


def order_text(ops: Iterable[Op]) -> str:
    """An order as a plan stores it."""
    return " ".join(map(str, ops))


def parse_order(text: str) -> tuple[Op, ...]:
    """Reads what ``order_text`` wrote.

    Raises:
        PlanError: an entry is none of F, B, I, W with a number.
    """
    ops: list[Op] = []
    for word in text.split():
        kind, number = _KINDS.get(word[0]), word[1:]
        if kind is None or not (number.isascii() and number.isdigit()):
            raise PlanError(f"order: '{word}' is no forward or backward; write it like F0, I0 or W0")
        ops.append(Op(kind, int(number)))
    return tuple(ops)


def check_halves(ops: tuple[Op, ...], micro_batches: int) -> None:
    """Raises ``PlanError`` unless F, I and W of every micro-batch are there once, each in its turn."""
    done = dict.fromkeys(_BEFORE, 0)
    for op in ops:
        m = op.micro_batch
        if op.kind not in done:
            raise PlanError(f"order: '{op}' is a whole backward; write its halves, I{m} and W{m}")
        if m != done[op.kind]:
            due = Op(op.kind, done[op.kind])
            raise PlanError(f"order: '{op}' stands where {due} is due; micro-batches go in order, each once")
        before = _BEFORE[op.kind]
        if before is not None and done[before] <= m:
            raise PlanError(f"order: '{op}' stands before {Op(before, m)}, which it needs")
        done[op.kind] += 1
    for kind, count in done.items():
        if count != micro_batches:
            raise PlanError(
                f"order: {count} entries {_LETTERS[kind]} for {micro_batches} micro-batches; each needs one"
            )


class Kept(NamedTuple):
    """Micro-batches that a stage keeps at once: before a (half) backward, and between the halves of one."""

    whole: int
    halved: int


def kept_over(ops: Iterable[Op]) -> tuple[Kept, ...]:
    """What is kept where an order needs most: after no other entry is more kept of both."""
    whole = halved = 0
    most: dict[int, int] = {}
    for op in ops:
        whole += {"forward": 1, "backward_weight": 0}.get(op.kind, -1)
        halved += {"backward_input": 1, "backward_weight": -1}.get(op.kind, 0)
        most[whole] = max(most.get(whole, 0), halved)
    out: list[Kept] = []
    for count in sorted(most, reverse=True):
        if not out or most[count] > out[-1].halved:
            out.append(Kept(count, most[count]))
    return tuple(out)
