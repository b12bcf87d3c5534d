"""Which groups a search puts in front of which: all sets of few devices, or neighbours in an order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from spanwise.planner.facts.kinds import Group, Kinds, by_kind

_SIZES = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    10,
    12,
    16,
    20,
    24,
    32,
    40,
    48,
    64,
    96,
    128,
    192,
    256,
)  # of groups, close together where it matters
EVERY_PLACE = 32  # devices of an order; in longer ones groups are fewer
END = 0  # key of the state without devices


class Extension(NamedTuple):
    """A group put in front of what a state offers.

    Attributes:
        key: state that it belongs to.
        group: its devices; none: the state also offers what the one behind does, devices are left out.
        rest: state behind it, ``END`` = nothing.
        ends: whether it may be the last stage although there is a rest.
        ahead: micro-batches in flight that its memory must hold; 0 = as many as the search asks of all.
    """

    key: int
    group: Group
    rest: int = END
    ends: bool = False
    ahead: int = 0


def members(mask: int) -> Group:
    """Device indices of a bit mask."""
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


def mask_of(devices: Iterable[int]) -> int:
    """Bit mask of device indices."""
    return sum(1 << d for d in set(devices))


def all_subsets(devices: Group, kinds: Kinds, *, singles: bool = False) -> Iterator[Extension]:
    """Every set with every group at its head, smaller sets first; ``singles``: groups of one device.

    Of equal devices a set has the first ones and a group the last of those, so that of all sets and groups
    that an exchange of equal devices makes the same there is one.
    """
    alike = by_kind(kinds, devices)

    def mask(first: Sequence[int], last: Sequence[int]) -> int:
        return mask_of(d for own, a, b in zip(alike, first, last, strict=True) for d in own[a:b])

    none = [0] * len(alike)
    for most in sorted(product(*(range(len(own) + 1) for own in alike)), key=sum):
        for rest in product(*(range(count + 1) for count in most)):
            if sum(most) > sum(rest) and (not singles or sum(most) == sum(rest) + 1):
                yield Extension(mask(none, most), members(mask(rest, most)), mask(none, rest))


def by_depth(extensions: Iterable[Extension], most: int) -> Iterator[Extension]:
    """Every state once for each number of stages: memory must hold P-p forwards in stage p of P.

    As the dimension p of Asteroid's dynamic programme.
    """
    for extension in extensions:
        for stages in range(1, most + 1):
            if (extension.rest == END) == (stages == 1):
                rest = END if stages == 1 else extension.rest * (most + 1) + stages - 1
                yield Extension(extension.key * (most + 1) + stages, extension.group, rest, ahead=stages)


def subset_pairs(devices: Group, kinds: Kinds, *, singles: bool = False) -> int:
    """How many sets with groups ``all_subsets`` yields, about."""
    counts = [len(own) for own in by_kind(kinds, devices)]
    sets = int(np.prod([n + 1 for n in counts], dtype=np.float64))
    return sets * len(counts) if singles else int(np.prod([(n + 1) * (n + 2) / 2 for n in counts]))


def along(order: Group, kinds: Kinds, most: int) -> Iterator[Extension]:
    """Every group of neighbours in a device order, up to ``most``, before any that come behind it.

    Devices may be left out: from any place on to the next one of another kind. In long orders groups of
    several kinds have all devices of these, and of many equal devices not every number is tried.
    """
    count = len(order)
    turns = [i for i in range(1, count) if kinds[order[i]] != kinds[order[i - 1]]] + [count]
    starts = {0, *turns}
    ahead = len(turns) - 1  # index of the first turn behind the place
    for place in reversed(range(count)):
        while ahead > 0 and turns[ahead - 1] > place:
            ahead -= 1
        left = turns[ahead] - place
        if count <= EVERY_PLACE:
            sizes: set[int] = set(_SIZES)
        elif left in _SIZES or place in starts:
            sizes = {size for size in _SIZES if size == left or left - size in _SIZES}
        else:
            continue
        sizes.update(turn - place for turn in turns[ahead : ahead + 3])
        for size in sorted(s for s in sizes if s <= min(most, count - place)):
            group = tuple(sorted(order[place : place + size]))
            yield Extension(count - place, group, count - place - size, ends=True)
        if turns[ahead] < count:
            yield Extension(count - place, (), count - turns[ahead])
