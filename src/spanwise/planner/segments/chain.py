"""Layers of a chain joined into messages that hide behind compute: the segmentation that ends first, exactly.

A message takes a fixed overhead and the time of its bytes. Sent in one, nothing overlaps with compute; sent
layer by layer, every layer pays the overhead. With overhead D, ends of segments e_1 < ... < e_K = L, and P
and C the sums of message and compute time up to a layer, pulling and then running forward ends at

    T(e) = max over j = 1..K of [ j D + P(e_j) + C(L) - C(e_{j-1}) ]                                (1)

as the segment j has arrived at j D + P(e_j) and from its first layer on compute need not wait any more. A
backward pass whose gradients are pushed is the same read from its end: layer 1 is computed last and
travels last. So one routine serves pulls, pushes and the sums of gradients in segments.

The problem is that of Cai et al., "DynaComm", IEEE JSAC 40(2), 2022 (arXiv 2101.07968), solved there by
dynamic programming. The threshold method here is ours: it gives the same optimum in a hundredth of the time.
"Optimal" is for a chain cut between layers, one link and one processor that each do one thing at a time.

Times are whole nanoseconds, so that ties and strict comparisons are exact.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from spanwise.core.errors import InputError, PlanError

NS_PER_S = 10**9

Ends = tuple[int, ...]  # of every segment the layer after its last, rising; the last is the number of layers


@dataclass(frozen=True)
class Chain:
    """The layers of a model, in forward order, in one direction between a worker and its server.

    Attributes:
        message_ns: what each layer adds to the message that it travels in: its bytes over the rate.
        compute_ns: forward (pulls) or backward (pushes) of each layer.
        overhead_ns: of every message, whatever its size.

    Raises:
        InputError: there is no layer, or a time is negative.
    """

    message_ns: tuple[int, ...]
    compute_ns: tuple[int, ...]
    overhead_ns: int

    def __post_init__(self) -> None:
        if not self.message_ns or len(self.message_ns) != len(self.compute_ns):
            raise InputError(
                f"segments: {len(self.message_ns)} message times and {len(self.compute_ns)} compute times; "
                "give both for each of at least one layer"
            )
        least = min(min(self.message_ns), min(self.compute_ns), self.overhead_ns)
        if least < 0:
            raise InputError(f"segments: a time of {least} ns; times must not be negative, measure again")

    @classmethod
    def of(
        cls, layer_bytes: Sequence[int], compute_s: Sequence[float], overhead_s: float, bytes_per_s: float
    ) -> Chain:
        """From bytes and seconds, rounded to nanoseconds.

        Raises:
            InputError: a time is negative or not finite, or the rate is not above zero.
        """
        if not bytes_per_s > 0:
            raise InputError(f"segments: a rate of {bytes_per_s} bytes/s; it must be above zero")
        return cls(
            tuple(_ns(nbytes / bytes_per_s) for nbytes in layer_bytes),
            tuple(map(_ns, compute_s)),
            _ns(overhead_s),
        )

    @property
    def layers(self) -> int:
        """How many."""
        return len(self.message_ns)

    @cached_property
    def sent_ns(self) -> tuple[int, ...]:
        """``[layers + 1]``: what so many first layers add to messages."""
        return (0, *accumulate(self.message_ns))

    @cached_property
    def left_ns(self) -> tuple[int, ...]:
        """``[layers + 1]``: compute of the layers from each on."""
        return remaining(self.compute_ns)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one worker exchanges with its server in a step: parameters, then gradients, of the same layers.

    Raises:
        InputError: the three do not have the same number of layers, or a layer has fewer bytes than none.
    """

    pull: Chain
    push: Chain
    layer_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        counts = (self.pull.layers, self.push.layers, len(self.layer_bytes))
        if len(set(counts)) > 1:
            raise InputError(
                f"segments: {counts[0]} layers to pull, {counts[1]} to push, bytes of {counts[2]}; "
                "all layers travel both ways"
            )
        if min(self.layer_bytes) < 0:
            raise InputError(
                f"segments: a layer of {min(self.layer_bytes)} bytes; "
                "sizes must not be negative, profile again"
            )


@dataclass(frozen=True, slots=True)
class Cuts:
    """Segments of both directions of an exchange, each direction with its own."""

    pull: Ends
    push: Ends


@dataclass(frozen=True, slots=True)
class Segmentation:
    """Segments of one direction, and when it ends under them."""

    ends: Ends
    makespan_ns: int


def makespan_ns(chain: Chain, ends: Ends) -> int:
    """When the direction ends under these segments, equation (1).

    For a pull: from its first message to the end of forward. For a push: from the begin of backward to the
    end of the last message.

    Raises:
        PlanError: the segments do not cover the layers.
    """
    check_ends(ends, chain.layers)
    sent, left, overhead = chain.sent_ns, chain.left_ns, chain.overhead_ns
    start = spent = latest = 0
    for stop in ends:
        spent += overhead
        end = spent + sent[stop] + left[start]
        if end > latest:
            latest = end
        start = stop
    return latest


def step_ns(exchange: Exchange, cuts: Cuts) -> int:
    """Nanoseconds of a step whose pulls begin when all pushes have ended; without the server's update."""
    return makespan_ns(exchange.pull, cuts.pull) + makespan_ns(exchange.push, cuts.push)


def bound_ns(chain: Chain) -> int:
    """No segmentation ends earlier: all bytes and the last layer; the first layer's bytes and all layers."""
    sent, left = chain.sent_ns, chain.left_ns
    return chain.overhead_ns + max(sent[-1] + chain.compute_ns[-1], sent[1] + left[0])


def best_segments(chain: Chain) -> Segmentation:
    """The segmentation that ends first, and of those one with the fewest segments.

    A threshold is feasible if and only if segments that each reach as far as (1) allows under it reach the
    last layer: after fewer messages, and from a later layer on, a segment reaches no less far. The least
    feasible threshold is searched between bounds that are both values that (1) takes, so the end is exact.
    O(K log L) for each of some 20 thresholds; 152 layers take a tenth of a millisecond.
    """
    sent, left = chain.sent_ns, chain.left_ns
    ends: Ends = (chain.layers,)
    low, high = bound_ns(chain), makespan_ns(chain, ends)
    while low < high:
        found, value = _reach(sent, left, chain.overhead_ns, (low + high) // 2)
        if found:
            ends, high = found, value
        else:
            low = value
    return Segmentation(ends, high)


def _reach(sent: Sequence[int], left: Sequence[int], overhead_ns: int, limit_ns: int) -> tuple[Ends, int]:
    """Segments that reach as far as the limit allows, and their makespan.

    No segments if they do not reach the last layer; then the least limit under which any of them would have
    reached farther: all limits below are infeasible too.
    """
    layers = len(sent) - 1
    start = spent = makespan = 0
    farther = sent[-1] + left[0] + layers * overhead_ns  # no end is later
    ends: list[int] = []
    while start < layers:
        spent += overhead_ns
        base = spent + left[start]
        stop = bisect_right(sent, limit_ns - base, start + 1) - 1
        if stop < layers:
            farther = min(farther, base + sent[stop + 1])
            if stop == start:
                return (), farther
        makespan = max(makespan, base + sent[stop])
        ends.append(stop)
        start = stop
    return tuple(ends), makespan


def remaining(compute_ns: Sequence[int]) -> tuple[int, ...]:
    """``[layers + 1]``: compute of the layers from each on."""
    return tuple(accumulate(reversed(compute_ns), initial=0))[::-1]


def check_ends(ends: Ends, layers: int) -> None:
    """Raises ``PlanError`` unless the segments cover the layers in order, each with at least one."""
    if not ends or ends[-1] != layers or any(a >= b for a, b in pairwise((0, *ends))):
        raise PlanError(
            f"segments: ends {', '.join(map(str, ends)) or 'missing'} for {layers} layers; "
            f"they must rise and the last must be {layers}"
        )


def _ns(seconds: float) -> int:
    if not math.isfinite(seconds) or seconds < 0:
        raise InputError(
            f"segments: a time of {seconds} s; times must be finite and not negative, measure again"
        )
    return round(seconds * NS_PER_S)
