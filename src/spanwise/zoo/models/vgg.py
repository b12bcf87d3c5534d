"""VGG-9, VGG-11 and VGG-16 for 32 x 32 images."""

from __future__ import annotations

from torch import Tensor, nn

from spanwise.core.errors import InputError
from spanwise.zoo.models.initial import initialise

# Channels of each 3x3 convolution, a group per max-pooling; of 11 and 16 configurations A and D of table 1.
_VGG9 = ((32, 64), (128, 128), (256, 256))
_VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_HIDDEN9 = (512, 512)
_SIDE = 32  # pixels; every max-pooling halves them


def vgg9(num_classes: int = 10, batch_norm: bool = False) -> nn.Module:
    """VGG-9, the form that papers on federated learning use: 3,491,530 parameters at 10 classes.

    Wang, Yurochkin, Sun, Papailiopoulos, Khazaeni, "Federated learning with matched averaging", ICLR 2020,
    table 4; without its dropout.

    Args:
        num_classes: outputs.
        batch_norm: BatchNorm behind every convolution.

    Returns:
        A module from (rows, 3, 32, 32) to (rows, num_classes) logits.
    """
    return VGG(_VGG9, num_classes, batch_norm, _HIDDEN9)


def vgg11(num_classes: int = 10, batch_norm: bool = False, width: float = 1.0) -> nn.Module:
    """VGG-11, CIFAR form: 9,225,610 parameters at 10 classes, 9,231,114 with BatchNorm.

    Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015,
    table 1, configuration A. Five poolings leave 1 x 1 of a 32 x 32 image, so one linear layer replaces
    the three of the original.

    Args:
        num_classes: outputs.
        batch_norm: BatchNorm behind every convolution.
        width: multiplier of all channels; each is rounded to a whole number.

    Returns:
        A module from (rows, 3, 32, 32) to (rows, num_classes) logits.
    """
    if not width > 0:
        raise InputError(f"vgg11: width {width} must be greater than 0, like 0.25 or 1.0")
    groups = tuple(tuple(max(1, round(out * width)) for out in group) for group in _VGG11)
    return VGG(groups, num_classes, batch_norm)


def vgg16(num_classes: int = 10, batch_norm: bool = False) -> nn.Module:
    """VGG-16, CIFAR form: 14,719,818 parameters at 10 classes, 14,728,266 with BatchNorm.

    As :func:`vgg11`, configuration D.

    Args:
        num_classes: outputs.
        batch_norm: BatchNorm behind every convolution.

    Returns:
        A module from (rows, 3, 32, 32) to (rows, num_classes) logits.
    """
    return VGG(_VGG16, num_classes, batch_norm)


class VGG(nn.Module):
    """Groups of 3x3 convolutions, each followed by max-pooling, and a classifier."""

    def __init__(
        self,
        groups: tuple[tuple[int, ...], ...],
        num_classes: int,
        batch_norm: bool,
        hidden: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for group in groups:
            for out in group:
                layers.append(nn.Conv2d(channels, out, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(out))
                layers.append(nn.ReLU())
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = _head(channels * (_SIDE >> len(groups)) ** 2, hidden, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 3, 32, 32) to (rows, num_classes)."""
        return self.classifier(self.features(x).flatten(1))


def _head(width: int, hidden: tuple[int, ...], num_classes: int) -> nn.Module:
    """The last linear layer, behind hidden ones if there are any."""
    if not hidden:
        return nn.Linear(width, num_classes)
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, num_classes))
