"""Bytes and seconds of devices that train some parameters only, and of values passed along a chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spanwise.core.model import Kept, ModelGraph, Site
from spanwise.core.plan import Stage
from spanwise.core.profile import Profile
from spanwise.core.program import Action
from spanwise.cost.training import ring_edge_bytes

Trains = Mapping[str, "int | None"]  # channels that train by parameter, None for all of them


def sparse_saved_bytes(
    graph: ModelGraph, start: int, stop: int, rows: int, trains: Trains, *, stored: bool = False,
    packed: bool = False,
) -> tuple[int, ...]:  # fmt: skip
    """Bytes that each of the layers ``[start, stop)`` keeps when only some of their parameters train.

    Exact for the operations of ``ops.sparse``: of a product the trained channels of its input; of a BatchNorm
    by stored statistics a number per channel, and its input if its scale trains; of a ReLU a byte
    (``packed``: a bit) per element; of any other what stock autograd keeps. Nothing before the first that
    trains; of a stage behind the first everything, as gradients go on to the stage before. A storage that
    several keep counts in the last of them.

    Args:
        graph: its sites must be known.
        start: first layer.
        stop: the layer after the last.
        rows: of the replica.
        trains: what trains.
        stored: whether BatchNorm uses stored statistics.
        packed: whether ReLU keeps bits.
    """
    first = sum(map(len, graph.sites[:start]))
    number, live = first, set[int]()
    totals = [0] * (stop - start)
    whole: dict[int, tuple[int, int]] = {}  # storage: the last layer that keeps it, bytes
    for layer in range(start, stop):
        for site in graph.sites[layer]:
            behind = any(at in live or (at < first and start > 0) for at in site.sources)
            if behind or any(name in trains for name in site.parameters):
                live.add(number)
            kept, own = _kept_at(site, rows, trains, behind, stored)
            if site.kind == "relu" and behind:
                own = -(-rows * site.elements // 8) if packed else rows * site.elements
            totals[layer - start] += own
            for one in kept:
                whole[one.storage] = (layer - start, one.row_bytes * rows + one.fixed_bytes)
            number += 1
    for layer, nbytes in whole.values():
        totals[layer] += nbytes
    return tuple(totals)


def _kept_at(
    site: Site, rows: int, trains: Trains, behind: bool, stored: bool
) -> tuple[tuple[Kept, ...], int]:
    """Tensors that a site keeps as they are, and bytes of those that it makes; ``behind`` one that trains."""
    match site.kind:
        case "conv" | "depthwise" | "linear":
            if site.weight not in trains:
                return (), 0
            count = trains[site.weight]
            if count is None:
                return site.kept[:1], 0
            return (), rows * site.input_bytes // site.channels * count
        case "relu":
            return (), 0
        case "norm" | "fixed_norm" if stored or site.kind == "fixed_norm":
            by_scale = site.weight in trains
            channel_bytes = site.item_bytes * site.channels
            return site.kept[:1] if by_scale else (), channel_bytes * (behind + by_scale)
        case _:
            return site.kept if behind or any(name in trains for name in site.parameters) else (), 0


def transient_bytes(graph: ModelGraph, start: int, stop: int, rows: int) -> int:
    """Most bytes that one operation of layers ``[start, stop)`` works with: input, result and a copy."""
    works = (s.input_bytes + 2 * s.output_bytes for sites in graph.sites[start:stop] for s in sites)
    return rows * max(works, default=0)


def working_bytes(graph: ModelGraph, start: int, stop: int, rows: int, kept: Sequence[int]) -> int:
    """Most bytes above all that layers ``[start, stop)`` keep, each working while those before keep theirs.

    ``kept``: by layer. In forward those behind it keep nothing yet, in backward nothing any more. So large
    tensors among the first layers, where little is kept, may take nothing on top. Before the first that keeps
    something there is no backward: its operations hold their input and result only.
    """
    total, held, most = sum(kept), 0, 0
    for layer, own in zip(range(start, stop), kept, strict=True):
        held += own
        results = 2 if held else 1
        works = (s.input_bytes + results * s.output_bytes for s in graph.sites[layer])
        most = max(most, held + rows * max(works, default=0))
    return max(0, most - total)


def unit_bytes(graph: ModelGraph, trains: Trains) -> dict[str, int]:
    """Bytes by parameter of what is trained of it."""
    out: dict[str, int] = {}
    for parameter in graph.parameters:
        if parameter.name in trains:
            count = trains[parameter.name]
            channels = graph.sliceable[parameter.name][1] if count is not None else 1
            out[parameter.name] = parameter.bytes * (1 if count is None else count) // channels
    return out


def sparse_state_bytes(graph: ModelGraph, start: int, stop: int, trains: Trains, copies: int) -> int:
    """Weights and buffers of layers ``[start, stop)``; gradient, optimizer state and copy of what trains.

    Only of trained channels of a weight there is a copy, which is a parameter of its own.
    """
    held = {p.name: p.bytes for p in graph.parameters_of(start, stop)}
    own = {name: nbytes for name, nbytes in unit_bytes(graph, trains).items() if name in held}
    slices = sum(nbytes for name, nbytes in own.items() if trains[name] is not None)
    buffers = sum(layer.buffer_bytes for layer in graph.layers[start:stop])
    return sum(held.values()) + buffers + (1 + copies) * sum(own.values()) + slices


def sparse_backward_s(
    profile: Profile, graph: ModelGraph, stage: Stage, device: str, rows: int, trains: Trains
) -> float:
    """Seconds of a backward through a stage of which a device trains a part.

    From the last layer down to the first that trains, or through all of a stage behind the first: the input
    half of each, and of its weight half the share of its parameters' bytes that trains.
    """
    own = unit_bytes(graph, trains)
    seconds, reached = 0.0, stage.start > 0
    for layer in range(stage.start, stage.stop):
        parameters = graph.layers[layer].parameters
        trained = sum(own.get(p.name, 0) for p in parameters)
        reached = reached or trained > 0
        if reached:
            into, weight = profile.halves_s(device, layer, layer + 1, rows)
            total = sum(p.bytes for p in parameters)
            seconds += into + (weight * trained / total if total else 0.0)
    return seconds


def collective_sent(action: Action, device: str) -> tuple[str, float]:
    """To whom a device sends in a collective, and bytes a step: in a ring, or along a chain.

    The last of a chain sends nothing, to nobody (empty). What is done every few steps counts as its mean.
    """
    members = action.members
    at = members.index(device)
    if action.kind != "broadcast":
        return members[(at + 1) % len(members)], ring_edge_bytes(len(members), action.nbytes)
    if at + 1 == len(members):
        return "", 0.0
    return members[at + 1], action.nbytes / action.every


PIECE_BYTES, MOST_PIECES = 2**16, 64


def chain_piece_bytes(nbytes: int) -> int:
    """Bytes of the pieces in which a broadcast along a chain travels."""
    return max(PIECE_BYTES, -(-nbytes // MOST_PIECES))


def chain_pieces(nbytes: int) -> int:
    """How many pieces that are; one at least."""
    return max(1, -(-nbytes // chain_piece_bytes(nbytes)))


def chain_s(devices: int, nbytes: int, bytes_per_s: float, latency_s: float) -> float:
    """Seconds of a broadcast along a chain of devices, of which all but the ends receive and send at once.

    The last device has the last piece after it has passed every link; that is ``nbytes`` over one of them,
    and a piece and a latency over each of the others.
    """
    hops = devices - 1
    return (nbytes + (hops - 1) * min(nbytes, chain_piece_bytes(nbytes))) / bytes_per_s + hops * latency_s
