"""Walks a classifier once, and says of every tensor how its channels divide into sub-models.

The construction is ours, guided by Chen and Qin, "Exploring Decentralized Collaboration in Heterogeneous Edge
Training", SEC 2020 (of which the abstract is known to us).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from spanwise.core.decoupling import Axis, LayerShape, TargetNet
from spanwise.core.errors import InputError
from spanwise.decoupler.rules import CONVOLUTIONS, NORMS, adds, keeps_channels, may_flatten

_WAY_OUT = (
    "replace it (a norm by BatchNorm), remove it, or keep it in the shared first layers (shared = N), where "
    "anything may stand"
)


@dataclass(frozen=True)
class Flow:
    """A tensor's features behind the rows. ``source``: whether they are the sample's, whole, or divided."""

    axis: Axis
    source: Any  # a ``core.decoupling.Source``


@dataclass(frozen=True)
class Walked:
    """A target as a graph that sub-models are narrower copies of.

    ``module`` holds copies of the target's modules under their own names; ``head`` is its last linear layer.
    """

    module: fx.GraphModule
    net: TargetNet

    @property
    def head(self) -> str:
        """Path of the classifier's last layer."""
        return self.net.head.name


def walk(model: nn.Module, sample: Tensor, *, shared: int = 0, name: str = "") -> Walked:
    """The division of a classifier: convolutions, linear layers, BatchNorm, pooling, flatten, residual sums.

    Args:
        model: takes one tensor (rows, channels, ...) and ends in a linear layer, one output a class. It is
            left as it is.
        sample: a few rows for it.
        shared: so many first convolutions or linear layers keep all their channels in every sub-model.
        name: for messages.

    Raises:
        InputError: the model cannot be followed, or a layer mixes channels; names the layer and the ways out.
    """
    name = name or type(model).__name__
    try:
        traced = fx.symbolic_trace(copy.deepcopy(model))
    except Exception as error:  # whatever the model's own code raises on a proxy
        raise InputError(
            f"decoupling: model '{name}': its forward cannot be followed ({type(error).__name__}: {error}); "
            "keep it free of conditions on values, and give it one tensor"
        ) from None
    training = {module: module.training for module in traced.modules()}
    with torch.no_grad():
        ShapeProp(traced.eval()).propagate(sample[:2])
    for module, mode in training.items():
        module.training = mode
    walker = _Walker(traced, name, shared)
    return Walked(traced, walker.net())


class _Walker:
    """The flows of all nodes, in order, and the layers that were met."""

    def __init__(self, module: fx.GraphModule, name: str, shared: int) -> None:
        self.module, self.name, self.shared = module, name, shared
        self.flows: dict[fx.Node, Flow] = {}
        self.layers: dict[str, LayerShape] = {}
        self.weighted = 0

    def net(self) -> TargetNet:
        head = self._head()
        for node in self.module.graph.nodes:
            self._visit(node, is_head=node is head)
        self.module.graph.eliminate_dead_code()
        for node in self.module.graph.nodes:
            if node not in self.flows and node.op != "output":
                self._refuse(node, "depends on the sizes of a tensor, which a sub-model has not")
        self.module.recompile()
        layers = tuple(self.layers.values())
        if not any(not layer.whole for layer in layers[:-1]):
            raise InputError(
                f"decoupling: model '{self.name}': no layer before the head can be divided"
                + (f" (shared = {self.shared}); share fewer first layers" if self.shared else "")
            )
        return TargetNet(name=self.name, layers=layers)

    def _head(self) -> fx.Node:
        """The linear layer that the model ends in."""
        nodes = list(self.module.graph.nodes)
        last: Any = nodes[-1].args[0]
        if isinstance(last, fx.Node) and last.op == "call_module":
            found = self.module.get_submodule(str(last.target))
            if type(found) is nn.Linear:
                return last
        what = self._what(last) if isinstance(last, fx.Node) else type(last).__name__
        raise InputError(
            f"decoupling: model '{self.name}' ends in {what}; it must end in a linear layer with one "
            "output a class, and give logits"
        )

    def _visit(self, node: fx.Node, *, is_head: bool) -> None:
        if node.op == "output":
            return
        if node.op == "placeholder":
            if self.flows:
                self._refuse(node, "is a second input; a sub-model reads one tensor")
            self.flows[node] = Flow(Axis(channels=_shape(node)[1]), "sample")
            return
        if node.op == "get_attr":
            self._refuse(node, "is a parameter outside of a layer; put it into a module")
        inputs = [self.flows[n] for n in node.all_input_nodes if n in self.flows]
        if not inputs or not _is_tensor(node):
            return  # sizes; whoever still needs them in the end is refused
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            if type(module) in CONVOLUTIONS or type(module) is nn.Linear:
                self.flows[node] = self._weighted(node, module, inputs[0], is_head=is_head)
                return
            if type(module) in NORMS:
                self.flows[node] = self._norm(node, module, inputs[0])
                return
        self.flows[node] = self._plain(node, inputs)

    def _weighted(self, node: fx.Node, module: Any, flow: Flow, *, is_head: bool) -> Flow:
        whole = self.weighted < self.shared
        if whole and is_head:
            raise InputError(
                f"decoupling: shared = {self.shared} covers the head '{node.target}'; share fewer layers"
            )
        self.weighted += 1
        if type(module) is nn.Linear:
            return self._linear(node, module, flow, whole=whole, is_head=is_head)
        return self._convolution(node, module, flow, whole=whole)

    def _linear(self, node: fx.Node, module: nn.Linear, flow: Flow, *, whole: bool, is_head: bool) -> Flow:
        if len(_shape(node)) != 2 and not whole:
            self._refuse(node, "is applied to positions; flatten in front of it, or use a 1x1 convolution")
        gives = Axis(channels=module.out_features)
        self._add(
            LayerShape(
                name=str(node.target), kind="head" if is_head else "linear",
                reads=flow.axis if len(_shape(node)) == 2 else Axis(channels=module.in_features),
                gives=gives, source=flow.source, whole=whole,
                positions=prod(_shape(node)[1:-1]), bias=_has_bias(module),
            )
        )  # fmt: skip
        return Flow(gives, "whole" if whole else "divided")

    def _convolution(self, node: fx.Node, module: nn.Conv2d, flow: Flow, *, whole: bool) -> Flow:
        shape = _shape(node)
        depthwise = module.groups == module.in_channels > 1
        gives = Axis(channels=module.out_channels)
        if depthwise and flow.source == "divided":
            times = module.out_channels // module.in_channels
            gives = Axis(channels=flow.axis.channels, repeat=flow.axis.repeat * times)
        elif depthwise and not whole:
            self._refuse(node, "is depthwise on channels that are not divided; share it (shared = N) as well")
        elif module.groups > 1 and not whole:
            self._refuse(
                node,
                f"has {module.groups} groups over {module.in_channels} channels, which need not meet the "
                f"borders of sub-models; use groups = 1 or {module.in_channels}, or share it (shared = N)",
            )
        reads = Axis(channels=module.in_channels // module.groups) if whole else flow.axis
        self._add(
            LayerShape(
                name=str(node.target), kind="depthwise" if depthwise else "conv", reads=reads, gives=gives,
                source=flow.source, whole=whole, kernel=prod(module.kernel_size),
                positions=prod(shape[2:]), bias=_has_bias(module),
            )
        )  # fmt: skip
        return Flow(gives, "whole" if whole else "divided")

    def _norm(self, node: fx.Node, module: Any, flow: Flow) -> Flow:
        if flow.source == "sample" and not self.shared:
            self._refuse(node, "normalises the sample, each sub-model by its own data; normalise the data")
        if flow.source == "sample":
            flow = Flow(flow.axis, "whole")
        self._add(
            LayerShape(
                name=str(node.target), kind="norm", reads=flow.axis, gives=flow.axis, source=flow.source,
                whole=flow.source != "divided", kernel=0, bias=bool(module.affine),
            )
        )  # fmt: skip
        return flow

    def _plain(self, node: fx.Node, inputs: list[Flow]) -> Flow:
        """What has no weights."""
        if all(flow.source != "divided" for flow in inputs):
            every = all(flow.source == "sample" for flow in inputs)
            return Flow(Axis(channels=_shape(node)[1]), "sample" if every else "whole")
        if adds(node):
            if any(flow != inputs[0] for flow in inputs):
                self._refuse(node, "joins tensors whose channels are not divided alike")
            return inputs[0]
        before, after = _shape(node.all_input_nodes[0]), _shape(node)
        if keeps_channels(self.module, node) and after[:2] == before[:2]:
            return inputs[0]
        if may_flatten(self.module, node) and after == (before[0], prod(before[1:])):
            _flatten(node)
            spread = prod(before[2:])
            return Flow(
                Axis(channels=inputs[0].axis.channels, repeat=inputs[0].axis.repeat * spread), "divided"
            )
        self._refuse(node, f"mixes or moves channels, which sub-models do not share; {_WAY_OUT}")
        raise AssertionError

    def _add(self, layer: LayerShape) -> None:
        known = self.layers.get(layer.name)
        if known is not None and known != layer:
            raise InputError(
                f"decoupling: model '{self.name}': layer '{layer.name}' is used twice, on channels that are "
                "divided in different ways; make it two layers"
            )
        self.layers.setdefault(layer.name, layer)

    def _what(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"'{node.target}' ({type(self.module.get_submodule(str(node.target))).__name__})"
        called = getattr(node.target, "__name__", str(node.target))
        return f"'{node.name}' ({called})"

    def _refuse(self, node: fx.Node, why: str) -> None:
        raise InputError(f"decoupling: model '{self.name}': layer {self._what(node)} {why}")


def _flatten(node: fx.Node) -> None:
    """View and reshape name sizes of the target; a flatten has those of the sub-model."""
    if node.op == "call_method":
        node.target, node.args, node.kwargs = "flatten", (node.args[0], 1), {}


def _has_bias(module: Any) -> bool:
    return module.bias is not None


def _is_tensor(node: fx.Node) -> bool:
    return hasattr(node.meta.get("tensor_meta"), "shape")


def _shape(node: fx.Node) -> tuple[int, ...]:
    found: Any = node.meta.get("tensor_meta")
    return tuple(int(n) for n in cast("tuple[int, ...]", found.shape))
