"""How many rows each machine starts: the integers with the least sum of maxima of lines, exactly.

The sum is convex and piecewise linear, and so is the greater of it and a floor. For three machines the rows
of the last are walked through: with y real and z an integer, ``g(z) = min over y`` is convex in z, found at
the ends of y's range, where two lines of a maximum cross, or where sum and floor meet. From the least g the
walk goes up, then down, and stops where g reaches the best integer value so far: g is never above the integer
value, and grows on. So it is exact, without a solver of linear or integer programmes. Memory makes ranges
narrower and leaves them convex. More than three machines take turns in threes, which is not always the
optimum. The method is our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, floor, inf

from spanwise.planner.hiertrain.layout import Group, Terms

EXACT = 3  # machines
HALVINGS = 40
CLOSE = 1e-9  # rows; an end of a range this near to an integer is that integer
Lines = tuple[tuple[float, float], ...]  # (value at y = 0, slope) of every line of a maximum


@dataclass(frozen=True, slots=True)
class Room:
    """Rows that each machine may start, the finisher first, and what the finisher's memory allows.

    ``sum of weights[i] * rows[i] <= most``: its activations per row started by i, which do not grow from one
    machine to the next, as it finishes fewer layers of those rows.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    weights: tuple[float, ...]
    most: float = inf


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows started by every machine, the finisher first, and the step time with them."""

    seconds: float
    rows: tuple[int, ...]


def best_rows(terms: Terms, total: int, room: Room) -> Rows | None:
    """The rows with the least step time, none if ``total`` rows do not fit.

    Exact for up to three machines whose rows are not given.
    """
    if any(b < a for a, b in zip(room.lower, room.upper, strict=True)):
        return None
    free = [i for i, (a, b) in enumerate(zip(room.lower, room.upper, strict=True)) if a < b]
    if len(free) > EXACT:
        return _in_turns(terms, total, room, free)
    given = [0 if i in free else y for i, y in enumerate(room.lower)]
    plane = _Plane(
        left=total - sum(given),
        lower=tuple(room.lower[i] for i in free),
        upper=tuple(room.upper[i] for i in free),
        weights=tuple(room.weights[i] for i in free),
        most=room.most - sum(w * y for w, y in zip(room.weights, given, strict=True)),
        constant_s=terms.constant_s,
        groups=tuple(_folded(group, given, free) for group in terms.groups),
        floor=_folded(terms.floor, given, free),
    )
    found = plane.best()
    if found is None:
        return None
    for i, y in zip(free, found, strict=True):
        given[i] = y
    rows = tuple(given)
    return Rows(terms.seconds(rows), rows)


def _folded(group: Group, given: Sequence[int], free: Sequence[int]) -> Group:
    """The lines with the rows that are given in their constants."""
    return tuple(
        (line[0] + sum(c * y for c, y in zip(line[1:], given, strict=True)), *(line[1 + i] for i in free))
        for line in group
    )


@dataclass(frozen=True, slots=True)
class _Second:
    """The least value over the second machine's rows, real and whole, and the whole ones."""

    real_s: float
    whole_s: float
    rows: int


@dataclass(frozen=True, slots=True)
class _Plane:
    """At most three machines that share ``left`` rows; the first has what the others leave."""

    left: int
    lower: tuple[int, ...]
    upper: tuple[int, ...]
    weights: tuple[float, ...]
    most: float
    constant_s: float
    groups: tuple[Group, ...]
    floor: Group

    def best(self) -> tuple[int, ...] | None:
        """The best rows; none where there is no room."""
        if len(self.lower) < 2:
            return self._alone()
        if len(self.lower) == 2:
            found = self._second(None)
            return None if found.whole_s == inf else (self.left - found.rows, found.rows)
        return self._walk()

    def _alone(self) -> tuple[int, ...] | None:
        rows = (self.left,) * len(self.lower)
        held = sum(w * y for w, y in zip(self.weights, rows, strict=True))
        inside = all(a <= y <= b for a, y, b in zip(self.lower, rows, self.upper, strict=True))
        return rows if sum(rows) == self.left and inside and held <= self.most else None

    def _walk(self) -> tuple[int, ...] | None:
        low, high = self._third()
        if low > high:
            return None
        known: dict[int, _Second] = {}

        def at(z: int) -> _Second:
            if z not in known:
                known[z] = self._second(z)
            return known[z]

        first, end = low, high
        while first < end:
            middle = (first + end) // 2
            if at(middle + 1).real_s >= at(middle).real_s:
                end = middle
            else:
                first = middle + 1
        least, rows = inf, None
        for way in (range(first, high + 1), range(first - 1, low - 1, -1)):
            for z in way:
                found = at(z)
                if found.real_s >= least:
                    break
                if found.whole_s < least:
                    least, rows = found.whole_s, (self.left - found.rows - z, found.rows, z)
        return rows

    def _third(self) -> tuple[int, int]:
        """From where to where the last machine's rows may go; memory may cut off the first few."""
        low, high = self.lower[2], min(self.upper[2], self.left - self.lower[0] - self.lower[1])
        while low <= high and self._range(low) is None:
            low += 1
        while low <= high and self._range(high) is None:
            high -= 1
        return low, high

    def _range(self, z: int | None) -> tuple[float, float] | None:
        """From where to where the second's rows may go, the last with z of them."""
        left = self.left - (z or 0)
        low = float(max(self.lower[1], left - self.upper[0]))
        high = float(min(self.upper[1], left - self.lower[0]))
        held = self.weights[0] * left + (self.weights[2] * z if z else 0.0)
        saved = self.weights[0] - self.weights[1]  # by each row that the second starts in the first's place
        if held > self.most and saved > 0:
            low = max(low, (held - self.most) / saved)
        elif held > self.most:
            return None
        return (low, high) if low <= high else None

    def _second(self, z: int | None) -> _Second:
        ends = self._range(z)
        if ends is None:
            return _Second(inf, inf, 0)
        moving = _Moving(self.constant_s, tuple(self._lines(group, z) for group in self.groups))
        real_s, at = min((moving.value(y), y) for y in moving.corners(*ends))
        least = _Moving(0.0, (self._lines(self.floor, z),) if self.floor else ())
        if least.value(at) > real_s:
            real_s, at = _meeting(moving, at, least, ends)
        low, high = ceil(ends[0] - CLOSE), floor(ends[1] + CLOSE)
        near = {min(max(y, low), high) for y in (floor(at), ceil(at))} if low <= high else set[int]()
        values = ((max(moving.value(y), least.value(y)), y) for y in near)
        return _Second(real_s, *min(values, default=(inf, 0)))

    def _lines(self, group: Group, z: int | None) -> Lines:
        left, last = self.left - (z or 0), z or 0
        return tuple((line[0] + line[1] * left + line[-1] * last, line[2] - line[1]) for line in group)


@dataclass(frozen=True, slots=True)
class _Moving:
    """A sum of maxima of lines in one variable."""

    constant_s: float
    groups: tuple[Lines, ...]

    def value(self, y: float) -> float:
        """At that point."""
        return self.constant_s + sum([max([a + b * y for a, b in group]) for group in self.groups])

    def corners(self, low: float, high: float) -> Iterator[float]:
        """Where it can be least: at the ends, and where two lines of a maximum cross."""
        yield low
        yield high
        for group in self.groups:
            for (a, b), (c, d) in combinations(group, 2):
                if b != d:
                    y = (c - a) / (b - d)
                    if low < y < high:
                        yield y


def _meeting(moving: _Moving, first: float, other: _Moving, ends: tuple[float, float]) -> tuple[float, float]:
    """The least of the greater of two sums, and where; at ``first`` one is least, but the other above it.

    From there to where the other is least the one grows and the other falls.
    """
    least, last = min((other.value(y), y) for y in other.corners(*ends))
    if least >= moving.value(last):
        return least, last
    for _ in range(HALVINGS):
        middle = (first + last) / 2
        if other.value(middle) > moving.value(middle):
            first = middle
        else:
            last = middle
    return max(moving.value(first), other.value(last)), last


def _in_turns(terms: Terms, total: int, room: Room, free: Sequence[int]) -> Rows | None:
    """Three at a time, exactly, from several starts, until no three do better."""
    best: Rows | None = None
    for rows in _starts(terms, total, room):
        current, moved = Rows(terms.seconds(rows), rows), True
        while moved:
            moved = False
            for three in combinations(free, EXACT):
                lower, upper = list(current.rows), list(current.rows)
                for i in three:
                    lower[i], upper[i] = room.lower[i], room.upper[i]
                found = best_rows(terms, total, Room(tuple(lower), tuple(upper), room.weights, room.most))
                if found is not None and found.seconds < current.seconds * (1 - 1e-12):
                    current, moved = found, True
        if best is None or current.seconds < best.seconds:
            best = current
    return best


def _starts(terms: Terms, total: int, room: Room) -> Iterator[tuple[int, ...]]:
    """As many rows as can be for those who go farthest, which needs the least memory; and one by one.

    One by one, each row goes to the machine with which the step is shortest.
    """
    count = len(room.lower)
    packed = list(room.lower)
    for i in range(count - 1, -1, -1):
        packed[i] += max(0, min(room.upper[i] - packed[i], total - sum(packed)))
    if sum(packed) != total or sum(w * y for w, y in zip(room.weights, packed, strict=True)) > room.most:
        return
    yield tuple(packed)
    rows = list(room.lower)
    for _ in range(total - sum(rows)):
        open_ = [i for i in range(count) if rows[i] < room.upper[i]]
        rows[min(open_, key=lambda i: terms.seconds((*rows[:i], rows[i] + 1, *rows[i + 1 :])))] += 1
    if sum(w * y for w, y in zip(room.weights, rows, strict=True)) <= room.most:
        yield tuple(rows)
