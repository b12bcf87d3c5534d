"""Rules that cut an exchange of parameters and gradients into segments: the optimum, and those of others.

All give the same sums of the same bytes and differ in time only. ``segments.step_ns`` is what a rule's cuts
take; ``duplex.py`` goes beyond all of them by pulling while others still push.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable

from spanwise.planner.segments.chain import Chain, Cuts, Ends, Exchange, best_segments, makespan_ns

FIRST_BUCKET_BYTES = 2**20
BUCKET_BYTES = 25 * 2**20


def sequential(exchange: Exchange) -> Cuts:
    """One message each way: nothing overlaps."""
    ends = (exchange.pull.layers,)
    return Cuts(ends, ends)


def layer_by_layer(exchange: Exchange) -> Cuts:
    """A message for every layer.

    Wait-free backpropagation: Zhang et al., "Poseidon", USENIX ATC 2017.
    """
    ends = tuple(range(1, exchange.pull.layers + 1))
    return Cuts(ends, ends)


def bucket_25mb(exchange: Exchange) -> Cuts:
    """Buckets in the order of sending, closed at 1 MiB the first and at 25 MiB the others.

    Gradients of PyTorch's DistributedDataParallel: Li et al., "PyTorch Distributed", VLDB 2020, section 3.2;
    sizes from its source (``bucket_cap_mb`` and the first bucket's, ``compute_bucket_assignment_by_size``).
    It has no pulls: theirs follow the same rule from the first layer on.
    """
    sizes = exchange.layer_bytes
    last = len(sizes)
    into = [*_full(sizes), last]
    out = [last - count for count in _full(reversed(sizes))]
    return Cuts(_rising(into), _rising([*out, last]))


def ibatch(exchange: Exchange) -> Cuts:
    """The next message has as many layers as arrive during the compute of the last ones, one at least.

    Our reading of Wang, Pi and Zhou, "Scalable Distributed DL Training: Batching Communication and
    Computation", AAAI 2019, a greedy choice of batches; where it begins is not known to us, so every first
    batch is tried and the best kept. Pushes by time reversal: one hides behind the compute of the next.
    """
    return Cuts(_greedy_batches(exchange.pull), _greedy_batches(exchange.push))


def mg_wfbp(exchange: Exchange) -> Cuts:
    """Pushes: a gradient is merged with the next where waiting for that costs less than another message.

    Shi, Chu and Li, "MG-WFBP", INFOCOM 2019 (arXiv 1811.11141); the rule of its public code
    (``_generate_groups_mgwfbp``). It has no pulls: they go in the batches of ``ibatch``, the best of the
    published rules for them.
    """
    return Cuts(_greedy_batches(exchange.pull), _merged(exchange.push))


def dynacomm(exchange: Exchange) -> Cuts:
    """The optimum of both directions.

    Cai et al., "DynaComm", IEEE JSAC 40(2), 2022 (arXiv 2101.07968); see ``chain.py``.
    """
    return Cuts(best_segments(exchange.pull).ends, best_segments(exchange.push).ends)


SEGMENT_RULES: dict[str, Callable[[Exchange], Cuts]] = {
    "sequential": sequential,
    "layer_by_layer": layer_by_layer,
    "bucket_25mb": bucket_25mb,
    "ibatch": ibatch,
    "mg_wfbp": mg_wfbp,
    "dynacomm": dynacomm,
}


def _full(sizes: Iterable[int]) -> list[int]:
    """After how many layers a bucket is full."""
    found: list[int] = []
    held = 0
    for count, nbytes in enumerate(sizes, start=1):
        held += nbytes
        if held >= (BUCKET_BYTES if found else FIRST_BUCKET_BYTES):
            found.append(count)
            held = 0
    return found


def _rising(ends: Iterable[int]) -> Ends:
    return tuple(sorted({end for end in ends if end}))


def _greedy_batches(chain: Chain) -> Ends:
    """The best of the greedy batches over all first ones."""
    sent, left = chain.sent_ns, chain.left_ns
    found: list[Ends] = []
    for first in range(1, chain.layers + 1):
        ends = [0, first]
        while ends[-1] < chain.layers:
            hidden = left[ends[-2]] - left[ends[-1]] - chain.overhead_ns
            reached = bisect_right(sent, sent[ends[-1]] + hidden, ends[-1]) - 1
            ends.append(max(ends[-1] + 1, reached))
        found.append(tuple(ends[1:]))
    return min(found, key=lambda ends: makespan_ns(chain, ends))


def _merged(chain: Chain) -> Ends:
    """Layers from the last to the first, each merged with the one before it or cut from it."""
    left = chain.left_ns
    last = chain.layers - 1
    start, held = left[last], chain.message_ns[last]
    ends = [chain.layers]
    for layer in range(last, 0, -1):
        ready = left[layer - 1]  # of the gradient of the layer before
        end = start + chain.overhead_ns + held
        if ready < end and (ready < start or ready - start < chain.overhead_ns):
            start, held = max(start, ready), held + chain.message_ns[layer - 1]
        else:
            ends.append(layer)
            start, held = max(end, ready), chain.message_ns[layer - 1]
    return tuple(reversed(ends))
