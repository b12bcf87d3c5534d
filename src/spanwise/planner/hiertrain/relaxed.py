"""The rows of a linear programme, rounded: how HierTrain's rows are chosen in reports of the paper.

Our planner finds the best whole rows themselves (``rows.py``); this is what they are compared with.
With real rows the step time, a sum of maxima of lines, is the optimum of a linear programme: a variable for
every maximum, not below any of its lines. At most three machines share the batch, so two unknowns remain
once the finisher has what the workers leave, and the optimum is at a corner: where two borders meet, each a
limit of the rows or where two lines of a maximum cross. There are few, so all are looked at: exact, without a
solver. The real rows are then rounded by largest remainders.

Idea: Liu, Chen, Zhou, Ling, "HierTrain", arXiv 2003.09876, 2020 (IEEE Open Journal of the Communications
Society, vol. 1), of which only the abstract was available to us; programme and rounding as in a public
re-implementation (github.com/JasonTqh/DEC, 2024). The corners are our own way to solve it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import floor, inf

import numpy as np

from spanwise.planner.facts.tables import Floats
from spanwise.planner.hiertrain.layout import Line, Terms
from spanwise.planner.hiertrain.rows import EXACT, Room, Rows

CLOSE = 1e-7  # rows; a limit that is passed by less is kept
PARALLEL = 1e-9  # sine of the angle between borders that do not meet


@dataclass(frozen=True, slots=True)
class RealRows:
    """Real rows started by every machine, the finisher first, and the step time with them."""

    seconds: float
    rows: tuple[float, ...]


def rounded_rows(terms: Terms, total: int, room: Room) -> Rows | None:
    """The best real rows, rounded to whole ones of the same sum that have room; none if there are none.

    ``seconds`` is that of the real rows, no more than of any whole ones: by it layouts are chosen before
    their rows are rounded. Takes what ``relaxed_rows`` takes.
    """
    found = relaxed_rows(terms, total, room)
    if found is None:
        return None
    choices = product(*((low, low + 1) for low in (floor(y + CLOSE) for y in found.rows)))
    whole = [rows for rows in choices if sum(rows) == total and _has_room(room, rows)]
    if not whole:
        return None
    return Rows(found.seconds, min(whole, key=lambda rows: _distance(rows, found.rows)))


def relaxed_rows(terms: Terms, total: int, room: Room) -> RealRows | None:
    """The real rows with the least step time, none if ``total`` rows do not fit.

    Of at most three machines, and a step time without a floor: as published, every step begins with its raw
    rows, so none travel beside the step before.
    """
    count = len(room.lower)
    assert count <= EXACT
    assert not terms.floor
    limits = _planes(_limits(room), total)
    groups = [_planes(group, total) for group in terms.groups]
    points = _corners(np.concatenate([limits, *map(_differences, groups)]))
    points = points[np.all(_values(limits, points) >= -CLOSE, axis=1)]
    if not len(points):
        return None
    seconds: Floats = np.full(len(points), terms.constant_s)
    for lines in groups:
        seconds = seconds + np.max(_values(lines, points), axis=1)
    at = int(np.argmin(seconds))
    _, y, z = (float(x) for x in points[at])
    return RealRows(float(seconds[at]), (total - y - z, y, z)[:count])


def _limits(room: Room) -> list[Line]:
    """Lines that must not be below zero: in rows, that of memory in rows of the heaviest kind.

    Machines that there are not have no rows.
    """
    found: list[Line] = []
    for i in range(EXACT):
        low, high = (room.lower[i], room.upper[i]) if i < len(room.lower) else (0, 0)
        unit = [0.0] * EXACT
        unit[i] = 1.0
        found += [(-float(low), *unit), (float(high), *(-u for u in unit))]
    if room.most < inf:
        heaviest = max(room.weights) or 1.0
        found.append((room.most / heaviest, *(-w / heaviest for w in room.weights)))
    return found


def _planes(lines: Iterable[Line], total: int) -> Floats:
    """``[line, 3]``: seconds if the finisher starts all rows, and what one of either worker's changes."""
    padded = [(*line, *[0.0] * EXACT)[: 1 + EXACT] for line in lines]
    planes = [(once + total * own, first - own, second - own) for once, own, first, second in padded]
    return np.array(planes, dtype=np.float64)


def _values(planes: Floats, points: Floats) -> Floats:
    """``[point, line]``."""
    return points @ np.transpose(planes)


def _differences(planes: Floats) -> Floats:
    """Of every two lines: zero where they cross."""
    one, other = np.triu_indices(len(planes), 1)
    return planes[one] - planes[other]


def _corners(borders: Floats) -> Floats:
    """``[corner, 3]``: 1 and the two workers' rows where two of the borders ``[border, 3]`` meet."""
    steep = np.hypot(borders[:, 1], borders[:, 2])
    lines = borders[steep > 0] / steep[steep > 0, None]
    one, other = np.triu_indices(len(lines), 1)
    across: Floats = np.cross(lines[one], lines[other])  # (1, y, z) times the sine of the angle between them
    met = np.abs(across[:, 0]) > PARALLEL
    return across[met] / across[met, :1]


def _has_room(room: Room, rows: Sequence[int]) -> bool:
    held = sum(w * y for w, y in zip(room.weights, rows, strict=True))
    return held <= room.most and all(
        a <= y <= b for a, y, b in zip(room.lower, rows, room.upper, strict=True)
    )


def _distance(rows: Sequence[float], others: Sequence[float]) -> float:
    """Squared; the least of it rounds by largest remainders."""
    return sum((a - b) ** 2 for a, b in zip(rows, others, strict=True))
