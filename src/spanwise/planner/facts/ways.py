"""Which layers of a stage may run again in backward, and what each way keeps and costs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from spanwise.core.model import ModelGraph
from spanwise.cost.training import Ranges, again_bytes, kept_bytes

PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True, slots=True)
class Way:
    """Ranges of layers that run again.

    ``kept_bytes`` are kept by every micro-batch in flight, ``again_bytes`` come on top in backward; ``flops``
    of a row's forward that runs again.
    """

    ranges: Ranges
    kept_bytes: int
    again_bytes: int
    flops: float

    def bytes(self, in_flight: int) -> int:
        """Most bytes of activations with so many micro-batches in flight."""
        return in_flight * self.kept_bytes + self.again_bytes


def ways(graph: ModelGraph, start: int, stop: int, rows: int) -> tuple[Way, ...]:
    """Parts of about equal bytes, of which the first few or all run again; the least work first.

    The last part of a stage with one micro-batch in flight may as well keep its activations, which backward
    needs at once. In equal parts a chain keeps bytes that grow with the root of its layers (Chen et al.,
    arXiv 1604.06174, 2016, section 4.1).
    """
    found: dict[Ranges, Way] = {}
    for parts in PARTS:
        edges = equal_parts(graph, start, stop, parts)
        for number in range(1, len(edges)):
            ranges = tuple(pairwise(edges[: number + 1]))
            found[ranges] = way(graph, start, stop, rows, ranges)
    return tuple(sorted(found.values(), key=lambda w: (w.flops, len(w.ranges))))


def way(graph: ModelGraph, start: int, stop: int, rows: int, ranges: Ranges) -> Way:
    """What these ranges keep and cost."""
    return Way(
        ranges,
        kept_bytes(graph, start, stop, rows, ranges),
        again_bytes(graph, stop, rows, ranges),
        sum(layer.forward_flops for a, b in ranges for layer in graph.layers[a:b]),
    )


def equal_parts(graph: ModelGraph, start: int, stop: int, parts: int) -> tuple[int, ...]:
    """Edges of at most so many parts whose layers save about as much; near by, where fewest bytes cross."""
    layers = graph.layers
    upto = [0]
    for layer in layers[start:stop]:
        upto.append(upto[-1] + layer.saved_bytes)
    share = upto[-1] / parts
    edges = [start]
    for number in range(1, parts):
        inner = range(edges[-1] + 1, stop)
        if not inner:
            break
        off = {i: abs(upto[i - start] - number * share) for i in inner}
        near = [i for i in inner if off[i] <= share / 4] or [min(inner, key=lambda i: off[i])]
        edges.append(min(near, key=lambda i: (layers[i - 1].cut_bytes, off[i])))
    return (*edges, stop)
