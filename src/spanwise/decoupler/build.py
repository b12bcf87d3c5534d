"""Sub-models as narrower copies of the target, under its own parameter names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from spanwise.core.decoupling import Decoupling, LayerShape
from spanwise.core.errors import InputError
from spanwise.decoupler.rules import CONVOLUTIONS
from spanwise.decoupler.walk import Walked

Start = Literal["fresh", "target"]
State = dict[str, Tensor]
Initialise = Callable[[nn.Module], object]

STATISTICS = ("running_mean", "running_var")
COUNT = "num_batches_tracked"


def sub_model(
    walked: Walked,
    decoupling: Decoupling,
    group: int,
    *,
    start: Start = "fresh",
    seed: int = 0,
    initialise: Initialise | None = None,
) -> fx.GraphModule:
    """One sub-model, ready to train.

    Args:
        walked: the target.
        decoupling: its division.
        group: which sub-model.
        start: ``fresh`` weights by its own fan-in, or its blocks of the ``target``'s; layers that are shared
            come from the target either way.
        seed: of fresh weights; each sub-model draws its own from it.
        initialise: draws fresh weights in place of :func:`he`.

    Returns:
        A module from the target's samples to (rows, outputs) logits; an output "other" is the first.
    """
    if decoupling.net != walked.net:
        raise InputError(
            f"decoupling: made for '{decoupling.net.name}', whose layers are not those of "
            f"'{walked.net.name}'; divide anew"
        )
    narrow = copy.deepcopy(walked.module)
    for layer in walked.net.layers:
        module = narrow.get_submodule(layer.name)
        frozen = layer.whole and decoupling.sharing == "frozen"
        narrow.set_submodule(
            layer.name, _frozen(module) if frozen else _narrow(module, decoupling, layer, group)
        )
    with torch.random.fork_rng():  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(seed * 1009 + group)  # pyright: ignore[reportUnknownMemberType]
        (initialise or he)(narrow)
    taken = take(walked.module.state_dict(), decoupling, group)
    wanted = {layer.name for layer in walked.net.layers if layer.whole or start == "target"}
    known = {key: value for key, value in taken.items() if key.rpartition(".")[0] in wanted}
    narrow.load_state_dict(known, strict=False)
    return narrow.train()


def he(module: nn.Module) -> None:
    """Normal weights with variance 2 / fan-in, biases 0, norms 1 and 0.

    He, Zhang, Ren, Sun, "Delving deep into rectifiers", ICCV 2015, section 2.2.
    """
    for part in module.modules():
        weight: Any = getattr(part, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        if weight.dim() > 1:
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        else:
            nn.init.ones_(weight)
        bias: Any = getattr(part, "bias", None)
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)


def take(state: State, decoupling: Decoupling, group: int) -> State:
    """A sub-model's blocks of the target's tensors; the row of "other", which the target has not, is 0."""
    taken: State = {}
    for layer in decoupling.net.layers:
        for key, value in tensors_of(state, layer):
            taken[f"{layer.name}.{key}"] = _block(value, decoupling, layer, group, key)
    return taken


def tensors_of(state: State, layer: LayerShape) -> list[tuple[str, Tensor]]:
    """(last part of the name, tensor) of what a layer holds."""
    keys = ("weight", "bias", *STATISTICS, COUNT)
    return [(key, state[f"{layer.name}.{key}"]) for key in keys if f"{layer.name}.{key}" in state]


def _block(value: Tensor, decoupling: Decoupling, layer: LayerShape, group: int, key: str) -> Tensor:
    if layer.whole or key == COUNT:
        return value.clone()
    if layer.kind == "head":
        own = value[list(decoupling.groups[group].classes)]
        rows = torch.cat([torch.zeros_like(own[:1]), own]) if decoupling.other else own
    else:
        first, last = decoupling.gives(layer, group)
        rows = value[first:last]
    if key == "weight" and reads_block(layer):
        first, last = decoupling.reads(layer, group)
        rows = rows[:, first:last]
    return rows.clone()


def reads_block(layer: LayerShape) -> bool:
    """Whether columns of its weight are divided too."""
    return layer.source == "divided" and layer.kind not in ("norm", "depthwise")


def _narrow(module: Any, decoupling: Decoupling, layer: LayerShape, group: int) -> nn.Module:
    if layer.whole:
        return copy.deepcopy(module)
    (a, b), (c, d) = decoupling.reads(layer, group), decoupling.gives(layer, group)
    return resized(module, layer, b - a, d - c)


def resized(module: Any, layer: LayerShape, reads: int, gives: int, *, groups: int = 1) -> nn.Module:
    """A layer like this one with other widths; weights are not drawn."""
    like: dict[str, Any] = {"device": _device(module), "dtype": _dtype(module)}
    if type(module) is nn.Linear:
        return nn.Linear(reads, gives, bias=layer.bias, **like)
    if type(module) in CONVOLUTIONS:
        return type(module)(
            reads, gives, module.kernel_size, stride=module.stride, padding=module.padding,
            dilation=module.dilation, groups=reads if layer.kind == "depthwise" else groups, bias=layer.bias,
            padding_mode=module.padding_mode, **like,
        )  # fmt: skip
    return type(module)(
        gives, eps=module.eps, momentum=module.momentum, affine=module.affine,
        track_running_stats=module.track_running_stats, **like,
    )  # fmt: skip


def _dtype(module: nn.Module) -> torch.dtype:
    return next((t.dtype for t in module.state_dict().values() if t.is_floating_point()), torch.float32)


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in module.state_dict().values()), torch.device("cpu"))


def _frozen(module: nn.Module) -> nn.Module:
    """A copy that training leaves alone, running statistics included."""
    found = copy.deepcopy(module).requires_grad_(False)
    if isinstance(found, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        return FrozenNorm(found)
    return found


class FrozenNorm(nn.Module):
    """A BatchNorm that always uses its running statistics, under the same names."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: Any = norm.weight
        self.bias: Any = norm.bias
        self.eps = float(norm.eps)
        for name in (*STATISTICS, COUNT):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, x: Tensor) -> Tensor:
        """The input's shape."""
        mean: Any = self.running_mean
        variance: Any = self.running_var
        return nn.functional.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
