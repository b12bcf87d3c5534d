"""What a search finds, before rows and warm-up depths are settled."""

from __future__ import annotations

from dataclasses import dataclass

from spanwise.planner.facts.kinds import Group


@dataclass(frozen=True, slots=True)
class Span:
    """Layers ``[start, stop)`` on a group; ``rows`` where they are given and not to be worked out."""

    start: int
    stop: int
    group: Group
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Outline:
    """Micro-batches, layers and groups, and the price by formula."""

    micro_batches: int
    spans: tuple[Span, ...]
    price_s: float = 0.0
