"""Plan + ModelGraph to Program. ``check`` proves that every Program pairs, covers and ends."""

from __future__ import annotations

from spanwise.lowering.check import check
from spanwise.lowering.lower import lower, unchecked
from spanwise.lowering.moves import Move, buffer_holders, move_bytes, moves
from spanwise.lowering.syncs import buckets_of, holders, natural_syncs, ring_parameters, updaters

__all__ = [
    "Move",
    "buckets_of",
    "buffer_holders",
    "check",
    "holders",
    "lower",
    "move_bytes",
    "moves",
    "natural_syncs",
    "ring_parameters",
    "unchecked",
    "updaters",
]
