"""What a search keeps of a state: the best plans of every head, and what was found in the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spanwise.planner.facts.kinds import Group
from spanwise.planner.facts.tables import Floats, Ints
from spanwise.planner.search.groups import StageTimes


@dataclass(frozen=True, slots=True)
class Tail:
    """A given last stage: from which position of the grid, on which group, how long."""

    at: int
    group: Group
    times: StageTimes


@dataclass(frozen=True, slots=True)
class Head:
    """A given first stage up to a position of the grid."""

    at: int
    group: Group
    times: StageTimes


@dataclass(frozen=True, slots=True)
class Entry:
    """The best plans with one group at the head. Arrays are ``[M, position]``; ``cut`` -1 = to the end."""

    key: int
    group: Group
    most: Floats
    exposed: Floats
    cut: Ints
    follower: Ints


@dataclass(slots=True)
class State:
    """Numbers of the entries that a state offers to what is put in front, and their arrays, stacked."""

    entries: list[int]
    stacked: tuple[Floats, Floats] | None = None
    pruned: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """The best plan of one entry that reaches the first layer.

    ``micro_batches`` is the index of their number, ``used`` the devices in rising order.
    """

    price_s: float
    micro_batches: int
    used: Group
    entry: int


def better(
    one: tuple[Floats, Floats, Ints, Ints], other: tuple[Floats, Floats, Ints, Ints] | None = None
) -> tuple[Floats, Floats, Ints, Ints]:
    """Of two ways to go on the cheaper one, for every count and position."""
    if other is None:
        return one
    first = one[0] + np.maximum(one[1], 0.0) <= other[0] + np.maximum(other[1], 0.0)
    return (
        np.where(first, one[0], other[0]),
        np.where(first, one[1], other[1]),
        np.where(first, one[2], other[2]),
        np.where(first, one[3], other[3]),
    )
