"""From clean cuts to layers: small operations join the product next to them, at the cheapest cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from spanwise.core.model import Layer, Parameter, TensorSpec
from spanwise.ops.arguments import Argument, Ref
from spanwise.ops.deferred import deferred_input
from spanwise.ops.flops import Flops, Operand, count
from spanwise.ops.opgraph import Op, OpGraph
from spanwise.profiler.cut import Cut
from spanwise.profiler.observe import Observation, Seen
from spanwise.profiler.sites import sites_of

# A product below this share of the model's FLOPs and of its parameters makes no layer of its own.
NEGLIGIBLE = 1e-4

_NORMS = frozenset({"batch_norm", "instance_norm"})


@dataclass(frozen=True)
class Chain:
    """What layers are made from.

    ``paths`` are the module paths of the nodes; ``few`` and ``more`` two passes with different rows.
    """

    ops: OpGraph
    paths: tuple[str, ...]
    few: Observation
    more: Observation


def build_layers(chain: Chain, cuts: Sequence[Cut]) -> tuple[Layer, ...]:
    """Layers between the chosen cuts, with what each holds, computes and lets through."""
    flops = node_flops(chain)
    bounds = [0, *(cut.position for cut in cuts), len(chain.ops.nodes)]
    names = _unique([_name(chain, flops, a, b) for a, b in pairwise(bounds)])
    saved = _saved(chain, bounds)
    sites = sites_of(chain.ops, chain.few, chain.more, bounds)
    layers: list[Layer] = []
    for index, (start, stop) in enumerate(pairwise(bounds)):
        tensors = cuts[index].tensors if index < len(cuts) else ()
        own = [i for i in range(start, stop) if not chain.ops.flow.free[i]]
        parameters, buffers, buffer_bytes = _state(chain, start, stop)
        layers.append(
            Layer(
                name=names[index],
                ops=(start, stop),
                forward_flops=sum(flops[i].forward for i in own) / chain.more.rows,
                backward_flops=sum(flops[i].backward for i in own) / chain.more.rows,
                weight_flops=sum(flops[i].forward for i in own if _defers(chain, i)) / chain.more.rows,
                parameters=parameters,
                buffers=buffers,
                buffer_bytes=buffer_bytes,
                outputs=tuple(tensor_spec(n, chain.more.values[Ref("node", n)]) for n in tensors),
                saved_bytes=saved[index][0],
                saved_fixed_bytes=saved[index][1],
                deferred_bytes=_deferred_bytes(chain, own),
                batch_statistics=any(_mixes_rows(chain.ops.nodes[i]) for i in own),
                sites=None if sites is None else sites[index],
            )
        )
    return tuple(layers)


def choose_cuts(chain: Chain, cuts: Sequence[Cut]) -> tuple[Cut, ...]:
    """Between every two neighbouring runs with a weighty product, the cut with the fewest bytes.

    A run is what lies between two neighbouring clean cuts. Of equal cuts the last is taken, so that
    normalisation and activation stay with the product before them.
    """
    flops = node_flops(chain)
    total_flops = sum(f.forward for f in flops) or 1.0
    total_bytes = sum(_bytes(chain.more.values[Ref("parameter", s.name)]) for s in chain.ops.parameters) or 1
    bounds = [0, *(cut.position for cut in cuts), len(chain.ops.nodes)]
    heavy = [
        _is_heavy(chain, flops, start, stop, total_flops, total_bytes) for start, stop in pairwise(bounds)
    ]
    if sum(heavy) < 2:  # nothing but light runs: whatever holds parameters counts
        heavy = [bool(_state(chain, a, b)[0]) for a, b in pairwise(bounds)]
    chosen: list[Cut] = []
    previous: int | None = None
    for run, is_heavy in enumerate(heavy):
        if is_heavy:
            if previous is not None:  # cut i lies behind run i
                between = cuts[previous:run]
                chosen.append(min(reversed(between), key=lambda cut: cut.row_bytes))
            previous = run
    return tuple(chosen)


def node_flops(chain: Chain) -> tuple[Flops, ...]:
    """FLOPs of every node on ``chain.more.rows`` rows; recomputed ones count as nothing."""
    nothing = Flops(0.0, 0.0)
    flowing = ("node", "input", "label")
    return tuple(
        nothing
        if chain.ops.flow.free[i] or not any(ref.kind in flowing for ref in node.references())
        else _flops_of(chain, node)
        for i, node in enumerate(chain.ops.nodes)
    )


def _flops_of(chain: Chain, node: Op) -> Flops:
    values = chain.more.values

    def operand(argument: Argument) -> Any:
        if isinstance(argument, Ref) and argument.kind != "batch":
            return Operand(values[argument].shape, values[argument].needs_gradient)
        if isinstance(argument, tuple):
            return tuple(operand(item) for item in argument)
        return argument

    return count(node.op, tuple(map(operand, node.args)), values[Ref("node", node.name)].shape)


def tensor_spec(name: str, seen: Seen) -> TensorSpec:
    """One row of a tensor of rows."""
    return TensorSpec(
        name=name,
        shape=seen.shape[1:],
        dtype=seen.dtype,
        item_bytes=seen.item_bytes,
        differentiable=seen.needs_gradient,
    )


def _is_heavy(
    chain: Chain, flops: tuple[Flops, ...], start: int, stop: int, total_flops: float, total_bytes: int
) -> bool:
    own = [i for i in range(start, stop) if not chain.ops.flow.free[i]]
    products = [i for i in own if flops[i].product or chain.ops.nodes[i].op.startswith("aten.embedding.")]
    if not products:
        return False
    weight = sum(
        _bytes(chain.more.values[ref])
        for i in products
        for ref in chain.ops.nodes[i].references()
        if ref.kind == "parameter"
    )
    work = sum(flops[i].forward for i in products)
    return work > NEGLIGIBLE * total_flops or weight > NEGLIGIBLE * total_bytes


def _state(chain: Chain, start: int, stop: int) -> tuple[tuple[Parameter, ...], tuple[str, ...], int]:
    """Parameters, buffer names and buffer bytes that the operations use, recomputed ones included."""
    nodes = [chain.ops.nodes[i] for i in chain.ops.flow.stage(start, stop)]
    refs = dict.fromkeys(ref for node in nodes for ref in node.references())
    if stop == len(chain.ops.nodes):
        refs.update(dict.fromkeys(chain.ops.outputs))
    shapes = {slot.name: slot.shape for slot in chain.ops.parameters}
    parameters = tuple(
        Parameter(name=ref.name, shape=shapes[ref.name], bytes=_bytes(chain.more.values[ref]))
        for ref in refs
        if ref.kind == "parameter"
    )
    buffers = [ref for ref in refs if ref.kind == "buffer"]
    size = sum(_bytes(chain.more.values[ref]) for ref in buffers)
    return parameters, tuple(ref.name for ref in buffers), size


def _saved(chain: Chain, bounds: Sequence[int]) -> list[tuple[int, int]]:
    """Bytes kept for backward: per row and once, by slope and intercept of two passes.

    A storage that several layers keep counts in the last of them, the one that reads it as its input, so that
    the sum over all layers is what the whole model keeps.
    """
    few = _saved_by_layer(chain.few, bounds)
    more = _saved_by_layer(chain.more, bounds)
    out: list[tuple[int, int]] = []
    for a, b in zip(few, more, strict=True):
        slope = max(0, round((b - a) / (chain.more.rows - chain.few.rows)))
        out.append((slope, max(0, b - slope * chain.more.rows)))
    return out


def _defers(chain: Chain, position: int) -> bool:
    """Whether a node is a product whose weight gradient can wait: one more product of the same size."""
    x = deferred_input(chain.ops.nodes[position])
    return x is not None and chain.more.values[x].needs_gradient


def _deferred_bytes(chain: Chain, own: Sequence[int]) -> int:
    """Per row: what products keep for their weight gradients; an input that several use counts once."""
    kept: dict[tuple[Ref, bool], int] = {}
    for i in own:
        x = deferred_input(chain.ops.nodes[i])
        if x is not None and _defers(chain, i):
            result = Ref("node", chain.ops.nodes[i].name)
            kept[x, False] = _bytes(chain.more.values[x])
            kept[result, True] = _bytes(chain.more.values[result])
    return sum(kept.values()) // chain.more.rows


def _saved_by_layer(seen: Observation, bounds: Sequence[int]) -> list[int]:
    totals = [0] * (len(bounds) - 1)
    for size, users in seen.saved:
        layer = next(i for i, stop in enumerate(bounds[1:]) if users[-1] < stop)
        totals[layer] += size
    return totals


def _mixes_rows(node: Op) -> bool:
    name = node.op.split(".")[1]
    return name in _NORMS and name == "batch_norm" and node.args[5] is True


def _name(chain: Chain, flops: tuple[Flops, ...], start: int, stop: int) -> str:
    """Module path of the operation that computes most; that of most operations if none computes."""
    own = [i for i in range(start, stop) if chain.paths[i] and not chain.ops.flow.free[i]]
    if not own:
        return "loss" if stop == len(chain.ops.nodes) else chain.ops.nodes[start].name
    work: dict[str, tuple[float, int]] = {}
    for i in own:
        before = work.get(chain.paths[i], (0.0, 0))
        work[chain.paths[i]] = (before[0] + (flops[i].forward if flops[i].product else 0.0), before[1] + 1)
    return max(work, key=lambda path: work[path])


def _unique(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    out: list[str] = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out


def _bytes(seen: Seen) -> int:
    size = seen.item_bytes
    for extent in seen.shape:
        size *= extent
    return size
