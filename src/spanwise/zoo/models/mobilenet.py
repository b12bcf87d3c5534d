"""MobileNetV2 with the strides that 32 x 32 images need."""

from __future__ import annotations

from torch import Tensor, nn

from spanwise.core.errors import InputError
from spanwise.zoo.models.initial import initialise

# (expansion t, output channels c, blocks n, stride s) of table 2; stage 2 has stride 1 instead of 2,
# like the stem: the CIFAR form reduces 32 x 32 to 4 x 4.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _LAST = 32, 1280


def mobilenet_v2(num_classes: int = 10, width: float = 1.0, dropout: float = 0.0) -> nn.Module:
    """MobileNetV2, CIFAR form: 2,236,682 parameters at width 1 and 10 classes.

    Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted residuals and linear bottlenecks", CVPR
    2018, table 2; a shortcut only where input and output have one shape (section 3.3).

    Args:
        num_classes: outputs.
        width: multiplier of all channels; each is rounded to a multiple of 8.
        dropout: probability in front of the classifier.

    Returns:
        A module from (rows, 3, height, width) to (rows, num_classes) logits; made for 32 x 32.
    """
    if not width > 0:
        raise InputError(f"mobilenet_v2: width {width} must be greater than 0, like 0.5 or 1.0")
    return MobileNetV2(num_classes, width, dropout)


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, last convolution, global mean, classifier."""

    def __init__(self, num_classes: int, width: float, dropout: float) -> None:
        super().__init__()
        channels = _round_channels(_STEM * width)
        layers: list[nn.Module] = [_conv_bn(3, channels, kernel=3)]
        for expansion, base, blocks, stride in _STAGES:
            out = _round_channels(base * width)
            for index in range(blocks):
                layers.append(InvertedResidual(channels, out, stride if index == 0 else 1, expansion))
                channels = out
        last = _round_channels(_LAST * max(1.0, width))
        layers.append(_conv_bn(channels, last, kernel=1))
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.classifier = nn.Linear(last, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 3, height, width) to (rows, num_classes)."""
        return self.classifier(self.dropout(self.features(x).mean((2, 3))))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where the shapes agree."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_bn(channels, hidden, kernel=1)]
        layers += [
            _conv_bn(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        ]
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """(rows, channels, h, w) to (rows, out, h / stride, w / stride)."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


def _conv_bn(channels: int, out: int, *, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6())


def _round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor`` that loses at most 10 %, as in the authors' reference code."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded
