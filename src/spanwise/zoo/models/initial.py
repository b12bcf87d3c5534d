"""Initial weights of the image models."""

from __future__ import annotations

from torch import nn


def initialise(model: nn.Module, *, linear_std: float = 0.01) -> None:
    """Draw a ReLU network's weights from the global generator, in the order of ``model.modules()``.

    Convolutions: normal with variance 2 / fan-out, biases 0 (He, Zhang, Ren, Sun, "Delving deep into
    rectifiers", ICCV 2015, section 2.2). Linear: normal with ``linear_std``. BatchNorm: 1 and 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=linear_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
