"""Models of the equality ladder: small, and each with something that breaks careless systems."""

from __future__ import annotations

import torch
from equality import Case
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from spanwise.zoo import gpt, mlp, mobilenet_v2
from spanwise.zoo.data import synthetic_images, synthetic_text, synthetic_vectors
from spanwise.zoo.losses import language_model_loss


class LogitsOnly(nn.Module):
    """A transformers model as (tensor) -> logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).logits


def hf_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=31, n_positions=8, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return LogitsOnly(GPT2LMHeadModel(config))


def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=4, num_channels=3, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return LogitsOnly(ViTForImageClassification(config))


def images(classes: int = 5, size: int = 8) -> TensorDataset:
    return synthetic_images(rows=96, shape=(3, size, size), classes=classes, seed=0)[0]


MLP = Case(
    "mlp",
    lambda: mlp(sizes=(8, 16, 16, 12, 4)),
    nn.CrossEntropyLoss(),
    lambda: synthetic_vectors(rows=96, features=8, classes=4, seed=0)[0],
)
GPT = Case(
    "gpt",
    lambda: gpt(vocab=17, n_layer=2, n_head=2, d_model=16, seq=6),
    language_model_loss,
    lambda: synthetic_text(rows=96, seq=6, vocab=17, seed=0)[0],
    optimizer=(("name", "AdamW"), ("lr", 1e-2)),
    clip_norm=0.5,
)
GPT2 = Case(
    "gpt2-tied",
    hf_gpt2,
    language_model_loss,
    lambda: synthetic_text(rows=96, seq=8, vocab=31, seed=0)[0],
    clip_norm=1.0,
)
VIT = Case("vit", hf_vit, nn.CrossEntropyLoss(), images)
MOBILENET = Case(
    "mobilenet-v2", lambda: mobilenet_v2(num_classes=5, width=0.25), nn.CrossEntropyLoss(),
    lambda: images(size=16), batch=24, slice_rows=4, steps=3,  # each takes as long as ten of the others
    optimizer=(("name", "SGD"), ("lr", 0.005), ("momentum", 0.9)),
)  # fmt: skip

ALL = {case.name: case for case in (MLP, GPT, GPT2, VIT, MOBILENET)}
BATCH_STATISTICS = {"mobilenet-v2"}

torch.set_num_threads(1)
