"""Images upright and rotated, a model trained on the first, and devices that go on with the second.

Digits, or CIFAR-10 where its files are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from spanwise.api.prepare import Prepared, prepare_live
from spanwise.core.job import Job
from spanwise.zoo import mobilenet_v2
from spanwise.zoo.data import cifar10, digits

ANGLE = 45.0  # degrees; 6 and 9 stay apart
PRETRAINED_EPOCHS, PRETRAINED_BATCH, PRETRAINED_LR = 15, 64, 0.05


@dataclass(frozen=True)
class Scale:
    """How large the model and its images are; ``cifar``: CIFAR-10's folder, in place of digits."""

    width: float = 1.0
    size: int = 32
    cifar: Path | None = None

    @property
    def name(self) -> str:
        """For files that are kept."""
        return f"{'digits' if self.cifar is None else 'cifar10'}-{self.width:g}-{self.size}"

    def model(self, seed: int) -> nn.Module:
        """With the initial weights of a seed."""
        torch.manual_seed(seed)
        return mobilenet_v2(num_classes=10, width=self.width)


def rotated(images: Tensor, degrees: float = ANGLE) -> Tensor:
    """Each image turned about its middle, bilinear, the border continued."""
    angle = torch.tensor(degrees).deg2rad()
    cos, sin = torch.cos(angle), torch.sin(angle)
    matrix = torch.stack([torch.stack([cos, -sin, cos * 0]), torch.stack([sin, cos, cos * 0])])
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def data(scale: Scale, *, turned: bool, skewed_over: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Training and test set; ``skewed_over`` devices, to which row i goes in turn, have sorted labels."""
    train, test = digits(size=scale.size) if scale.cifar is None else cifar10(scale.cifar)
    whole = torch.Size((scale.size, scale.size))
    sets: list[TensorDataset] = []
    for found in (train, test):
        x, y = found.tensors
        x = x.contiguous() if x.shape[2:] == whole else F.interpolate(x, whole, mode="area")
        sets.append(TensorDataset(rotated(x) if turned else x, y))
    if skewed_over:
        x, y = sets[0].tensors
        order = torch.argsort(y, stable=True)
        usable = len(order) // skewed_over * skewed_over
        place = order[:usable].view(skewed_over, -1).t().reshape(-1)
        sets[0] = TensorDataset(x[place], y[place])
    return sets[0], sets[1]


def pretrained(scale: Scale, seed: int, epochs: int, cache: Path | None) -> nn.Module:
    """Trained on upright images by plain PyTorch; kept in a folder, if one is given."""
    model = scale.model(seed)
    path = None if cache is None else cache / f"{scale.name}-{seed}-{epochs}.safetensors"
    if path is not None and path.exists():
        model.load_state_dict(safetensors.torch.load_file(path))
        return model
    x, y = data(scale, turned=False)[0].tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=PRETRAINED_LR, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(x) // PRETRAINED_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        if step % (len(x) // PRETRAINED_BATCH) == 0:
            order = torch.randperm(len(x), generator=generator)
        at = step % (len(x) // PRETRAINED_BATCH) * PRETRAINED_BATCH
        rows = order[at : at + PRETRAINED_BATCH]
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model


def job(
    batch: int, seed: int, lr: float, epochs: int, *, stored: bool = False, trained_share: float = 1.0
) -> Job:
    """Momentum and weight decay, so that what is frozen would move if it were only masked."""
    live: dict[str, Any] = {"model": "live", "data": "live", "loss": "live"}
    return Job.parse(
        {
            **live, "name": "digits", "batch": batch, "seed": seed, "epochs": epochs, "checkpoint_every": 0,
            "optimizer": {"name": "SGD", "lr": lr, "momentum": 0.9, "weight_decay": 5e-4},
            "transfer_timeout_s": 300.0, "statistics": "stored" if stored else "batch",
            "trained_share": trained_share,
        }
    )  # fmt: skip


def prepared(model: nn.Module, job_: Job, sets: tuple[TensorDataset, TensorDataset]) -> Prepared:
    """Traced together with its loss."""
    return prepare_live(job_, model, nn.CrossEntropyLoss(), *sets)
