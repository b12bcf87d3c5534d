"""Numbers of the messages of a step, so that no two that are under way can be taken for each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spanwise.core.program import Program
from spanwise.cost.sparse import chain_pieces
from spanwise.runtime.collectives import ring_tags

STEP_TAGS = 2**27 - 1_000_000  # numbers of messages of steps; those of moves and probes come after them


@dataclass(frozen=True)
class Tags:
    """Numbers for every message of a step, the same on all devices.

    They come again when all of ``STEP_TAGS`` have been used, after many thousand steps. All messages of a
    step are done by its end or that of the next, so no two that are under way have the same one.
    """

    transfers: int
    rings: tuple[tuple[int, ...], ...]
    norm: int
    stride: int
    chains: tuple[tuple[int, ...], ...] = ()

    def tag(self, step: int, number: int) -> int:
        """Of a numbered message in a step."""
        return step % (STEP_TAGS // self.stride) * self.stride + number

    @classmethod
    def of(cls, program: Program) -> Tags:
        """Numbers transfers first, then rings and chains, then the norm."""
        found = [a for actions in program.devices.values() for a in actions]
        transfers = 1 + max((a.transfer for a in found), default=-1)
        needed = {(a.sync, a.segment): ring_tags(len(a.members)) for a in found if a.kind in _RINGS}
        rings, free = _numbered(program, needed, transfers)
        needed = {(a.sync, a.segment): chain_pieces(a.nbytes) for a in found if a.kind == "broadcast"}
        chains, free = _numbered(program, needed, free)
        return cls(transfers, rings, free, free + 1, chains)


_RINGS = ("reduce", "average")  # of a segment there is one of them at most


def _numbered(
    program: Program, needed: Mapping[tuple[int, int], int], free: int
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """First number of every segment of every sync, and the next that is free."""
    out: list[tuple[int, ...]] = []
    for sync, segments in enumerate(program.buckets):
        row: list[int] = []
        for segment in range(len(segments)):
            row.append(free)
            free += needed.get((sync, segment), 0)
        out.append(tuple(row))
    return tuple(out), free
