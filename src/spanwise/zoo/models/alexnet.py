"""AlexNet for 32 x 32 and for 224 x 224 images."""

from __future__ import annotations

from torch import Tensor, nn

from spanwise.core.errors import InputError
from spanwise.zoo.models.initial import initialise

_HIDDEN = 4096


def alexnet(num_classes: int = 10, stem: int = 3, dropout: float = 0.0, width: float = 1.0) -> nn.Module:
    """AlexNet in one of its two common CIFAR forms, without local response normalisation.

    Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks", NIPS
    2012, section 3.5; channels of the one-tower form of Krizhevsky, "One weird trick for parallelizing
    convolutional neural networks", arXiv 1404.5997, 2014.

    Args:
        num_classes: outputs.
        stem: 3 = 3x3 kernels, stem stride 2, two hidden linear layers of 4096: 23,272,266 parameters at
            10 classes. 11 = 11x11 stem with stride 4, a 5x5 second kernel, no hidden linear layer: 2,472,266.
        dropout: probability in front of each hidden linear layer (0.5 in the paper).
        width: multiplier of all channels and hidden features; each is rounded to a whole number.

    Returns:
        A module from (rows, 3, 32, 32) to (rows, num_classes) logits.
    """
    if stem not in (3, 11):
        raise InputError(f"alexnet: stem {stem} must be 3 or 11, the kernel of the first convolution")
    if not width > 0:
        raise InputError(f"alexnet: width {width} must be greater than 0, like 0.5 or 1.0")
    return AlexNet(num_classes, stem, dropout, width)


def alexnet_224(num_classes: int = 1000, dropout: float = 0.0, hidden: int = _HIDDEN) -> nn.Module:
    """AlexNet for 224 x 224 images, one tower, no local response normalisation: 61,100,840 parameters.

    Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv 1404.5997, 2014; its
    pooling overlaps, as in section 3.4 of the paper of 2012.

    Args:
        num_classes: outputs.
        dropout: probability in front of each hidden linear layer (0.5 in the paper).
        hidden: width of the two hidden linear layers.

    Returns:
        A module from (rows, 3, 224, 224) to (rows, num_classes) logits.
    """
    return AlexNet224(num_classes, dropout, hidden)


class AlexNet(nn.Module):
    """Five convolutions, three max-poolings, and one or three linear layers."""

    def __init__(self, num_classes: int, stem: int, dropout: float, width: float) -> None:
        super().__init__()
        a, b, c, d = (max(1, round(channels * width)) for channels in (64, 192, 384, 256))
        first = nn.Conv2d(3, a, 3, 2, 1) if stem == 3 else nn.Conv2d(3, a, 11, 4, 5)
        second = nn.Conv2d(a, b, 3, padding=1) if stem == 3 else nn.Conv2d(a, b, 5, padding=2)
        self.features = nn.Sequential(
            first, nn.ReLU(), nn.MaxPool2d(2),
            second, nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(b, c, 3, padding=1), nn.ReLU(),
            nn.Conv2d(c, d, 3, padding=1), nn.ReLU(),
            nn.Conv2d(d, d, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        hidden = (max(1, round(_HIDDEN * width)),) * 2 if stem == 3 else ()
        self.classifier = _head(d * 2 * 2 if stem == 3 else d, hidden, num_classes, dropout)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 3, 32, 32) to (rows, num_classes)."""
        return self.classifier(self.features(x).flatten(1))


class AlexNet224(nn.Module):
    """Five convolutions, three overlapping max-poolings, and three linear layers."""

    def __init__(self, num_classes: int, dropout: float, hidden: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.classifier = _head(256 * 6 * 6, (hidden, hidden), num_classes, dropout)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 3, 224, 224) to (rows, num_classes)."""
        return self.classifier(self.features(x).flatten(1))


def _head(width: int, hidden: tuple[int, ...], num_classes: int, dropout: float) -> nn.Sequential:
    """Hidden linear layers and the last one."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Dropout(dropout)] if dropout else []
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, num_classes))
