"""Pulling what is aggregated while the rest is still pushed: both directions of a server at work at once.

In ``dynacomm`` pulls begin when all pushes have ended, so each direction of a link idles half of the step.
Here the server updates a layer as soon as the gradients of all workers are in, and a worker pulls it from
then on. Backward ends with layer 1 and forward begins with it, so the layers behind it travel home
meanwhile. The idea is ours; it needs links whose directions do not disturb each other and a server that
counts per layer.

A step is as long as one round takes when rounds follow each other and workers wait for nothing but the layers
that they pull: each begins backward when its own forward has ended. With s_w for when worker w
begins, h_w(i) for the longest way from layer i being aggregated to the end of w's forward, and g_v(i) for
when v has pushed layer i after its begin, the next round begins at

    s'_w = max over v of (s_v + max over i of [ g_v(i) + h_w(i) ])

and the step time is the greatest mean of a cycle of these weights (Baccelli et al., "Synchronization and
Linearity", 1992, chapter 3). With one worker that is simply the length of its round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from spanwise.core.errors import InputError, PlanError
from spanwise.planner.segments.chain import Chain, Cuts, Ends, Exchange, best_segments, check_ends


@dataclass(frozen=True, slots=True)
class DuplexCuts:
    """Segments of one worker, and the order in which its downlink sends those that it pulls.

    ``order`` has each pull segment once, by its number from the first layers on. The downlink keeps to it and
    waits where the next one is not aggregated yet, so that what was planned is what happens.
    """

    cuts: Cuts
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DuplexPlan:
    """Segments of every worker, and the step time under them, rounded up to a nanosecond."""

    workers: tuple[DuplexCuts, ...]
    step_ns: int


@dataclass(frozen=True, slots=True)
class Way:
    """One direction of an exchange with its sums: ``sent[n]`` of n layers, ``left[n]`` of those behind."""

    sent: tuple[int, ...]
    left: tuple[int, ...]
    overhead_ns: int

    @classmethod
    def of(cls, chain: Chain) -> Way:
        """The sums of a chain."""
        return cls(chain.sent_ns, chain.left_ns, chain.overhead_ns)

    def messages_ns(self, ends: Ends) -> list[int]:
        """Nanoseconds of the message of every segment."""
        sent = self.sent
        return [self.overhead_ns + sent[b] - sent[a] for a, b in zip((0, *ends[:-1]), ends, strict=True)]


Onward = list[tuple[int, int]]  # per segment: its first layer, and nanoseconds from there to forward's end


def pushed_ns(push: Way, ends: Ends) -> list[int]:
    """``[layers]``: when each layer's gradient has been pushed, after the begin of backward; not rising."""
    starts = (0, *ends[:-1])
    free = 0
    out: list[int] = []
    for start, stop, message in zip(
        reversed(starts), reversed(ends), reversed(push.messages_ns(ends)), strict=True
    ):
        free = max(free, push.left[start]) + message
        out += [free] * (stop - start)
    out.reverse()
    return out


def onward_ns(pull: Way, ends: Ends, order: Sequence[int]) -> Onward:
    """Per segment, in the order of sending: its first layer, and the longest way from there to forward's end.

    From a segment being aggregated lead: its message, then its layers and all behind them; or its message,
    then that of the next in order, and so on.
    """
    messages = pull.messages_ns(ends)
    longest = 0
    out: Onward = []
    for number in reversed(order):
        first = ends[number - 1] if number else 0
        longest = messages[number] + max(pull.left[first], longest)
        out.append((first, longest))
    return out


def greatest_cycle_mean(weights: Sequence[Sequence[int]]) -> Fraction:
    """Greatest mean weight of a cycle in a graph in which every node has an edge to every node.

    Karp, "A characterization of the minimum cycle mean in a digraph", Discrete Mathematics 23, 1978.
    """
    nodes = range(len(weights))
    heaviest = [[0] * len(weights)]  # of walks of so many edges that end at each node
    for _ in nodes:
        before = heaviest[-1]
        heaviest.append([max(map(int.__add__, row, before)) for row in weights])
    last = heaviest.pop()
    count = len(weights)
    return max(min(Fraction(last[v] - heaviest[k][v], count - k) for k in nodes) for v in nodes)


def duplex_step_ns(workers: Sequence[Exchange], plans: Sequence[DuplexCuts]) -> int:
    """The step time of planned segments, rounded up to a nanosecond.

    Raises:
        InputError: workers have different numbers of layers, or there is none.
        PlanError: a plan does not cover the layers, or its order not the segments.
    """
    check_workers(workers)
    for exchange, plan in zip(workers, plans, strict=True):
        check_ends(plan.cuts.pull, exchange.pull.layers)
        check_ends(plan.cuts.push, exchange.push.layers)
        if sorted(plan.order) != list(range(len(plan.cuts.pull))):
            raise PlanError(
                f"segments: order {', '.join(map(str, plan.order))} of {len(plan.cuts.pull)} pulls; "
                "it must have each of them once"
            )
    pushed = [pushed_ns(Way.of(e.push), p.cuts.push) for e, p in zip(workers, plans, strict=True)]
    onward = [onward_ns(Way.of(e.pull), p.cuts.pull, p.order) for e, p in zip(workers, plans, strict=True)]
    return rounded_up(greatest_cycle_mean(round_weights(onward, pushed)))


def round_weights(onward: Sequence[Onward], pushed: Sequence[Sequence[int]]) -> list[list[int]]:
    """``[w][v]``: how long after v begins backward w can begin its next one at the earliest."""
    return [[max(done[first] + way for first, way in own) for done in pushed] for own in onward]


def duplex_bound_ns(workers: Sequence[Exchange]) -> int:
    """No segmentation and no order give a shorter step.

    All layers have been aggregated when a worker's own pushes have ended, at the earliest, and after that
    layer 1 travels and all layers run; all bytes travel home after the last layer went out; and every layer
    goes out once it has been computed, comes back, and is computed again with all behind it.
    """
    check_workers(workers)
    return max(_own_bound_ns(worker.pull, worker.push) for worker in workers)


def _own_bound_ns(pull: Chain, push: Chain) -> int:
    """Of one worker, as if the others were never late."""
    into, out = Way.of(pull), Way.of(push)
    through = best_segments(push).makespan_ns + pull.message_ns[0] + into.left[0]
    back = push.compute_ns[-1] + push.overhead_ns + push.message_ns[-1] + into.sent[-1] + pull.compute_ns[-1]
    alone = push.overhead_ns + max(
        out.left[i] + push.message_ns[i] + pull.message_ns[i] + into.left[i] for i in range(pull.layers)
    )
    return pull.overhead_ns + max(through, back, alone)


def check_workers(workers: Sequence[Exchange]) -> None:
    """Raises ``InputError`` unless there are workers and all have the same layers."""
    counts = sorted({worker.pull.layers for worker in workers})
    if len(counts) != 1:
        raise InputError(
            f"segments: workers with {', '.join(map(str, counts)) or 'no'} layers; "
            "give at least one worker, all with the same layers"
        )


def rounded_up(value: Fraction) -> int:
    """The least integer that is not less."""
    return -(-value.numerator // value.denominator)
