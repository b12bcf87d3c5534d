"""Weight halves of several micro-batches at once: which layers join them, in seconds and bytes.

A weight gradient is a product over rows, so that of several micro-batches is one product over all their
rows. Done one by one, each reads and writes the gradient of the whole weight, which takes most of the time
where weights are large and rows few. Done at once, their inputs and result gradients are copied together.
"""

from __future__ import annotations

from spanwise.core.model import Layer, ModelGraph
from spanwise.core.profile import Profile


def most_at_once(layer: Layer, rows: int) -> int:
    """How many micro-batches of ``rows`` rows a layer's weight gradients are computed of at once, at least 1.

    As many as have no more bytes of inputs and result gradients, which are copied, than the layer has of
    parameters: what is copied is then never more than what is not read and written of gradients.
    """
    copied = rows * layer.deferred_bytes
    return max(1, layer.parameter_bytes // copied) if copied else 1


def portions(layer: Layer, rows: int, count: int) -> tuple[int, ...]:
    """``count`` micro-batches as a layer takes them one after the other, each number at once; about even."""
    parts = -(-count // most_at_once(layer, rows))
    return tuple(count * (i + 1) // parts - count * i // parts for i in range(parts))


def weight_s(
    profile: Profile, graph: ModelGraph, device: str, start: int, stop: int, *, rows: int, count: int = 1
) -> float:
    """Seconds of the weight halves of ``count`` micro-batches at once, through layers ``[start, stop)``.

    A layer takes those of a portion as long as a single one of as many rows.
    """
    table, factor = profile.table(device)
    return factor * sum(
        table.weight(layer, size * rows)
        for layer in range(start, stop)
        for size in portions(graph.layers[layer], rows, count)
    )


def copied_bytes(graph: ModelGraph, start: int, stop: int, *, rows: int, count: int) -> int:
    """Most bytes of inputs and result gradients that ``weight_s`` has as copies at a time."""
    most = 0
    for layer in graph.layers[start:stop]:
        size = min(count, most_at_once(layer, rows))
        if size > 1:
            most = max(most, size * rows * layer.deferred_bytes)
    return most
