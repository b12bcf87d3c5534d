"""What one device trains: the most gain under its budget of bytes, by an exact dynamic program.

Which part is the first that trains decides what all parts behind it keep: masks of ReLUs, scales of norms. So
every part is tried as the first, with the best choice for those behind it; that choice comes from a front of
(bytes, gain) of which none is worse in both (Nemhauser and Ullmann, "Discrete dynamic programming and capital
allocation", Management Science 15(9), 1969). Exact for a chain; where branches lie beside each other, bytes
are an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spanwise.core.errors import InfeasibleError
from spanwise.core.units import format_bytes
from spanwise.planner.dsparse.options import Selectable

# Bytes are rounded up to a grain: of a small budget to a part of it, of a large one to 16 KiB.
GRAIN, FINEST_PART = 2**14, 2**12

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Choice = tuple[int, ...]  # number of the option of each part


@dataclass(frozen=True, slots=True)
class _Front:
    """Choices for the parts behind some part: bytes, gain, and which option on which entry behind."""

    nbytes: Ints
    gains: Floats
    options: Ints
    parents: Ints


def select(
    model: Selectable, budget_bytes: int, *, most: Sequence[int] | None = None, byte_price: float = 0.0,
    grain: int | None = None,
) -> Choice:  # fmt: skip
    """The options with the greatest sum of gains whose bytes are within the budget.

    Args:
        model: what can be chosen.
        budget_bytes: of the device, for tensors.
        most: greatest number of the option of each part; none: no limit.
        byte_price: gain that a trained byte costs, as it is to be sent.
        grain: bytes of own costs are rounded up to it; 1 is exact. By default what ``GRAIN`` says.

    Raises:
        InfeasibleError: the budget does not even hold a device that trains nothing; says by how many bytes.
    """
    room = budget_bytes - model.constant_bytes
    if room < 0:
        raise InfeasibleError(
            f"a device that trains nothing needs {format_bytes(model.constant_bytes)} (weights, buffers, one "
            f"operation at {model.rows} rows), its budget is {format_bytes(budget_bytes)}, "
            f"{format_bytes(-room)} ({-room} bytes) short; raise its memory or give it fewer rows"
        )
    if grain is None:
        grain = max(1, min(GRAIN, room // FINEST_PART))
    parts = model.parts
    limits = [len(part.options) - 1 for part in parts] if most is None else list(most)
    fronts: list[_Front] = [
        _Front(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))
    ]
    best: tuple[float, int, int, int] = (0.0, len(parts), 0, 0)  # gain, first part, its option, entry behind
    for at in range(len(parts) - 1, -1, -1):
        front = fronts[-1]
        for number in range(1, limits[at] + 1):
            option = parts[at].options[number]
            gain = option.gain - byte_price * option.parameter_bytes
            left = room - option.behind_bytes - model.after_bytes[at] - _up(option.own_bytes, grain)
            entry = int(np.searchsorted(front.nbytes, left, side="right")) - 1
            if entry >= 0 and gain + float(front.gains[entry]) > best[0]:
                best = (gain + float(front.gains[entry]), at, number, entry)
        fronts.append(_extended(front, model, at, limits[at], room, byte_price, grain))
    return _traced_back(fronts, best, len(parts))


def _up(nbytes: int, grain: int) -> int:
    return -(-nbytes // grain) * grain


def _extended(
    front: _Front, model: Selectable, at: int, limit: int, room: int, byte_price: float, grain: int
) -> _Front:
    """The front with one part more in front of it."""
    options = model.parts[at].options[: limit + 1]
    entries = np.arange(len(front.nbytes), dtype=np.int64)
    nbytes = np.concatenate([front.nbytes + _up(option.own_bytes, grain) for option in options])
    gains = np.concatenate([front.gains + o.gain - byte_price * o.parameter_bytes for o in options])
    numbers = np.repeat(np.arange(len(options), dtype=np.int64), len(entries))
    parents = np.tile(entries, len(options))
    order = np.lexsort((-gains, nbytes))
    order = order[nbytes[order] <= room]
    ahead = np.maximum.accumulate(np.concatenate([[-np.inf], gains[order][:-1]]))
    kept = order[gains[order] > ahead]
    return _Front(nbytes[kept], gains[kept], numbers[kept], parents[kept])


def _traced_back(fronts: Sequence[_Front], best: tuple[float, int, int, int], count: int) -> Choice:
    _, first, number, entry = best
    choice = [0] * count
    if first == count:
        return tuple(choice)
    choice[first] = number
    for at in range(first + 1, count):
        front = fronts[count - at]  # made when part ``at`` was put in front
        choice[at] = int(front.options[entry])
        entry = int(front.parents[entry])
    return tuple(choice)


def within_bytes(
    model: Selectable, budget_bytes: int, most_parameter_bytes: int, *, grain: int | None = None
) -> Choice:
    """The same, with at most so many bytes of parameters trained, as all of them are to be sent.

    By a price on bytes that is bisected (Everett, "Generalized Lagrange multiplier method", Operations
    Research 11(3), 1963): the best choice for its own number of bytes, which may be somewhat below the limit.
    """
    if grain is None:  # many choices are made: a coarser one
        grain = max(1, min(4 * GRAIN, (budget_bytes - model.constant_bytes) // FINEST_PART))
    choice = select(model, budget_bytes, grain=grain)
    if parameter_bytes(model, choice) <= most_parameter_bytes:
        return choice
    options = [o for part in model.parts for o in part.options if o.parameter_bytes]
    low, high = 0.0, max((o.gain / o.parameter_bytes for o in options), default=1.0) * 1.01 + 1e-12
    best: Choice = (0,) * len(model.parts)
    for _ in range(24):
        middle = (low + high) / 2
        choice = select(model, budget_bytes, byte_price=middle, grain=grain)
        if parameter_bytes(model, choice) <= most_parameter_bytes:
            high = middle
            best = choice if model.gain(choice) > model.gain(best) else best
        else:
            low = middle
    return best


def parameter_bytes(model: Selectable, choice: Choice) -> int:
    """Bytes of what a choice trains."""
    return sum(part.options[n].parameter_bytes for part, n in zip(model.parts, choice, strict=True))


def last_k(model: Selectable, budget_bytes: int) -> Choice:
    """Baseline: as many of the last parts as fit, each wholly."""
    return _grown(model, budget_bytes, list(reversed(range(len(model.parts)))), stop=True)


def shifts_only(model: Selectable, budget_bytes: int) -> Choice:
    """Baseline: biases and shifts of norms from the last part on, as far as they fit."""
    numbers = [int(any(model.sites[s].shift for s in part.sites)) for part in model.parts]
    return _grown(model, budget_bytes, list(reversed(range(len(model.parts)))), numbers, stop=True)


def in_order(model: Selectable, budget_bytes: int, order: Sequence[int]) -> Choice:
    """Baseline: parts wholly, in the order given, each that still fits."""
    return _grown(model, budget_bytes, order, stop=False)


def _grown(
    model: Selectable, budget_bytes: int, order: Sequence[int], numbers: Sequence[int] | None = None, *,
    stop: bool,
) -> Choice:  # fmt: skip
    choice = [0] * len(model.parts)
    for at in order:
        tried = list(choice)
        tried[at] = len(model.parts[at].options) - 1 if numbers is None else numbers[at]
        if model.peak_bytes(model.trains(tried)) <= budget_bytes:
            choice = tried
        elif stop:
            break
    return tuple(choice)
