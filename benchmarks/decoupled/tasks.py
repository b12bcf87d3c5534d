"""Data, networks and recipes of the benchmark: the same for everybody who is compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from speak import generate
from torch import nn
from torch.utils.data import TensorDataset

from spanwise import zoo
from spanwise.core.job import Job
from spanwise.decoupler.build import he

Sets = tuple[TensorDataset, TensorDataset]

WORDS = Path(tempfile.gettempdir()) / "spanwise-words"
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "alexnet": lambda classes: zoo.alexnet(classes),
    "vgg9": lambda classes: zoo.vgg9(classes, batch_norm=True),
    "vgg11": lambda classes: zoo.vgg11(classes, batch_norm=True),
    "vgg16": lambda classes: zoo.vgg16(classes, batch_norm=True),
    "alexnet_11": lambda classes: zoo.alexnet(classes, stem=11),  # of the short run: a tenth of the weights
}


@dataclass(frozen=True)
class Task:
    """A data set and how long to train on it; ``rounds`` are FedAvg's, of one epoch each."""

    name: str
    classes: int
    epochs: int
    rounds: int
    batch: int
    load: Callable[[int], Sets]

    def job(self, seed: int, epochs: int | None = None) -> Job:
        """Adam, its rate falling by a cosine over the epochs."""
        last = epochs or self.epochs
        return Job.parse(
            {
                "model": "live", "data": "live", "batch": self.batch, "epochs": last, "seed": seed,
                "optimizer": {"name": "Adam", "lr": 1e-3},
                "scheduler": {"name": "CosineAnnealingLR", "T_max": last},
            }
        )  # fmt: skip


def tasks(words: Path, cifar: Path | None) -> dict[str, Task]:
    """Those whose data is here or can be made."""
    found = {
        "digits": Task("digits", 10, 12, 20, 64, lambda seed: zoo.digits(test_fraction=0.3, seed=seed)),
        "keywords": Task("keywords", 10, 16, 16, 64, lambda seed: spoken(words, seed)),
    }
    if cifar is not None:
        found["cifar10"] = Task("cifar10", 10, 60, 60, 128, lambda _: zoo.cifar10(cifar))
        found["cifar100"] = Task("cifar100", 100, 60, 60, 128, lambda _: zoo.cifar100(cifar))
    return found


def spoken(words: Path, seed: int) -> Sets:
    """The generated keywords; which voices are held out does not depend on the seed."""
    del seed
    generate(words)
    return zoo.keywords(words)


def fresh(model: str, classes: int, seed: int) -> nn.Module:
    """A network with weights as sub-models have them."""
    found = MODELS[model](classes)
    torch.manual_seed(seed)
    he(found)
    return found
