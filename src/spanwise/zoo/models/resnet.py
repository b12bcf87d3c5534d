"""ResNet-18 and ResNet-50 with the stem that 32 x 32 images need."""

from __future__ import annotations

from torch import Tensor, nn

from spanwise.zoo.models.initial import initialise

_WIDTHS = (64, 128, 256, 512)


def resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18, CIFAR form: 11,173,962 parameters at 10 classes.

    He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, table 1. The stem is one
    3x3 convolution with stride 1 without max-pooling, so 32 x 32 is reduced to 4 x 4 instead of 1 x 1;
    projection shortcuts (option B of section 3.3).

    Args:
        num_classes: outputs.

    Returns:
        A module from (rows, 3, height, width) to (rows, num_classes) logits.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes)


def resnet50(num_classes: int = 10) -> nn.Module:
    """ResNet-50, CIFAR form: 23,520,842 parameters at 10 classes.

    He et al., CVPR 2016, table 1, with the stem of :func:`resnet18`. The stride is in the 3x3 convolution
    of a bottleneck, as in most later implementations, not in its first 1x1.

    Args:
        num_classes: outputs.

    Returns:
        A module from (rows, 3, height, width) to (rows, num_classes) logits.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes)


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, global mean, classifier."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        channels = _WIDTHS[0]
        layers: list[nn.Module] = [_conv_bn(3, channels, 3), nn.ReLU()]
        for stage, (width, depth) in enumerate(zip(_WIDTHS, depths, strict=True)):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(block(channels, width, stride))
                channels = width * block.expansion
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 3, height, width) to (rows, num_classes)."""
        return self.classifier(self.features(x).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (figure 5, left)."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv_bn(channels, width, 3, stride), nn.ReLU(), _conv_bn(width, width, 3)
        )
        self.shortcut = _shortcut(channels, width, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(rows, channels, h, w) to (rows, width, h / stride, w / stride)."""
        return self.relu(self.residual(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (figure 5, right)."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.residual = nn.Sequential(
            _conv_bn(channels, width, 1), nn.ReLU(),
            _conv_bn(width, width, 3, stride), nn.ReLU(),
            _conv_bn(width, out, 1),
        )  # fmt: skip
        self.shortcut = _shortcut(channels, out, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(rows, channels, h, w) to (rows, 4 * width, h / stride, w / stride)."""
        return self.relu(self.residual(x) + self.shortcut(x))


def _conv_bn(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


def _shortcut(channels: int, out: int, stride: int) -> nn.Module:
    if stride == 1 and channels == out:
        return nn.Identity()
    return _conv_bn(channels, out, 1, stride)
