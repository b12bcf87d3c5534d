"""LeNet-5."""

from __future__ import annotations

from torch import nn


def lenet5(num_classes: int = 10, channels: int = 1) -> nn.Module:
    """LeNet-5: 61,706 parameters for one input channel and 10 classes.

    LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE
    1998, section II.B; with the usual simplifications: plain average pooling, full connections between
    the convolutions, a linear output.

    Args:
        num_classes: outputs.
        channels: input channels.

    Returns:
        A module from (rows, channels, 32, 32) to (rows, num_classes) logits.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120), nn.Tanh(),
        nn.Linear(120, 84), nn.Tanh(),
        nn.Linear(84, num_classes),
    )  # fmt: skip
