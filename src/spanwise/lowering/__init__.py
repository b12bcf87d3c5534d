"""Plan + ModelGraph to Program. ``check`` proves that every Program pairs, covers and ends."""

from __future__ import annotations

from spanwise.lowering.check import check
from spanwise.lowering.lower import holders, lower, natural_syncs, unchecked
from spanwise.lowering.moves import Move, buffer_holders, move_bytes, moves

__all__ = [
    "Move",
    "buffer_holders",
    "check",
    "holders",
    "lower",
    "move_bytes",
    "moves",
    "natural_syncs",
    "unchecked",
]
