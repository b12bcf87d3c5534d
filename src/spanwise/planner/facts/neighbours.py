"""Sequences of groups that lie next to one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from spanwise.planner.facts.kinds import Group, Kinds, by_kind

Sequence = tuple[Group, ...]  # the group of every stage


def neighbours(kinds: Kinds, sequence: Sequence, *, singles: bool) -> Iterator[Sequence]:
    """One device of a kind moved, added, left out or exchanged; two stages joined, or one parted."""
    used = {d for group in sequence for d in group}
    spare = [own[0] for own in by_kind(kinds, (d for d in range(len(kinds)) if d not in used))]
    held = [[own[-1] for own in by_kind(kinds, group)] for group in sequence]
    places = range(len(sequence))
    for i in places:
        for device in held[i]:
            for other in spare:
                yield _with(sequence, {i: _without(sequence[i], device, other)})
    if not singles:
        yield from _moved(sequence, held, spare)
    for i in places:
        for j in range(i + 1, len(sequence)):
            for a in held[i]:
                for b in held[j]:
                    if kinds[a] != kinds[b]:
                        changed = {i: _without(sequence[i], a, b), j: _without(sequence[j], b, a)}
                        yield _with(sequence, changed)
    for at in range(len(sequence) + 1):
        for other in spare:
            yield (*sequence[:at], (other,), *sequence[at:])
    for i in places:
        if len(sequence) > 1:
            yield _with(sequence, {i: ()})


def _moved(sequence: Sequence, held: list[list[int]], spare: list[int]) -> Iterator[Sequence]:
    for i, group in enumerate(sequence):
        for device in held[i]:
            less = _without(group, device)
            if less:
                yield _with(sequence, {i: less})
                yield (*sequence[:i], (device,), less, *sequence[i + 1 :])
                yield (*sequence[:i], less, (device,), *sequence[i + 1 :])
            for j, other in enumerate(sequence):
                if j != i:
                    yield _with(sequence, {i: less, j: tuple(sorted((*other, device)))})
        for other in spare:
            yield _with(sequence, {i: tuple(sorted((*group, other)))})
    for i, (a, b) in enumerate(pairwise(sequence)):
        yield (*sequence[:i], tuple(sorted(a + b)), *sequence[i + 2 :])


def _without(group: Group, device: int, instead: int | None = None) -> Group:
    left = tuple(d for d in group if d != device)
    return left if instead is None else tuple(sorted((*left, instead)))


def _with(sequence: Sequence, changed: dict[int, Group]) -> Sequence:
    """Stages that lose their last device go."""
    found = (changed.get(i, group) for i, group in enumerate(sequence))
    return tuple(group for group in found if group)
