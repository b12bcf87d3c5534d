"""What operations without weights do to channels: keep them, add two tensors, or flatten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import fx, nn

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_KEEPING: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Mish, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_KEEPING_NAMES = frozenset({
    "relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "hardswish",
    "hardsigmoid", "hardtanh", "softplus", "mish", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "feature_dropout", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "contiguous",
})  # fmt: skip
_FLATTENING = frozenset({"flatten", "view", "reshape", "squeeze"})
_ADDING = frozenset({"add", "add_", "iadd", "sub", "mul", "mul_", "imul"})


def called(node: fx.Node) -> str:
    """Name of the function or method of a node; empty for modules."""
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target) if node.op == "call_method" else ""


def adds(node: fx.Node) -> bool:
    """Whether it joins tensors element by element, or one with a number."""
    return called(node) in _ADDING


def keeps_channels(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether each channel of the result depends on the same channel of the input alone."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) in _KEEPING
    return called(node) in _KEEPING_NAMES or (called(node) == "mean" and _over_positions(node))


def may_flatten(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it only takes the positions of each channel in a row, if the shapes say so too."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.Flatten
    return called(node) in _FLATTENING


def _over_positions(node: fx.Node) -> bool:
    """Whether a mean leaves rows and channels alone: dimensions are counted from 2, or from the end."""
    found: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    meta: Any = node.all_input_nodes[0].meta["tensor_meta"]
    dimensions = len(meta.shape)
    if isinstance(found, int):
        found = (found,)
    if not isinstance(found, (tuple, list)) or not found:
        return False
    return all(int(d) % dimensions >= 2 for d in cast("Sequence[int]", found))
