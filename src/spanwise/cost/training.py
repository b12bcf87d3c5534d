"""Transfers, collectives and memory of plans in which every device trains all that it holds."""

from __future__ import annotations

from spanwise.core.job import Recipe
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Stage
from spanwise.core.profile import Profile
from spanwise.cost.halves import copied_bytes

Ranges = tuple[tuple[int, int], ...]

# Copies of the parameters that an optimizer keeps, from the state tables in torch.optim's documentation.
_OPTIMIZER_COPIES = {
    "SGD": 0, "Adam": 2, "AdamW": 2, "Adamax": 2, "NAdam": 2, "RAdam": 2, "Adagrad": 1,
    "Adadelta": 2, "RMSprop": 1, "Rprop": 2, "ASGD": 1,
}  # fmt: skip
_UNKNOWN_OPTIMIZER_COPIES = 2  # as many as Adam: too much rather than too little


def optimizer_copies(optimizer: Recipe) -> int:
    """How many copies of the parameters an optimizer keeps as its state."""
    args = optimizer.args
    copies = _OPTIMIZER_COPIES.get(optimizer.name, _UNKNOWN_OPTIMIZER_COPIES)
    if optimizer.name in ("SGD", "RMSprop") and args.get("momentum"):
        copies += 1
    if optimizer.name in ("Adam", "AdamW") and args.get("amsgrad"):
        copies += 1
    return copies


def transfer_s(nbytes: float, bytes_per_s: float, latency_s: float) -> float:
    """Seconds until a message that has a link to itself has arrived: latency + bytes / rate."""
    return latency_s + nbytes / bytes_per_s


def ring_edge_bytes(devices: int, nbytes: float) -> float:
    """Bytes that each device sends to its neighbour in a ring all-reduce: 2(n-1)/n of the buffer.

    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", JPDC 2009, section 3.
    """
    return 2 * (devices - 1) / devices * nbytes


def ring_rounds(devices: int) -> int:
    """Messages that follow each other in a ring all-reduce: n-1 to reduce-scatter, n-1 to all-gather."""
    return 2 * (devices - 1)


def ring_s(devices: int, nbytes: float, bytes_per_s: float, latency_s: float) -> float:
    """Seconds of a ring all-reduce whose slowest edge has this rate and latency; 0 for one device."""
    if devices < 2:
        return 0.0
    return ring_edge_bytes(devices, nbytes) / bytes_per_s + ring_rounds(devices) * latency_s


def state_bytes(parameter_bytes: int, buffer_bytes: int, copies: int, *, synced: bool) -> int:
    """Bytes that a device holds for the parameters of its layers throughout the step.

    Weights, gradients, optimizer state (``copies``) and, where gradients are summed with other devices,
    the flat buffer that travels.
    """
    return parameter_bytes * (2 + copies + (1 if synced else 0)) + buffer_bytes


def saved_bytes(graph: ModelGraph, start: int, stop: int, rows: int) -> int:
    """Bytes that layers ``[start, stop)`` keep between forward and backward of ``rows`` rows."""
    layers = graph.layers[start:stop]
    return sum(layer.saved_bytes * rows + layer.saved_fixed_bytes for layer in layers)


def deferred_bytes(graph: ModelGraph, start: int, stop: int, rows: int) -> int:
    """Bytes that layers ``[start, stop)`` keep between the halves of a backward of ``rows`` rows."""
    return rows * sum(layer.deferred_bytes for layer in graph.layers[start:stop])


def kept_bytes(graph: ModelGraph, start: int, stop: int, rows: int, recompute: Ranges = ()) -> int:
    """Bytes that layers ``[start, stop)`` keep of ``rows`` rows between their forward and their backward.

    Each range of ``recompute`` keeps what enters it, the last layer's the labels too; a tensor that enters
    several of them is kept once.
    """
    entering = {spec.name: spec.row_bytes for a, _ in recompute for spec in graph.cut_before(a)}
    labels = graph.label_row_bytes if recompute and recompute[-1][1] == len(graph) else 0
    again = sum(saved_bytes(graph, a, b, rows) for a, b in recompute)
    return saved_bytes(graph, start, stop, rows) - again + rows * (sum(entering.values()) + labels)


def again_bytes(
    graph: ModelGraph, stop: int, rows: int, recompute: Ranges = (), *, in_halves: bool = False
) -> int:
    """Most bytes that a backward of a stage up to ``stop`` holds above ``kept_bytes``.

    Ranges go back one by one, from the last to the first: each saves what its layers save, and makes what
    crosses the cut behind it anew. What layers behind it kept is free by then, or, if only the input half
    runs (``in_halves``), has left what the weight half needs.
    """
    most = held = 0
    for a, b in reversed(recompute):
        if in_halves:
            held += deferred_bytes(graph, b, stop, rows)
        held -= saved_bytes(graph, b, stop, rows)
        own = saved_bytes(graph, a, b, rows)
        most = max(most, held + own + rows * graph.layers[b - 1].cut_bytes)
        if in_halves:
            held += deferred_bytes(graph, a, b, rows)
        stop = a
    return most


def again_s(profile: Profile, stage: Stage, device: str, rows: int) -> float:
    """Seconds of the forwards that a backward of a stage runs again on a device."""
    return sum(profile.forward_s(device, a, b, rows) for a, b in stage.recompute)


def message_bytes(graph: ModelGraph, start: int, stop: int, rows: int) -> int:
    """Bytes of the buffers at both ends of a stage: one input, one output and their gradients."""
    into = sum(spec.row_bytes for spec in graph.cut_before(start))
    out = sum(spec.row_bytes for spec in graph.layers[stop - 1].outputs)
    return 2 * rows * (into + out)


def stage_bytes(
    graph: ModelGraph,
    start: int,
    stop: int,
    *,
    rows: int,
    in_flight: int,
    halved: int = 0,
    in_halves: bool = False,
    recompute: Ranges = (),
    copies: int,
    synced: bool,
) -> int:
    """Most bytes that one replica of a stage needs: state, activations in flight, messages.

    ``in_flight`` is the number of micro-batches between forward and backward at once: the warm-up
    depth under 1f1b, all of them under GPipe. Each of them keeps what its layers save and its output, which
    the next stage saves as its input or not at all, and which here waits for a slow link, then for its
    gradient. ``halved`` are those between the two halves of their backward, under zero_bubble: they keep what
    the products need for their weight gradients, and may all be taken at once, with copies. Of layers in
    ranges of ``recompute`` micro-batches in flight keep only what enters these, and the one that goes back
    (``in_halves`` under zero_bubble) has one range's activations besides. An upper bound while the stage
    before runs at most two micro-batches further ahead; raw rows that arrive before they are needed come on
    top.
    """
    parameter_bytes = sum(p.bytes for p in graph.parameters_of(start, stop))
    buffer_bytes = sum(layer.buffer_bytes for layer in graph.layers[start:stop])
    return (
        state_bytes(parameter_bytes, buffer_bytes, copies, synced=synced)
        + in_flight
        * (kept_bytes(graph, start, stop, rows, recompute) + rows * graph.layers[stop - 1].cut_bytes)
        + again_bytes(graph, stop, rows, recompute, in_halves=in_halves)
        + halved * deferred_bytes(graph, start, stop, rows)
        + copied_bytes(graph, start, stop, rows=rows, count=halved)
        + message_bytes(graph, start, stop, rows)
    )
