"""Small classifiers that divide, and sub-models of them with lively weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spanwise.core.decoupling import Decoupling, Negatives
from spanwise.decoupler.build import State, sub_model
from spanwise.decoupler.walk import Walked, walk
from spanwise.planner.decouple import decoupled


class Plain(nn.Module):
    """Convolutions with BatchNorm, pooling, a view instead of a flatten, and two hidden linear layers."""

    def __init__(self, classes: int = 6, width: int = 20) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, width + 4, 3, padding=1, bias=False), nn.BatchNorm2d(width + 4), nn.ReLU(),
            nn.AvgPool2d(2),
        )  # fmt: skip
        self.hidden = nn.Sequential(
            nn.Linear((width + 4) * 4, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 25)
        )
        self.head = nn.Linear(25, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(torch.relu(self.hidden(x.view(x.size(0), -1))))


class Residual(nn.Module):
    """A depthwise convolution, a residual sum, a gate by channel means, and a global mean."""

    def __init__(self, classes: int = 6, width: int = 18) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
        self.norm = nn.BatchNorm2d(2 * width)
        self.point = nn.Conv2d(2 * width, width, 1)
        self.gate = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        y = self.point(torch.relu(self.norm(self.depthwise(x))))
        x = x + y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))


def samples(rows: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def walked(model: nn.Module, shared: int = 0) -> Walked:
    return walk(model.double(), samples(2), shared=shared)


def divided(target: Walked, groups: Sequence[Sequence[int]], shares: Sequence[float] | None = None,
            policy: str = "all", **options: object) -> Decoupling:  # fmt: skip
    return decoupled(target.net, groups, shares, negatives=Negatives.parse({"policy": policy}), **options)


def lively(target: Walked, decoupling: Decoupling, seed: int = 0) -> dict[int, nn.Module]:
    """Sub-models whose every tensor is random, running statistics included, in evaluation mode."""
    found: dict[int, nn.Module] = {}
    shared = {layer.name for layer in target.net.layers if layer.whole}
    for group in range(len(decoupling.groups)):
        model = sub_model(target, decoupling, group, seed=seed)
        generator = torch.Generator().manual_seed(seed * 100 + group)
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[0] in shared or not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn * 0.5)
        found[group] = model.eval()
    return found


def states(models: dict[int, nn.Module]) -> dict[int, State]:
    return {group: dict(model.state_dict()) for group, model in models.items()}


def scores(decoupling: Decoupling, models: dict[int, nn.Module], x: Tensor) -> Tensor:
    """What merged networks must give, class by class, from the sub-models one at a time."""
    found = torch.full((len(x), decoupling.net.classes), float("-inf"), dtype=x.dtype)
    for group, model in models.items():
        z = model(x)
        for place, k in enumerate(decoupling.groups[group].classes):
            own = z[:, place + decoupling.other]
            if decoupling.read_out == "margin":
                own = own - z[:, 0]
            if decoupling.read_out == "probability":
                own = torch.log_softmax(z, 1)[:, place + 1]
            found[:, k] = own
    return found
