"""Layer tables of published networks: parameters and multiply-adds of every layer, from their architectures.

A layer is a convolution with its batch norm, or a fully connected layer, in the order of execution;
branches of an inception block follow each other. Pooling, activations and dropout have no parameters and
hardly any compute and are left out. Multiply-adds are those of convolutions and fully connected layers for
one image.

    python benchmarks/dynacomm/nets.py      # writes tables/*.csv

Sources: Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, configuration E (VGG-19);
Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, table 1 (GoogLeNet, in torchvision's form:
batch norm, and 3 x 3 where the paper has 5 x 5; no auxiliary heads); He et al., "Deep Residual Learning",
CVPR 2016, table 1 (ResNet, with the stride in the 3 x 3 convolution, as torchvision has it); Szegedy et
al., "Inception-v4", AAAI 2017, figures 3 to 9.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

TABLES = Path(__file__).parent / "tables"
CLASSES = 1000


class Layer(NamedTuple):
    """One layer; ``multiply_adds`` of its forward for one image."""

    name: str
    parameters: int
    multiply_adds: int


@dataclass
class Net:
    """A network under construction: its layers so far, and what crosses behind them."""

    size: int
    channels: int = 3
    layers: list[Layer] = field(default_factory=list[Layer])

    def conv(
        self,
        name: str,
        channels: int,
        kernel: int | tuple[int, int] = 3,
        *,
        stride: int = 1,
        same: bool = True,
        bias: bool = False,
    ) -> None:
        """A convolution with batch norm, or with a bias instead; ``same`` pads, else the border is lost."""
        high, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        if same:
            self.size = -(-self.size // stride)
        else:
            self.size = (self.size - max(high, wide)) // stride + 1
        weights = self.channels * channels * high * wide
        own = weights + (channels if bias else 2 * channels)
        self.layers.append(Layer(name, own, weights * self.size**2))
        self.channels = channels

    def pool(self, *, same: bool = True) -> None:
        """Half the size."""
        self.size = -(-self.size // 2) if same else (self.size - 3) // 2 + 1

    def full(self, name: str, features: int, inputs: int | None = None) -> None:
        """A fully connected layer; after global pooling unless its inputs are given."""
        inputs = self.channels if inputs is None else inputs
        self.layers.append(Layer(name, inputs * features + features, inputs * features))
        self.channels = features

    def branches(self, *branches: Callable[[], None]) -> None:
        """Branches side by side, their channels one behind the other."""
        size, channels, out = self.size, self.channels, 0
        for branch in branches:
            self.size, self.channels = size, channels
            branch()
            out += self.channels
        self.channels = out


def vgg19() -> list[Layer]:
    net = Net(224)
    for block, (channels, count) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)), start=1):
        for number in range(1, count + 1):
            net.conv(f"conv{block}_{number}", channels, bias=True)
        net.pool()
    net.full("fc6", 4096, net.channels * net.size**2)
    net.full("fc7", 4096)
    net.full("fc8", CLASSES)
    return net.layers


def resnet(blocks: tuple[int, int, int, int]) -> list[Layer]:
    net = Net(224)
    net.conv("conv1", 64, 7, stride=2)
    net.pool()
    for stage, count in enumerate(blocks, start=2):
        width = 64 * 2 ** (stage - 2)
        for number in range(1, count + 1):
            _bottleneck(net, f"conv{stage}_{number}", width, 2 if number == 1 and stage > 2 else 1)
    net.full("fc", CLASSES)
    return net.layers


def _bottleneck(net: Net, name: str, width: int, stride: int) -> None:
    size, channels = net.size, net.channels
    net.conv(f"{name}.a", width, 1)
    net.conv(f"{name}.b", width, 3, stride=stride)
    net.conv(f"{name}.c", 4 * width, 1)
    if channels != 4 * width:
        net.size, net.channels = size, channels
        net.conv(f"{name}.shortcut", 4 * width, 1, stride=stride)


# Channels of 1x1; of 1x1 and 3x3; of 1x1 and "5x5"; of 1x1 behind the pooling. None: a pooling between.
_GOOGLENET = {
    "3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64), "pool3": None,
    "4a": (192, 96, 208, 16, 48, 64), "4b": (160, 112, 224, 24, 64, 64), "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64), "4e": (256, 160, 320, 32, 128, 128), "pool4": None,
    "5a": (256, 160, 320, 32, 128, 128), "5b": (384, 192, 384, 48, 128, 128),
}  # fmt: skip


def googlenet() -> list[Layer]:
    net = Net(224)
    net.conv("conv1", 64, 7, stride=2)
    net.pool()
    net.conv("conv2", 64, 1)
    net.conv("conv3", 192)
    net.pool()
    for name, widths in _GOOGLENET.items():
        if widths is None:
            net.pool()
            continue
        one, three_in, three, five_in, five, behind = widths
        net.branches(
            lambda c=one, n=name: net.conv(f"{n}.1x1", c, 1),
            lambda c=three_in, d=three, n=name: _chain(net, f"{n}.3x3", (c, 1), (d, 3)),
            lambda c=five_in, d=five, n=name: _chain(net, f"{n}.5x5", (c, 1), (d, 3)),
            lambda c=behind, n=name: net.conv(f"{n}.pool", c, 1),
        )
    net.full("fc", CLASSES)
    return net.layers


Kernel = int | tuple[int, int]


def _chain(net: Net, name: str, *convs: tuple[int, Kernel], shrink: bool = False) -> None:
    """Convolutions one after the other; ``shrink``: the last one halves the size without padding."""
    for number, (channels, kernel) in enumerate(convs, start=1):
        last = shrink and number == len(convs)
        net.conv(f"{name}.{number}", channels, kernel, stride=2 if last else 1, same=not last)


ROW, COLUMN = (1, 7), (7, 1)


def inception_v4() -> list[Layer]:
    net = Net(299)
    net.conv("stem.1", 32, stride=2, same=False)
    net.conv("stem.2", 32, same=False)
    net.conv("stem.3", 64)
    net.branches(lambda: net.pool(same=False), lambda: net.conv("stem.4", 96, stride=2, same=False))
    net.branches(lambda: _unpadded(net, "stem.5", (64, 1)),
                 lambda: _unpadded(net, "stem.6", (64, 1), (64, ROW), (64, COLUMN)))  # fmt: skip
    net.branches(lambda: net.conv("stem.7", 192, stride=2, same=False), lambda: net.pool(same=False))
    for n in range(1, 5):
        net.branches(
            lambda n=n: net.conv(f"a{n}.1x1", 96, 1),
            lambda n=n: _chain(net, f"a{n}.3x3", (64, 1), (96, 3)),
            lambda n=n: _chain(net, f"a{n}.double", (64, 1), (96, 3), (96, 3)),
            lambda n=n: net.conv(f"a{n}.pool", 96, 1),
        )
    net.branches(
        lambda: _chain(net, "reduce_a.3x3", (384, 3), shrink=True),
        lambda: _chain(net, "reduce_a.double", (192, 1), (224, 3), (256, 3), shrink=True),
        lambda: net.pool(same=False),
    )
    for n in range(1, 8):
        net.branches(
            lambda n=n: net.conv(f"b{n}.1x1", 384, 1),
            lambda n=n: _chain(net, f"b{n}.7x7", (192, 1), (224, ROW), (256, COLUMN)),
            lambda n=n: _chain(
                net, f"b{n}.double", (192, 1), (192, COLUMN), (224, ROW), (224, COLUMN), (256, ROW)
            ),
            lambda n=n: net.conv(f"b{n}.pool", 128, 1),
        )
    net.branches(
        lambda: _chain(net, "reduce_b.3x3", (192, 1), (192, 3), shrink=True),
        lambda: _chain(net, "reduce_b.7x7", (256, 1), (256, ROW), (320, COLUMN), (320, 3), shrink=True),
        lambda: net.pool(same=False),
    )
    for n in range(1, 4):
        net.branches(
            lambda n=n: net.conv(f"c{n}.1x1", 256, 1),
            lambda n=n: _fork(net, f"c{n}.3x3", (384, 1)),
            lambda n=n: _fork(net, f"c{n}.double", (384, 1), (448, (3, 1)), (512, (1, 3))),
            lambda n=n: net.conv(f"c{n}.pool", 256, 1),
        )
    net.full("fc", CLASSES)
    return net.layers


def _unpadded(net: Net, name: str, *convs: tuple[int, Kernel]) -> None:
    """A chain, then 96 channels of 3 x 3 that lose the border."""
    _chain(net, name, *convs)
    net.conv(f"{name}.last", 96, same=False)


def _fork(net: Net, name: str, *convs: tuple[int, Kernel]) -> None:
    """A chain whose end goes through a row and a column side by side."""
    _chain(net, name, *convs)
    net.branches(
        lambda: net.conv(f"{name}.row", 256, (1, 3)), lambda: net.conv(f"{name}.column", 256, (3, 1))
    )


NETS: dict[str, Callable[[], list[Layer]]] = {
    "vgg19": vgg19,
    "googlenet": googlenet,
    "inception_v4": inception_v4,
    "resnet50": lambda: resnet((3, 4, 6, 3)),
    "resnet152": lambda: resnet((3, 8, 36, 3)),
}


def read(name: str) -> list[Layer]:
    """The table of a network as it lies in ``tables``."""
    with (TABLES / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [Layer(row["name"], int(row["parameters"]), int(row["multiply_adds"])) for row in rows]


def main() -> None:
    TABLES.mkdir(exist_ok=True)
    for name, build in NETS.items():
        layers = build()
        with (TABLES / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([Layer._fields, *layers])
        parameters, work = (sum(layer[i] for layer in layers) for i in (1, 2))
        print(f"{name}: {len(layers)} layers, {parameters:,} parameters, {work / 1e9:.3f} G multiply-adds")


if __name__ == "__main__":
    main()
