"""Layers run again in backward: the same gradients, buffers, random numbers; fewer bytes in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spanwise.cost.training import again_bytes, kept_bytes, saved_bytes
from spanwise.ops.deferred import Deferred
from spanwise.ops.recompute import Recomputed
from spanwise.ops.stage_module import StageModule
from spanwise.profiler.trace import Traced, trace
from spanwise.zoo.losses import language_model_loss
from spanwise.zoo.models.gpt import gpt
from spanwise.zoo.models.mobilenet import mobilenet_v2

Ranges = tuple[tuple[int, int], ...]


class Skips(nn.Module):
    """Dropout, a residual over several layers, one weight used twice, a frozen layer, batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.norm, self.frozen = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.dropout(torch.tanh(self.first(x)), 0.3)
        x = self.norm(self.second(skip))
        x = F.dropout(F.relu(self.second(x), inplace=True), 0.3)
        return self.last(self.frozen(x) + skip)


class Words(nn.Module):
    """Indices as input, which also pass to a later layer; a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.bias = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Embedding(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(self.embed(x)))
        h = torch.tanh(self.inner(h)) + self.bias(x)
        return F.linear(h.mean(1), self.embed.weight)


class Drifting(nn.Module):
    """A buffer that results depend on and that every forward overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.register_buffer("scale", torch.ones(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.scale.mul_(0.5).add_(x.detach().abs().mean(0))
        return self.last(torch.tanh(x * self.scale.clone()))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "skips": (Skips, lambda: torch.randn(4, 6), 5),
    "words": (Words, lambda: torch.randint(7, (4, 3)), 7),
    "drifting": (Drifting, lambda: torch.randn(4, 6), 5),
}


def traced(name: str) -> tuple[Traced, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    make, rows, classes = CASES[name]
    model, x = make().double().train(), rows()
    x = x.double() if x.is_floating_point() else x
    y = torch.randint(classes, (4,))
    return trace(model, F.cross_entropy, (x,), (y,), name=name), (x, y)


def ways(layers: int) -> list[Ranges]:
    """Every layer by itself, all at once, all but the last, only some in the middle."""
    each = tuple(pairwise(range(layers + 1)))
    return [each, ((0, layers),), each[:-1], ((1, layers - 1),) if layers > 2 else each[:1]]


def module(found: Traced, start: int, stop: int, recompute: Ranges = ()) -> StageModule:
    return StageModule(
        found.ops, found.graph, start, stop,
        parameters=found.parameters, buffers=found.buffers, recompute=recompute,
    )  # fmt: skip


def outcome(
    found: Traced, data: tuple[Tensor, Tensor], recompute: Ranges, *, halved: bool, start: int = 0
) -> dict[str, Tensor]:
    """Gradients, buffers and losses of two micro-batches, both forwards first; all is as before after it."""
    buffers = {key: value.clone() for key, value in found.buffers.items()}
    stage = module(found, start, len(found.graph), recompute)
    out: dict[str, Tensor] = {}
    entering: tuple[Tensor, ...] = (data[0],)
    torch.manual_seed(3)
    if start:
        with torch.no_grad():
            entering = module(found, 0, start)(entering)
    losses: list[tuple[Tensor, Deferred | None]] = []
    for _ in range(2):
        inputs = tuple(t.detach().requires_grad_(start > 0 and t.is_floating_point()) for t in entering)
        later = Deferred() if halved else None
        losses.append((stage(inputs, (data[1],), later)[0], later))
        out |= {f"input {len(losses)} {i}": t for i, t in enumerate(inputs) if t.requires_grad}
    for number, (loss, later) in enumerate(losses):
        loss.backward()
        if later is not None:
            later.run()
        out[f"loss {number}"] = loss.detach()
    out = {k: t if t.grad is None else t.grad for k, t in out.items()}
    out |= {f"gradient {k}": p.grad for k, p in found.parameters.items() if p.grad is not None}
    out |= {f"buffer {k}": b.clone() for k, b in found.buffers.items()}
    out["random"] = torch.rand(())
    for parameter in found.parameters.values():
        parameter.grad = None
    for key, value in found.buffers.items():
        value.copy_(buffers[key])
    return out


@pytest.mark.parametrize("halved", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_buffers_and_random_numbers_stay(name: str, halved: bool) -> None:
    found, data = traced(name)
    layers = len(found.graph)
    assert layers > 1
    expected = outcome(found, data, (), halved=halved)
    for recompute in ways(layers):
        got = outcome(found, data, recompute, halved=halved)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(got[key], value, rtol=0, atol=1e-12), (recompute, key)


def test_a_stage_behind_the_first_hands_back_the_same_gradients() -> None:
    found, data = traced("skips")
    layers = len(found.graph)
    expected = outcome(found, data, (), halved=False, start=1)
    assert any(key.startswith("input") for key in expected)
    for recompute in (tuple(pairwise(range(1, layers + 1))), ((1, layers),)):
        got = outcome(found, data, recompute, halved=False, start=1)
        assert all(torch.allclose(got[k], v, rtol=0, atol=1e-12) for k, v in expected.items())


@pytest.mark.parametrize("name", CASES)
def test_a_second_forward_in_another_state_would_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the first one's random state and buffers something differs."""
    found, data = traced(name)
    recompute = ((0, len(found.graph)),)
    expected = outcome(found, data, (), halved=False)

    def as_now(part: Recomputed, _: object) -> AbstractContextManager[None]:
        for copied in part.scratch:
            copied.own.copy_(copied.shared)
        return nullcontext()

    monkeypatch.setattr(Recomputed, "as_of", as_now)
    got = outcome(found, data, recompute, halved=False)
    same = all(torch.allclose(got[k], v, rtol=0, atol=1e-12) for k, v in expected.items())
    assert same == (name == "words")  # which has neither


class Alive:
    """Saved tensors while they are saved: bytes now and at most, each storage once."""

    def __init__(self, found: Traced) -> None:
        self.held = {t.untyped_storage().data_ptr() for t in (found.parameters | found.buffers).values()}
        self.boxes: WeakSet[Box] = WeakSet()
        self.most = 0

    def pack(self, tensor: Tensor) -> Box:
        box = Box(tensor)
        self.boxes.add(box)
        self.most = max(self.most, self.now)
        return box

    @property
    def now(self) -> int:
        storages = {t.untyped_storage().data_ptr(): t for t in (box.tensor for box in self.boxes)}
        return sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in self.held)


class Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[Tensor, Tensor]]] = {
    "mobilenet": (
        lambda: mobilenet_v2(num_classes=5, width=0.25), F.cross_entropy,
        (torch.randn(4, 3, 32, 32), torch.randint(5, (4,))),
    ),
    "gpt": (
        lambda: gpt(vocab=50, n_layer=3, n_head=2, d_model=32, seq=16), language_model_loss,
        (torch.randint(50, (4, 16)), torch.randint(50, (4, 16))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_formulas_count_what_autograd_keeps(name: str) -> None:
    """Of two micro-batches, in two to four parts, with and without the last: never more, hardly less."""
    make, loss, data = MODELS[name]
    found = trace(make().train(), loss, data[:1], data[1:], name=name)
    graph, rows = found.graph, 4
    whole = saved_bytes(graph, 0, len(graph), rows)
    for count in (2, 3, 4):
        edges = [round(len(graph) * i / count) for i in range(count + 1)]
        for recompute in (tuple(pairwise(edges)), tuple(pairwise(edges[:-1]))):
            alive = Alive(found)
            stage = module(found, 0, len(graph), recompute)
            with torch.autograd.graph.saved_tensors_hooks(alive.pack, lambda box: box.tensor):
                losses = [stage(tuple(t.clone() for t in data[:1]), data[1:])[0] for _ in range(2)]
                kept = alive.now
                for value in losses:
                    value.backward()
            expected = kept_bytes(graph, 0, len(graph), rows, recompute)
            peak = 2 * expected + again_bytes(graph, len(graph), rows, recompute)
            assert 0.97 * 2 * expected <= kept <= 2 * expected < 2 * whole
            assert 0.85 * peak <= alive.most <= peak
            assert alive.now == 0
