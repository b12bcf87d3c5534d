"""Where stages may end: all cuts of the model, or the few worth looking at."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from spanwise.planner.facts.tables import Tables

MOST_CUTS = 24  # own choice, for time: a search looks at every pair of cuts


def all_cuts(layers: int) -> tuple[int, ...]:
    """Every position, ends included."""
    return tuple(range(layers + 1))


def coarse_cuts(tables: Tables, most: int = MOST_CUTS) -> tuple[int, ...]:
    """At most ``most + 1`` positions, ends included: those between large pieces and those few bytes cross.

    Takes away, one after the other, the cut that is missed least: its two pieces together are a small part of
    the model (by time and by bytes of parameters) and a neighbouring cut lets fewer bytes through.
    """
    rows = tables.forward.shape[2] - 1
    time = tables.both[0, :, max(1, rows // 4)]
    weight = time / max(float(time[-1]), 1e-12)
    size = tables.parameters[0] / max(float(tables.parameters[0, -1]), 1.0)
    amount = weight + 0.25 * size
    crossing = tables.into + tables.back
    kept = list(all_cuts(tables.layers))

    def missed(i: int) -> float:
        piece = float(amount[kept[i + 1]] - amount[kept[i - 1]])
        own = max(float(crossing[kept[i]]), 1.0)
        inner = [crossing[kept[j]] for j in (i - 1, i + 1) if 0 < j < len(kept) - 1]
        beside = float(min(inner, default=own))
        return piece * (0.05 + min(beside / own, 4.0))

    while len(kept) > most + 1:
        del kept[min(range(1, len(kept) - 1), key=missed)]
    return tuple(kept)


def fine_cuts(layers: int, around: Iterable[int], most: int = MOST_CUTS) -> tuple[int, ...]:
    """At most ``most + 1`` positions: the given ones, most important first, and their nearest neighbours."""
    centres = [c for c in dict.fromkeys(around) if 0 < c < layers][: most - 1]
    kept = {0, layers, *centres}
    for reach in range(1, layers):
        for centre in centres:
            for position in (centre - reach, centre + reach):
                if len(kept) <= most and 0 < position < layers:
                    kept.add(position)
        if len(kept) > most or not centres:
            break
    return tuple(sorted(kept))


def nearest(cuts: tuple[int, ...], position: int) -> int:
    """Index of the cut nearest to a position."""
    return int(np.argmin(np.abs(np.array(cuts) - position)))
