"""One entry of a schedule."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Op(NamedTuple):
    """Forward or backward of one micro-batch; prints as ``F0`` or ``B0``."""

    kind: Literal["forward", "backward"]
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind[0].upper()}{self.micro_batch}"
