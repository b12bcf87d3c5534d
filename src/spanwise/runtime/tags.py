"""Numbers of the messages of a step, so that no two that are under way can be taken for each other."""

from __future__ import annotations

from dataclasses import dataclass

from spanwise.core.program import Program
from spanwise.runtime.collectives import ring_tags


@dataclass(frozen=True)
class Tags:
    """Numbers for every message of a step, the same on all devices, none used twice in two steps."""

    transfers: int
    rings: tuple[tuple[int, ...], ...]
    norm: int
    stride: int

    def tag(self, step: int, number: int) -> int:
        """Of a numbered message in a step."""
        return step * self.stride + number

    @classmethod
    def of(cls, program: Program) -> Tags:
        """Numbers transfers first, then rings, then the norm."""
        found = [a for actions in program.devices.values() for a in actions]
        transfers = 1 + max((a.transfer for a in found), default=-1)
        members = {(a.sync, a.segment): len(a.members) for a in found if a.kind == "reduce"}
        rings: list[tuple[int, ...]] = []
        free = transfers
        for sync, segments in enumerate(program.buckets):
            row: list[int] = []
            for segment in range(len(segments)):
                row.append(free)
                free += ring_tags(members.get((sync, segment), 1))
            rings.append(tuple(row))
        return cls(transfers, tuple(rings), free, free + 1)
