"""Sub-models put together into one network of the target's widths: an exact function, no training.

Three forms of one function: ``dense``, the target with zeros between sub-models; ``grouped``, convolutions in
groups (equal shares only); ``branches``, the sub-models side by side (any shares).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from spanwise.core.decoupling import Decoupling, LayerShape
from spanwise.core.errors import InputError
from spanwise.decoupler.build import COUNT, State, reads_block, resized, tensors_of
from spanwise.decoupler.parallel import BlockLinear, Branches, ReadOut
from spanwise.decoupler.walk import Walked

Form = Literal["auto", "dense", "grouped", "branches"]

READ_OUT = "read_out"


@dataclass(frozen=True)
class Merged:
    """The merged network, in evaluation mode: the target's samples to (rows, classes) scores.

    ``missing``: classes whose sub-model never came back; their scores are minus infinity.
    """

    module: nn.Module
    form: Form
    decoupling: Decoupling
    missing: tuple[int, ...] = ()


def merge(
    walked: Walked, decoupling: Decoupling, states: Mapping[int, State], *, form: Form = "auto"
) -> Merged:
    """Puts sub-models together.

    Args:
        walked: the target.
        decoupling: its division.
        states: tensors of every sub-model that came back, under the target's names.
        form: of the merged network; ``auto``: ``grouped`` where shares are equal, else ``branches``.

    Raises:
        InputError: no sub-model is there, tensors do not fit, shared layers differ, or ``grouped`` was asked
            for and a width does not divide equally.
    """
    _check_states(walked, decoupling, states)
    uneven = _uneven(decoupling)
    if form == "auto":
        form = "branches" if uneven else "grouped"
    if form == "grouped" and uneven:
        raise InputError(f"decoupling: {uneven}; use form 'branches' or 'dense', or equal shares")
    missing = tuple(
        sorted(k for g, group in enumerate(decoupling.groups) if g not in states for k in group.classes)
    )
    if form == "branches":
        module: nn.Module = _branches(walked, decoupling, states)
    else:
        module = _joined(walked, decoupling, states, grouped=form == "grouped")
    return Merged(module.eval(), form, decoupling, missing)


def _check_states(walked: Walked, decoupling: Decoupling, states: Mapping[int, State]) -> None:
    if not states:
        raise InputError("decoupling: no sub-model came back; there is nothing to merge")
    for group, state in states.items():
        if not 0 <= group < len(decoupling.groups):
            raise InputError(f"decoupling: there is no sub-model {group}; there are {len(decoupling.groups)}")
        for layer in walked.net.layers:
            wanted = _shape(decoupling, layer, group)
            found = {key: tuple(t.shape) for key, t in tensors_of(state, layer)}
            keys = [key for key, _ in tensors_of(walked.module.state_dict(), layer)]
            if list(found) != keys or found.get("weight", wanted)[: len(wanted)] != wanted:
                raise InputError(
                    f"decoupling: sub-model {group}: layer '{layer.name}' has weights of shape "
                    f"{found.get('weight', 'none')}, this division gives {wanted}; merge it by "
                    "its own Decoupling"
                )
    first = states[min(states)]
    for layer in (layer for layer in walked.net.layers if layer.whole):
        for group, state in states.items():
            for key, value in tensors_of(state, layer):
                if key != COUNT and not torch.equal(value, first[f"{layer.name}.{key}"]):
                    raise InputError(
                        f"decoupling: shared layer '{layer.name}' of sub-model {group} differs from the "
                        "others'; freeze it, or average it before merging"
                    )


def _shape(decoupling: Decoupling, layer: LayerShape, group: int) -> tuple[int, ...]:
    """Rows, and columns where they are divided, of a sub-model's weight."""
    (a, b), (c, d) = decoupling.reads(layer, group), decoupling.gives(layer, group)
    return (d - c, b - a) if reads_block(layer) and not layer.whole else (d - c,)


def _uneven(decoupling: Decoupling) -> str:
    """The first layer that is not divided equally; empty if all are."""
    for layer in decoupling.net.divided:
        parts = decoupling.parts(layer)
        if len(set(parts)) > 1:
            listed = ", ".join(map(str, parts))
            return (
                f"layer '{layer.name}': {layer.gives.channels} channels in {len(parts)} sub-models are "
                f"{listed}, not equal groups"
            )
    return ""


def read_out(decoupling: Decoupling, present: Mapping[int, Any]) -> ReadOut:
    """From the outputs of all sub-models, one after the other, to scores in the order of classes."""
    outputs = tuple(decoupling.outputs(g) for g in range(len(decoupling.groups)))
    lost = tuple(g for g in range(len(outputs)) if g not in present)
    return ReadOut(outputs, decoupling.order, decoupling.read_out, other=decoupling.other, lost=lost)


def _branches(walked: Walked, decoupling: Decoupling, states: Mapping[int, State]) -> Branches:
    parts: dict[int, nn.Module] = {}
    for group, state in states.items():
        narrow = copy.deepcopy(walked.module)
        for layer in walked.net.layers:
            if not layer.whole:
                (a, b), (c, d) = decoupling.reads(layer, group), decoupling.gives(layer, group)
                module = narrow.get_submodule(layer.name)
                narrow.set_submodule(layer.name, resized(module, layer, b - a, d - c))
        narrow.load_state_dict(_known(state, narrow))
        parts[group] = narrow
    sizes = [decoupling.outputs(g) for g in range(len(decoupling.groups))]
    return Branches(parts, sizes, read_out(decoupling, states))


def _known(state: State, module: nn.Module) -> State:
    return {key: state[key] for key in module.state_dict()}


def _joined(
    walked: Walked, decoupling: Decoupling, states: Mapping[int, State], *, grouped: bool
) -> fx.GraphModule:
    """One network of the target's widths; the read-out is its last module where the head cannot hold it."""
    whole = copy.deepcopy(walked.module)
    lost = len(states) < len(decoupling.groups)
    folded = decoupling.read_out != "probability" and (decoupling.net.head.bias or not lost)
    for layer in walked.net.layers:
        module = whole.get_submodule(layer.name)
        if layer.kind == "head":
            tensors = _head(decoupling, layer, states, folded=folded)
            rows = len(tensors["weight"])
            module = resized(module, layer, layer.reads.size, rows)
        elif grouped and layer.source == "divided" and layer.kind in ("conv", "linear"):
            tensors = _stacked(decoupling, layer, states)
            module = _in_groups(module, decoupling, layer)
        else:
            tensors = _tensors(decoupling, layer, states)
        module.load_state_dict(tensors)
        whole.set_submodule(layer.name, module)
    if not folded:
        _append(whole, read_out(decoupling, states))
    return whole


def _append(whole: fx.GraphModule, tail: ReadOut) -> None:
    whole.add_submodule(READ_OUT, tail)
    output = next(node for node in whole.graph.nodes if node.op == "output")
    with whole.graph.inserting_before(output):
        node = whole.graph.call_module(READ_OUT, (output.args[0],))
    output.args = (node,)
    whole.recompile()


def _in_groups(module: Any, decoupling: Decoupling, layer: LayerShape) -> nn.Module:
    groups = len(decoupling.groups)
    if layer.kind == "conv":
        return resized(module, layer, layer.reads.size, layer.gives.size, groups=groups)
    reads = [b - a for a, b in (decoupling.reads(layer, g) for g in range(groups))]
    gives = [b - a for a, b in (decoupling.gives(layer, g) for g in range(groups))]
    return BlockLinear(reads, gives, bias=layer.bias, like=module.weight)


def _tensors(decoupling: Decoupling, layer: LayerShape, states: Mapping[int, State]) -> State:
    """A layer's tensors in the target's shapes: blocks in their places, zeros elsewhere."""
    first = dict(tensors_of(states[min(states)], layer))
    if layer.whole:
        return {key: value.clone() for key, value in first.items()}
    found: State = {}
    for key, like in first.items():
        if key == COUNT:
            found[key] = torch.stack([s[f"{layer.name}.{key}"] for s in states.values()]).max()
            continue
        shape = [layer.gives.size, *like.shape[1:]]
        if key == "weight" and reads_block(layer):
            shape[1] = layer.reads.size
        # Of a lost sub-model: weights 0; a variance of 0 would only blow its zeros up by 1 / sqrt(eps).
        found[key] = like.new_full(shape, 1.0 if key == "running_var" else 0.0)
        for group, state in states.items():
            rows, columns = decoupling.gives(layer, group), (0, shape[1] if len(shape) > 1 else 0)
            if key == "weight" and reads_block(layer):
                columns = decoupling.reads(layer, group)
            _place(found[key], state[f"{layer.name}.{key}"], rows, columns)
    return found


def _place(whole: Tensor, block: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    if whole.dim() > 1:
        whole[rows[0] : rows[1], columns[0] : columns[1]] = block
    else:
        whole[rows[0] : rows[1]] = block


def _stacked(decoupling: Decoupling, layer: LayerShape, states: Mapping[int, State]) -> State:
    """Blocks one behind the other: what a grouped convolution holds, or a BlockLinear of its own names."""
    found: State = {}
    like = dict(tensors_of(states[min(states)], layer))
    groups = range(len(decoupling.groups))
    for key, value in like.items():
        blocks = [
            states[g][f"{layer.name}.{key}"] if g in states else torch.zeros_like(value) for g in groups
        ]
        if layer.kind == "linear":
            found |= {f"blocks.{g}.{key}": block for g, block in enumerate(blocks)}
        else:
            found[key] = torch.cat(blocks)
    return found


def _head(decoupling: Decoupling, layer: LayerShape, states: Mapping[int, State], *, folded: bool) -> State:
    """The head's rows: of all sub-models one after the other, or, ``folded``, scores in class order.

    Folded biases of lost classes are minus infinity, so that the target's own class gives the same scores.
    """
    like = dict(tensors_of(states[min(states)], layer))
    total = sum(decoupling.outputs(g) for g in range(len(decoupling.groups)))
    found = {
        key: value.new_zeros([total, layer.reads.size] if key == "weight" else [total])
        for key, value in like.items()
    }
    for group, state in states.items():
        rows, columns = decoupling.gives(layer, group), decoupling.reads(layer, group)
        for key in found:
            _place(found[key], state[f"{layer.name}.{key}"], rows, columns)
    if not folded:
        return found
    found = {key: fold(value, decoupling) for key, value in found.items()}
    for group, lost in enumerate(decoupling.groups):
        if group not in states:
            found["bias"][list(lost.classes)] = float("-inf")
    return found


def fold(rows: Tensor, decoupling: Decoupling) -> Tensor:
    """Rows of the head in class order; with ``margin`` each less that of its sub-model's "other"."""
    scores: list[Tensor] = []
    at = 0
    for group in range(len(decoupling.groups)):
        own = rows[at : at + decoupling.outputs(group)]
        at += len(own)
        if decoupling.other:
            own = own[1:] - own[:1] if decoupling.read_out == "margin" else own[1:]
        scores.append(own)
    joined = torch.cat(scores)
    return joined[torch.tensor(decoupling.order).argsort()]
