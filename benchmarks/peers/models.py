"""The five benchmark models and their loss, for the peers and for spanwise's jobs alike.

One table names each model's factory, data and loss as a job does; peers build from the same table, so both
train the same module on the same rows. ``units`` takes a model apart into sequential modules: what
pipelines cut between and what FSDP2 shards one by one, as the documentation of both does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from spanwise.runtime.imports import build, data_sets, load_loss
from spanwise.zoo import gpt
from spanwise.zoo.models.gpt import GPT
from spanwise.zoo.models.mobilenet import MobileNetV2
from spanwise.zoo.models.resnet import ResNet
from spanwise.zoo.models.vgg import VGG

ROWS = 512  # of the training set; batches are drawn from it in order, round and round
_VOCAB, _TOKENS, _WIDTH, _BLOCKS, _HEADS = 256, 64, 192, 6, 3


@dataclass(frozen=True)
class Recipe:
    """How a job names one model: the tables ``model`` and ``data`` and the loss."""

    model: tuple[tuple[str, Any], ...]
    data: tuple[tuple[str, Any], ...]
    loss: str
    units: int

    def tables(self) -> dict[str, Any]:
        """What ``Job.parse`` takes for this model; ``models:`` names need this folder on the import path."""
        return {"model": dict(self.model), "data": dict(self.data), "loss": self.loss}


_IMAGES = (
    ("name", "spanwise.zoo.data:synthetic_images"), ("rows", ROWS), ("shape", (3, 32, 32)), ("classes", 10),
)  # fmt: skip
_TEXT = (
    ("name", "spanwise.zoo.data:synthetic_text"), ("rows", ROWS), ("seq", _TOKENS), ("vocab", _VOCAB),
)  # fmt: skip

RECIPES = {
    "mobilenet_v2": Recipe(
        (("name", "spanwise.zoo:mobilenet_v2"), ("num_classes", 10)), _IMAGES, "cross_entropy", units=20
    ),
    "resnet18": Recipe(
        (("name", "spanwise.zoo:resnet18"), ("num_classes", 10)), _IMAGES, "cross_entropy", units=10
    ),
    "vgg11": Recipe((("name", "spanwise.zoo:vgg11"), ("num_classes", 10)), _IMAGES, "cross_entropy", units=9),
    "vit": Recipe((("name", "models:vit"),), _IMAGES, "cross_entropy", units=_BLOCKS + 2),
    "gpt": Recipe(
        (("name", "models:small_gpt"),), _TEXT, "spanwise.zoo:language_model_loss", units=_BLOCKS + 2
    ),
}


def small_gpt() -> nn.Module:
    """GPT with 6 blocks of width 192, 64 tokens of a vocabulary of 256.

    The head is not tied to the embedding: neither ``torch.distributed.pipelining`` nor ``fully_shard`` takes
    a parameter that two stages or two units share, and all systems must train the same model.
    """
    return gpt(vocab=_VOCAB, n_layer=_BLOCKS, n_head=_HEADS, d_model=_WIDTH, seq=_TOKENS, tied=False)


def vit() -> nn.Module:
    """The ViT of transformers: 32 x 32 images in patches of 4, 6 layers of width 192, 3 heads, 10 classes."""
    from transformers import ViTConfig, ViTForImageClassification  # 80 MB that other models need not load

    config = ViTConfig(
        image_size=32, patch_size=4, num_channels=3, hidden_size=_WIDTH, num_hidden_layers=_BLOCKS,
        num_attention_heads=_HEADS, intermediate_size=4 * _WIDTH, num_labels=10, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    return Classifier(ViTForImageClassification(config))


class Classifier(nn.Module):
    """A transformers image classifier as images to logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """(rows, 3, 32, 32) to (rows, 10)."""
        return self.inner(images).logits


class Embeddings(nn.Module):
    """The GPT's token and position embeddings."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.token, self.position = model.token, model.position

    def forward(self, tokens: Tensor) -> Tensor:
        """(rows, tokens) to (rows, tokens, width)."""
        return self.token(tokens) + self.position.weight[: tokens.shape[1]]


class SpatialMean(nn.Module):
    """Mean over height and width."""

    def forward(self, x: Tensor) -> Tensor:
        """(rows, channels, height, width) to (rows, channels)."""
        return x.mean((2, 3))


class FirstToken(nn.Module):
    """The class token."""

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, width) to (rows, width)."""
        return x[:, 0]


def make(name: str, seed: int = 0) -> nn.Module:
    """The named model in training mode, with the weights that a job of that seed starts from."""
    table = dict(RECIPES[name].model)
    torch.manual_seed(seed)
    return build(table.pop("name"), table, "model").train()


def loss_of(name: str) -> Callable[[Any, Any], Tensor]:
    """The named model's loss: a mean over rows."""
    return load_loss(RECIPES[name].loss)


def batches(name: str, batch: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """``count`` global batches of (inputs, labels), the same on every device."""
    table = dict(RECIPES[name].data)
    train, _ = data_sets(build(table.pop("name"), table, "data"))
    order = [torch.arange(i * batch, (i + 1) * batch) % len(train) for i in range(count)]
    x, y = train.tensors
    return [(x[rows], y[rows]) for rows in order]


def units(model: nn.Module) -> list[nn.Module]:
    """Modules whose sequence is the model: a stem, blocks, and a head.

    They hold the model's own parameters, each once. A module that FSDP2 shards must be called itself, so
    a unit never reaches into another one's submodules.
    """
    if isinstance(model, MobileNetV2):
        return [*model.features, nn.Sequential(SpatialMean(), model.dropout, model.classifier)]
    if isinstance(model, ResNet):
        stem, relu, *blocks = model.features
        return [nn.Sequential(stem, relu), *blocks, nn.Sequential(SpatialMean(), model.classifier)]
    if isinstance(model, VGG):
        return [*_convolutions(model.features), nn.Sequential(nn.Flatten(), model.classifier)]
    if isinstance(model, GPT):
        return [Embeddings(model), *model.blocks, nn.Sequential(model.norm, model.head)]
    if isinstance(model, Classifier):
        inner: Any = model.inner
        head = nn.Sequential(inner.vit.layernorm, FirstToken(), inner.classifier)
        return [inner.vit.embeddings, *inner.vit.layers, head]
    raise TypeError(f"units: no sequence known for {type(model).__name__}; known: {', '.join(RECIPES)}")


def _convolutions(features: nn.Sequential) -> list[nn.Module]:
    """One module per convolution with all that follows it up to the next."""
    groups: list[list[nn.Module]] = []
    for module in features:
        if isinstance(module, nn.Conv2d):
            groups.append([])
        groups[-1].append(module)
    return [nn.Sequential(*group) for group in groups]


def cut(count: int, parts: int) -> list[range]:
    """``count`` units in ``parts`` runs of equal number; the first have one more where it leaves a rest."""
    if not 1 <= parts <= count:
        raise ValueError(f"cut: {parts} parts of {count} units; give between 1 and {count} ranks")
    size, rest = divmod(count, parts)
    starts = [i * size + min(i, rest) for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def even(total: int, parts: int) -> list[int]:
    """``total`` rows over ``parts`` ranks as evenly as possible; the first have one more."""
    return [total // parts + (i < total % parts) for i in range(parts)]
