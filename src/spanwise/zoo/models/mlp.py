"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from spanwise.core.errors import InputError

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def mlp(sizes: Sequence[int] = (16, 32, 32, 10), activation: str = "tanh") -> nn.Module:
    """Linear layers with an activation between them; small and smooth, for tests.

    Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", Nature 1986.

    Args:
        sizes: features of the input, of each hidden layer, of the output.
        activation: one of gelu, relu, sigmoid, tanh.

    Returns:
        A module from (rows, sizes[0]) to (rows, sizes[-1]).
    """
    if len(sizes) < 2:
        raise InputError(f"mlp: {len(sizes)} size(s) given, at least 2 needed: input and output features")
    if activation not in _ACTIVATIONS:
        raise InputError(f"mlp: unknown activation '{activation}'; known: {', '.join(_ACTIVATIONS)}")
    layers: list[nn.Module] = []
    for index in range(len(sizes) - 1):
        if index:
            layers.append(_ACTIVATIONS[activation]())
        layers.append(nn.Linear(sizes[index], sizes[index + 1]))
    return nn.Sequential(*layers)
