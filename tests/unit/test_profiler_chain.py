"""Stages in a chain compute what the model computes: loss, gradients, buffers, for any cuts and rows."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spanwise.ops.opgraph import OpGraph
from spanwise.ops.stage_module import StageModule
from spanwise.profiler.trace import Traced, trace
from spanwise.profiler.traced import received

TOLERANCE = 1e-10
Data = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class Inverted(nn.Module):
    """Inverted residual block: two values cross the cuts inside."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 3 * channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU6(inplace=True),
            Inverted(6, 6, 1),
            Inverted(6, 8, 2),
            Inverted(8, 8, 1),
        )
        self.dropout = nn.Dropout(0.3)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x).mean((2, 3))))


class Residual(nn.Module):
    """Basic block with an addition and an activation in place, and a projection beside."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.down = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.qkv(self.n1(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(seen.transpose(1, 2).reshape(rows, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.n2(x))))


class TiedGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(23, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList([Block(8, 2), Block(8, 2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 23, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        mask = torch.zeros(x.shape[1], 1, dtype=y.dtype, device=x.device)
        mask[2:] = 1  # a constant that is overwritten: each stage makes its own
        for block in self.blocks:
            y = block(y) + 0.1 * mask
        return self.head(self.norm(y))


class Logits(nn.Module):
    """A ``transformers`` model whose only output is the logits."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, **self.options).logits


class Odd(nn.Module):
    """In-place through a view, a detached branch, an exponential average under no_grad, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        padded = torch.zeros(x.shape[0], 6, dtype=x.dtype, device=x.device)
        padded[:, :3] = y[:, :3] * self.scale[:3]
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * y.mean(0))
        gate = torch.sigmoid(self.b(y.detach()))
        z = torch.tanh(self.frozen(padded + y)) * gate - self.mean
        z[:, 0].mul_(2.0)
        return self.c(F.relu(z, inplace=True))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def images(rows: int, size: int = 8) -> Data:
    return (torch.randn(rows, 3, size, size, dtype=torch.float64),), (torch.randint(10, (rows,)),)


def vectors(rows: int) -> Data:
    return (torch.randn(rows, 6, dtype=torch.float64),), (torch.randint(4, (rows,)),)


def tokens(rows: int) -> Data:
    return (torch.randint(23, (rows, 6)),), (torch.randint(23, (rows, 6)),)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def residual() -> nn.Module:
    stem = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)
    )
    body = (Residual(6, 6), Residual(6, 8), Residual(8, 8))
    return nn.Sequential(stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def gpt2(attention: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=8, vocab_size=23, n_positions=8, bos_token_id=1, eos_token_id=1,
            attn_implementation=attention,
        )  # fmt: skip
        return Logits(transformers.GPT2LMHeadModel(config), {"use_cache": False})


def vit(attention: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8,
            patch_size=4, num_labels=10, attn_implementation=attention, hidden_dropout_prob=0.1,
        )  # fmt: skip
        return Logits(transformers.ViTForImageClassification(config), {})


CASES: dict[
    str, tuple[Callable[[], nn.Module], Callable[[Tensor, Tensor], Tensor], Callable[[int], Data]]
] = {
    "mlp": (mlp, F.cross_entropy, vectors),
    "mobile": (Mobile, F.cross_entropy, images),
    "residual": (residual, F.cross_entropy, images),
    "tied-gpt": (TiedGPT, token_loss, tokens),
    "odd": (Odd, F.cross_entropy, vectors),
    "gpt2-sdpa": (lambda: gpt2("sdpa"), token_loss, tokens),
    "gpt2-eager": (lambda: gpt2("eager"), token_loss, tokens),
    "vit-sdpa": (lambda: vit("sdpa"), F.cross_entropy, images),
    "vit-eager": (lambda: vit("eager"), F.cross_entropy, images),
}


@pytest.mark.parametrize("name", CASES)
def test_chain_of_stages_is_the_model(name: str) -> None:
    make, loss, data = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    traced = trace(model, loss, *data(4), name=name)
    received_ops = OpGraph.from_json(traced.ops.to_json())
    layers = len(traced.graph)
    assert layers >= 3
    rng = random.Random(name)
    every = list(range(1, layers))
    for trial, cuts in enumerate([every, [], every, *(_some(rng, every) for _ in range(3))]):
        batch = data(4 if trial < 2 else 7)
        expected = eager(model, loss, batch, seed=trial)
        _same(expected, chained(traced, received_ops, cuts, batch, seed=trial))


def test_wrong_cut_order_is_noticed() -> None:
    """A control: the comparison above would see a stage that runs on other rows."""
    torch.manual_seed(0)
    model = mlp().double()
    traced = trace(model, F.cross_entropy, *vectors(4), name="mlp")
    batch = vectors(4)
    turned = ((batch[0][0].flip(0),), batch[1])
    with pytest.raises(AssertionError):
        _same(eager(model, F.cross_entropy, batch, seed=0), chained(traced, traced.ops, [1], turned, seed=0))


def test_model_is_left_as_it_was() -> None:
    model = Mobile()
    model.features[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    trace(model, F.cross_entropy, (torch.randn(4, 3, 8, 8),), (torch.randint(10, (4,)),), name="mobile")
    torch.random.set_rng_state(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.features[:3]] == [True, False, True]


def test_digest_is_stable() -> None:
    batch = images(4)
    torch.manual_seed(1)
    first, second = Mobile().double(), Mobile().double()
    a = trace(first, F.cross_entropy, *batch, name="m")
    b = trace(second, F.cross_entropy, *images(6), name="m")
    assert a.ops == b.ops
    assert a.ops.digest == b.ops.digest == a.graph.source_digest
    assert a.graph == b.graph


def eager(model: nn.Module, loss: Callable[..., Tensor], batch: Data, *, seed: int) -> dict[str, Tensor]:
    model = copy.deepcopy(model).train()
    torch.manual_seed(seed)
    value = loss(model(*(x.clone() for x in batch[0])), *batch[1])
    value.backward()
    out = {"loss": value.detach()}
    out.update({f"gradient {k}": p.grad for k, p in model.named_parameters() if p.grad is not None})
    kept = model.state_dict()
    out.update({f"buffer {k}": b.detach() for k, b in model.named_buffers() if k in kept})
    return out


def chained(traced: Traced, ops: OpGraph, cuts: list[int], batch: Data, *, seed: int) -> dict[str, Tensor]:
    graph = traced.graph
    parameters = {k: nn.Parameter(p.detach().clone()) for k, p in traced.parameters.items()}
    buffers = {k: b.detach().clone() for k, b in traced.buffers.items()}
    torch.manual_seed(seed)
    bounds = [0, *cuts, len(graph)]
    kept: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    values = tuple(x.clone() for x in batch[0])
    for start, stop in pairwise(bounds):
        stage = StageModule(ops, graph, start, stop, parameters=parameters, buffers=buffers)
        if start:
            values = received(values, graph.cut_before(start))
        outputs = stage(values, batch[1])
        kept.append((values, outputs))
        values = outputs
    gradients: list[Tensor | None] = [torch.ones_like(values[0])] + [None] * (len(values) - 1)
    for start in reversed(bounds[:-1]):
        inputs, outputs = kept.pop()
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        gradients = [value.grad for value in inputs]
        if start:
            assert [g is not None for g in gradients] == [s.differentiable for s in graph.cut_before(start)]
    out = {"loss": values[0].detach()}
    out.update({f"gradient {k}": p.grad for k, p in parameters.items() if p.grad is not None})
    out.update({f"buffer {k}": b for k, b in buffers.items() if not k.startswith("frozen")})
    return out


def _some(rng: random.Random, every: list[int]) -> list[int]:
    return sorted(rng.sample(every, min(len(every), rng.randint(1, 4))))


def _same(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert set(expected) == set(found)
    for key, value in expected.items():
        assert torch.allclose(found[key].double(), value.double(), rtol=TOLERANCE, atol=TOLERANCE), key
