"""Arithmetic, parameters and memory of the sub-models that a classifier is divided into."""

from __future__ import annotations

from dataclasses import dataclass

from spanwise.core.decoupling import Decoupling, LayerShape, TargetNet


@dataclass(frozen=True, slots=True)
class TrainingFlops:
    """FLOP of one sample: forward, gradients of the weights, gradients of the inputs. A MAC counts as two.

    Only convolutions and linear layers count, as in the framework's own counter, so that the two can be held
    against each other.
    """

    forward: float
    weight: float
    input: float

    @property
    def total(self) -> float:
        """Of a whole training step."""
        return self.forward + self.weight + self.input

    def __add__(self, other: TrainingFlops) -> TrainingFlops:
        return TrainingFlops(
            self.forward + other.forward, self.weight + other.weight, self.input + other.input
        )


_NOTHING = TrainingFlops(0.0, 0.0, 0.0)


def target_flops(net: TargetNet) -> TrainingFlops:
    """FLOP of one sample through the undivided network."""
    each = (
        _layer_flops(layer, layer.reads.size, layer.gives.size, goes_back=layer.source != "sample")
        for layer in net.layers
    )
    return sum(each, _NOTHING)


def sub_model_flops(decoupling: Decoupling, group: int) -> TrainingFlops:
    """FLOP of one sample through a sub-model: of inner layers about the square of its share.

    Frozen layers cost their forward only, and what reads them needs no input gradient. The backward of a
    grouped convolution costs as much as that of the sub-models in it; counters that ignore groups there
    give too much (torch's FlopCounterMode does, as of 2.13).
    """
    found = _NOTHING
    frozen = decoupling.sharing == "frozen"
    for layer in decoupling.net.layers:
        (a, b), (c, d) = decoupling.reads(layer, group), decoupling.gives(layer, group)
        goes_back = layer.source != "sample" and not (frozen and layer.source == "whole")
        flops = _layer_flops(layer, b - a, d - c, goes_back=goes_back)
        found += TrainingFlops(flops.forward, 0.0, 0.0) if frozen and layer.whole else flops
    return found


def _layer_flops(layer: LayerShape, reads: int, gives: int, *, goes_back: bool) -> TrainingFlops:
    if layer.kind == "norm":
        return _NOTHING
    inputs = 1 if layer.kind == "depthwise" else reads
    forward = 2.0 * layer.kernel * layer.positions * inputs * gives
    return TrainingFlops(forward, forward, forward if goes_back else 0.0)


def sub_model_parameters(decoupling: Decoupling, group: int) -> int:
    """Weights and biases of a sub-model."""
    found = 0
    for layer in decoupling.net.layers:
        (a, b), (c, d) = decoupling.reads(layer, group), decoupling.gives(layer, group)
        found += _layer_parameters(layer, b - a, d - c)
    return found


def target_parameters(net: TargetNet) -> int:
    """Weights and biases of the undivided network."""
    return sum(_layer_parameters(layer, layer.reads.size, layer.gives.size) for layer in net.layers)


def _layer_parameters(layer: LayerShape, reads: int, gives: int) -> int:
    if layer.kind == "norm":
        return 2 * gives
    inputs = 1 if layer.kind == "depthwise" else reads
    return (layer.kernel * inputs + layer.bias) * gives


def sub_model_bytes(net: TargetNet, share: float, *, rows: int, copies: int, item_bytes: int = 4) -> float:
    """About what training a sub-model of this share takes: its state by the square, activations by the share.

    Every result is counted twice: most are followed by an activation that keeps its own.
    """
    state = target_parameters(net) * item_bytes * (2 + copies)
    kept = 2 * rows * item_bytes * sum(layer.positions * layer.gives.size for layer in net.layers)
    return state * share**2 + kept * share
