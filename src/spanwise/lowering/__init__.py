"""Plan + ModelGraph to Program. ``check`` proves that every Program pairs, covers and ends."""

from __future__ import annotations

from spanwise.lowering.check import check
from spanwise.lowering.lower import holders, lower, natural_syncs

__all__ = ["check", "holders", "lower", "natural_syncs"]
