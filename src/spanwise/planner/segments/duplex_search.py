"""A joint plan of pull and push segments where layers are pulled as they are aggregated.

Segments of both directions depend on each other: what is pushed in small pieces is aggregated early, and
costs overheads. Reusing the optimum of the pushes for both is worse than ``dynacomm`` at times. So: a local
search over the cuts of all workers and both directions, always by the best single change of one direction,
from the best of many plain starts. It is deterministic and never worse than ``dynacomm``, which is among
the plans that are compared. Not proven optimal; the tests hold it against exhaustive search.

The order of a worker's pulls follows from its segments. Layer 1 is aggregated last, in a window that lies
within those of all others, and what the downlink sends is either before or after it. Before it only the
time of aggregation binds, so the last layers go first; after it only forward's need does, so the first
layers go first. So the only question is what goes before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, islice
from random import Random
from typing import NamedTuple

from spanwise.planner.segments.chain import Cuts, Ends, Exchange
from spanwise.planner.segments.duplex import (
    DuplexCuts,
    DuplexPlan,
    Onward,
    Way,
    check_workers,
    duplex_bound_ns,
    duplex_step_ns,
    greatest_cycle_mean,
    onward_ns,
    pushed_ns,
    round_weights,
)
from spanwise.planner.segments.rules import dynacomm

PIECES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # of about equal time or bytes: starts
CLIMBED = 3  # of the starts
KICKS = 12  # times that the best plan is changed at random and climbed from again
MOST_CHANGES = 3  # of one direction of one worker at once
MOST_PRICED = 20_000  # plans of one worker; a fraction of that of several that are unlike
MOST_PRICED_FROM = 400  # plans of one worker that has cuts in use


class _Priced(NamedTuple):
    """A plan with what it is compared by: its step time, then all rounds of all pairs of workers."""

    step: Fraction
    rounds: int
    plans: tuple[DuplexCuts, ...]
    weights: list[list[int]]


def duplex(workers: Sequence[Exchange]) -> DuplexPlan:
    """Segments and pull orders of all workers of one server for a step that is as short as was found.

    Workers whose times are the same get the same segments.

    Raises:
        InputError: workers have different numbers of layers, or there is none.
    """
    check_workers(workers)
    kinds = tuple(dict.fromkeys(workers))
    held = tuple(_held(dynacomm(kind)) for kind in kinds)
    found = _Search(kinds).best(tuple(plan.cuts for plan in held))
    best = min((found, held), key=lambda plans: duplex_step_ns(kinds, plans))
    by_kind = dict(zip(kinds, best, strict=True))
    return DuplexPlan(tuple(by_kind[worker] for worker in workers), duplex_step_ns(kinds, best))


def duplex_from(worker: Exchange, present: Cuts) -> DuplexCuts:
    """Segments and pull order of one worker by a short search: 152 layers take 20 to 50 ms.

    It begins with cuts that are in use, those of ``dynacomm`` and plain ones, and makes single changes only.
    """
    firsts = (present,), (dynacomm(worker),)
    (found,) = _Search((worker,), MOST_PRICED_FROM, kicks=0).best(*firsts)
    return found


def _held(cuts: Cuts) -> DuplexCuts:
    """All pulls after all pushes, as without duplex."""
    return DuplexCuts(cuts, tuple(range(len(cuts.pull))))


class _Search:
    """Plans of one set of unlike workers, and how many have been priced."""

    def __init__(self, workers: Sequence[Exchange], most: int = MOST_PRICED, kicks: int = KICKS) -> None:
        self._workers, self._kicks = workers, kicks
        self._pulls = [Way.of(worker.pull) for worker in workers]
        self._pushes = [Way.of(worker.push) for worker in workers]
        # When workers begin backward, against each other: which pulls go first depends on it a little.
        self._begins = [0] * len(workers)
        self._left = most // len(workers)

    def best(self, *firsts: tuple[Cuts, ...]) -> tuple[DuplexCuts, ...]:
        """The best plan that was found from the given cuts and from plain ones."""
        starts = dict.fromkeys((*firsts, *islice(self._plain_starts(), self._left // 4)))
        ranked = sorted((self._priced(cuts) for cuts in starts), key=_worth)
        best = min((self._climbed(start) for start in ranked[:CLIMBED]), key=_worth)
        bound, random = duplex_bound_ns(self._workers), Random(0)
        for _ in range(self._kicks):
            kicked = self._kicked(best, random)
            if best.step > bound and kicked not in starts:
                starts[kicked] = None
                best = min(best, self._climbed(self._priced(kicked)), key=_worth)
        return best.plans

    def _kicked(self, best: _Priced, random: Random) -> tuple[Cuts, ...]:
        """A few random changes of every direction."""
        return tuple(
            Cuts(_changed_at_random(plan.cuts.pull, pull, random),
                 _changed_at_random(plan.cuts.push, push, random))
            for plan, pull, push in zip(best.plans, self._pulls, self._pushes, strict=True)
        )  # fmt: skip

    def _plain_starts(self) -> Iterator[tuple[Cuts, ...]]:
        """Equal pieces, the same for all workers."""
        sizes = self._workers[0].layer_bytes
        measures: list[Sequence[int]] = [sizes, [1] * len(sizes)]
        for worker in self._workers:
            measures += [worker.push.message_ns, worker.push.compute_ns, worker.pull.compute_ns]
        for measure in dict.fromkeys(map(tuple, measures)):
            for count in PIECES:
                ends = _pieces(measure, count)
                yield (Cuts(ends, ends),) * len(self._workers)

    def _climbed(self, start: _Priced) -> _Priced:
        """Single changes of one direction of one worker, the best each time, until none is better."""
        best, moved = start, True
        while moved:
            moved = False
            for worker in range(len(self._workers)):
                for pulls in (True, False):
                    better = self._changed(best, worker, pulls)
                    if _worth(better) < _worth(best):
                        best, moved = better, True
                        self._begins = _begins(best.weights)
        return best

    def _changed(self, best: _Priced, worker: int, pulls: bool) -> _Priced:
        """The best of the plans that differ in one cut, or the plan itself."""
        cuts = [plan.cuts for plan in best.plans]
        own = cuts[worker]
        way = self._pulls[worker] if pulls else self._pushes[worker]
        found = best
        for ends in _near(own.pull if pulls else own.push, way.sent):
            if self._left <= 0:
                break
            cuts[worker] = Cuts(ends, own.push) if pulls else Cuts(own.pull, ends)
            found = min(found, self._priced(tuple(cuts)), key=_worth)
        return found

    def _priced(self, cuts: tuple[Cuts, ...]) -> _Priced:
        self._left -= 1
        pushed = [pushed_ns(way, own.push) for way, own in zip(self._pushes, cuts, strict=True)]
        if len(pushed) == 1:
            aggregated = pushed[0]
        else:
            begun = [[b + s for s in done] for b, done in zip(self._begins, pushed, strict=True)]
            aggregated = list(map(max, *begun))
        ways = [pull_way(way, own.pull, aggregated) for way, own in zip(self._pulls, cuts, strict=True)]
        weights = round_weights([onward for _, onward in ways], pushed)
        plans = tuple(DuplexCuts(own, order) for own, (order, _) in zip(cuts, ways, strict=True))
        return _Priced(greatest_cycle_mean(weights), sum(map(sum, weights)), plans, weights)


def pull_way(pull: Way, ends: Ends, aggregated: Sequence[int]) -> tuple[tuple[int, ...], Onward]:
    """The better of two orders in which a downlink may send the segments, and ``onward_ns`` of it.

    As long as the first segment is not aggregated, of those that are the one with the lowest layers is
    sent, as it is needed first (Schrage's rule for heads and tails). The last of them may still be under
    way when the first segment is there: either it is sent nevertheless, or after the first one.
    """
    released = [aggregated[start] for start in (0, *ends[:-1])]
    before, late = _sent_before(pull.messages_ns(ends), released)
    order = _order(before, len(ends))
    onward = onward_ns(pull, ends, order)
    if not late:
        return order, onward
    other = _order(before[:-1], len(ends))
    found = (order, onward), (other, onward_ns(pull, ends, other))
    return min(found, key=lambda way: max(aggregated[first] + rest for first, rest in way[1]))


def _sent_before(messages: Sequence[int], released: Sequence[int]) -> tuple[list[int], bool]:
    """What is sent before the first segment, and whether the first has to wait for the last of these."""
    free, behind = 0, len(messages) - 1  # behind: the next one that is not aggregated yet
    waiting: list[int] = []
    sent: list[int] = []
    while behind or waiting:
        if not waiting:
            free = max(free, released[behind])
        if free >= released[0]:
            break
        while behind and released[behind] <= free:
            waiting.append(behind)
            behind -= 1
        sent.append(waiting.pop())
        free += messages[sent[-1]]
    return sent, free > released[0] and bool(sent)


def _order(before: Sequence[int], count: int) -> tuple[int, ...]:
    first = set(before)
    return (*sorted(first, reverse=True), *(number for number in range(count) if number not in first))


def _worth(priced: _Priced) -> tuple[Fraction, int]:
    return priced.step, priced.rounds


def _begins(weights: Sequence[Sequence[int]]) -> list[int]:
    """When workers begin backward once rounds have settled, about; the first of them at 0."""
    begins = [0] * len(weights)
    for _ in range(2 * len(weights)):
        begins = [max(map(int.__add__, row, begins)) for row in weights]
    return [begin - min(begins) for begin in begins]


def _pieces(measure: Sequence[int], count: int) -> Ends:
    """Consecutive layers in so many pieces of about equal measure, or in as many as there are."""
    sums = list(accumulate(measure))
    inner = (1 + bisect_left(sums, sums[-1] * part / count) for part in range(1, count))
    return tuple(sorted({*(end for end in inner if end < len(sums)), len(sums)}))


def _changed_at_random(ends: Ends, way: Way, random: Random) -> Ends:
    for _ in range(random.randint(0, MOST_CHANGES)):
        ends = random.choice([ends, *_near(ends, way.sent)])
    return ends


def _near(ends: Ends, sent: Sequence[int]) -> Iterator[Ends]:
    """All cuts but one; one cut 1, 2, 4, ... layers further; one more in the middle of a segment's bytes."""
    edges = (0, *ends)
    for at, end in enumerate(ends[:-1]):
        before, after = ends[:at], ends[at + 1 :]
        yield (*before, *after)
        step = 1
        while step < max(end - edges[at], after[0] - end):
            if end - step > edges[at]:
                yield (*before, end - step, *after)
            if end + step < after[0]:
                yield (*before, end + step, *after)
            step *= 2
    for at, stop in enumerate(ends):
        start = edges[at]
        if stop - start > 1:
            middle = bisect_left(sent, (sent[start] + sent[stop]) / 2, start + 1, stop)
            yield (*ends[:at], min(middle, stop - 1), *ends[at:])
