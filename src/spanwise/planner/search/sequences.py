"""Many devices: a local search over the groups of the stages, cuts and micro-batches by dynamic programming.

A device order (``orders.py``) only has groups of neighbours. From the best of those on, devices move between
stages, out of the plan and into it, and stages join and part, as long as the price falls. Own construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from random import Random

from spanwise.planner.facts.kinds import Mix
from spanwise.planner.facts.neighbours import Sequence, neighbours
from spanwise.planner.problem import Problem
from spanwise.planner.search.extensions import END, Extension
from spanwise.planner.search.groups import Groups
from spanwise.planner.search.sets import Search

Key = tuple[Mix, ...]


class Sequences:
    """Prices of sequences of groups; those with the same last stages share the work on these."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.problem = groups.problem
        self._search = Search(groups, ())
        self._states: dict[tuple[Mix, int], int] = {}  # of a group in front of a state
        self.priced: dict[int, tuple[float, Sequence]] = {}  # by the state of a whole sequence

    def price_s(self, sequence: Sequence) -> float:
        """Least over all cuts and micro-batch counts; infinite if there is none."""
        state = END
        for group in reversed(sequence):
            key = (self.problem.lanes.mix(group), state)
            known = self._states.get(key)
            if known is None:
                known = self._states[key] = len(self._states) + 1
                self._search.add(Extension(known, group, state))
            state = known
        if state not in self.priced:
            self.priced[state] = (self._search.best_s(state), sequence)
        return self.priced[state][0]

    def improve(self, start: Sequence, budget: int, *, singles: bool) -> Sequence:
        """The first better neighbour, from there on again, in at most ``budget`` new prices."""
        current, least = start, self.price_s(start)
        most = len(self.priced) + budget
        moved = True
        mixed = Random(0)  # in no order of their own, so that no kind of move eats up the budget
        while moved:
            moved = False
            near_by = list(neighbours(self.problem.kinds, current, singles=singles))
            mixed.shuffle(near_by)
            for near in near_by:
                if len(self.priced) >= most:
                    return current
                if self.price_s(near) < least * (1 - 1e-6):
                    current, least, moved = near, self.price_s(near), True
                    break
        return current

    def best(self, count: int, each: int = 1) -> list[Sequence]:
        """The cheapest that were priced; first ``each`` of every number of stages, as price favours many."""
        ranked = sorted(
            (entry for entry in self.priced.values() if entry[0] < float("inf")), key=lambda e: e[0]
        )
        places: dict[int, int] = {}
        chosen: list[Sequence] = []
        for _, sequence in ranked:
            places[len(sequence)] = places.get(len(sequence), 0) + 1
            if places[len(sequence)] <= each:
                chosen.append(sequence)
        chosen = chosen[:count]
        more = (sequence for _, sequence in ranked if sequence not in chosen)
        return [*chosen, *islice(more, count - len(chosen))]


def chains(problem: Problem, sequences: Iterable[Sequence], *, deep: bool = False) -> Iterator[Extension]:
    """What a search needs to price all of these, common ends once.

    ``deep``: memory must hold P-p micro-batches in flight in stage p of P.
    """
    keys: dict[Key, int] = {(): END}
    for sequence in sequences:
        key = tuple(problem.lanes.mix(group) for group in sequence)
        for first in reversed(range(len(sequence))):
            if key[first:] not in keys:
                keys[key[first:]] = len(keys)
                ahead = len(sequence) - first if deep else 0
                yield Extension(keys[key[first:]], sequence[first], keys[key[first + 1 :]], ahead=ahead)
