"""Backward in two halves: together the whole backward's gradients, apart what each half promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spanwise.ops.deferred import Deferred, deferrable, linear, run_together
from spanwise.ops.stage_module import StageModule
from spanwise.profiler.trace import Traced, trace


class Vectors(nn.Module):
    """Linear layers with and without bias, one frozen; a residual; what autograd keeps for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8, bias=False)
        self.frozen, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8))
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 5)
        self.frozen.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = x + self.second(x)
        return self.last(self.norm(F.dropout(self.frozen(x), 0.5) * self.scale))


class Images(nn.Module):
    """Strides, groups, padding, dilation, one overwritten result, batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, (1, 3), dilation=(1, 2), padding=(0, 2)), nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 1, bias=False),
        )  # fmt: skip
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Words(nn.Module):
    """A tied embedding, a product as GPT-2 writes it, a convolution over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 6), nn.LayerNorm(6)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.conv = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        x = torch.addmm(self.bias, x.view(-1, 6), self.weight).view(x.shape)
        x = self.conv(x.transpose(1, 2)).mean(2)
        return F.linear(x, self.embed.weight)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "vectors": (
        Vectors, lambda: torch.randn(4, 6),
        {"second.weight", "frozen.weight", "last.weight", "last.bias"},
    ),
    "images": (
        Images, lambda: torch.randn(4, 3, 9, 9),
        {f"body.{i}.{kind}" for i in (2, 5) for kind in ("weight", "bias")}
        | {"body.7.weight", "head.weight", "head.bias"},
    ),
    "words": (
        Words, lambda: torch.randint(5, (4, 7)),
        {"weight", "bias", "conv.weight", "conv.bias"},
    ),
}  # fmt: skip


def whole(name: str) -> tuple[Traced, StageModule, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    make, rows, _ = CASES[name]
    model, x = make().double().train(), rows()
    x = x.double() if x.is_floating_point() else x
    y = torch.randint(5, (4,))
    found = trace(model, F.cross_entropy, (x,), (y,), name=name)
    stage = StageModule(
        found.ops, found.graph, 0, len(found.graph), parameters=found.parameters, buffers=found.buffers
    )
    return found, stage, ((x,), (y,))


def taken(found: Traced) -> dict[str, Tensor]:
    """Gradients so far, which are reset."""
    out = {name: p.grad for name, p in found.parameters.items() if p.grad is not None}
    for parameter in found.parameters.values():
        parameter.grad = None
    return out


@pytest.mark.parametrize("name", CASES)
def test_both_halves_are_the_whole_backward(name: str) -> None:
    """Over two micro-batches, so that the second adds to the first."""
    found, stage, data = whole(name)
    buffers = {key: value.clone() for key, value in found.buffers.items()}
    for _ in range(2):
        torch.manual_seed(1)
        stage(*data)[0].backward()
    expected, after = taken(found), {key: value.clone() for key, value in found.buffers.items()}
    for key, value in found.buffers.items():
        value.copy_(buffers[key])
    for _ in range(2):
        torch.manual_seed(1)
        later = Deferred()
        stage(*data, later)[0].backward()
        later.run()
    halves = taken(found)
    assert halves.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.allclose(halves[key], gradient, rtol=0, atol=1e-12), key
    assert all(torch.equal(value, after[key]) for key, value in found.buffers.items())


class Calls(TorchDispatchMode):
    """Counts the operations that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def several(name: str, rows: tuple[int, ...]) -> tuple[Traced, list[Deferred], dict[str, Tensor]]:
    """Micro-batches of these rows after their input halves; the gradients of whole backwards."""
    found, stage, ((x,), (y,)) = whole(name)
    data = [((x[:count].flip(0),), (y[:count],)) for count in rows]
    for number, each in enumerate(data):
        torch.manual_seed(number)
        stage(*each)[0].backward()
    expected = taken(found)
    waiting = [Deferred() for _ in rows]
    for number, (each, later) in enumerate(zip(data, waiting, strict=True)):
        torch.manual_seed(number)
        stage(*each, later)[0].backward()
    return found, waiting, expected


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 2), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_weight_halves_at_once_give_the_same_gradients(name: str, sizes: tuple[int, ...]) -> None:
    """Four micro-batches of unlike rows, layer by layer in two parts; one product a portion."""
    found, waiting, expected = several(name, (4, 3, 4, 2))
    products = sum(deferrable(node) is not None for node in found.ops.nodes)
    cut = len(found.graph) // 2
    with Calls() as calls:
        run_together(waiting, cut, None, portions=lambda _: sizes)
        run_together(waiting, 0, cut, portions=lambda _: sizes)
    made = taken(found)
    assert made.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.allclose(made[key], gradient, rtol=0, atol=1e-12), key
    done = sum(calls.count[f"aten.{op}.default"] for op in ("convolution_backward", "mm", "addmm", "addmm_"))
    assert 0 < done <= products * len(sizes)
    assert all(later.layers == frozenset() for later in waiting)


def test_a_micro_batch_left_out_shows() -> None:
    """Negative control."""
    found, waiting, expected = several("images", (4, 3, 4))
    run_together(waiting[:2], portions=lambda _: (2,))
    made = taken(found)
    assert max(float((made[key] - gradient).abs().max()) for key, gradient in expected.items()) > 1e-3


def test_products_of_unlike_shapes_are_not_one() -> None:
    """Sequences of other lengths, and a weight used twice in one micro-batch but once in the other."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 5).double()
    waiting, whole = [Deferred(), Deferred()], torch.zeros(5, 3, dtype=torch.float64)
    for later, length, times in zip(waiting, (4, 6), (2, 1), strict=True):
        for _ in range(times):
            x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
            gradient = torch.randn(2, length, 5, dtype=torch.float64)
            linear(later, 0, x, layer.weight, layer.bias).backward(gradient)
            whole += torch.einsum("bti,btj->ij", gradient, x.detach())
    run_together(waiting, portions=lambda _: (2,))
    assert layer.weight.grad is not None
    assert torch.allclose(layer.weight.grad, whole, rtol=0, atol=1e-12)


def test_a_vector_has_no_rows_to_put_together() -> None:
    layer, waiting = nn.Linear(3, 3), [Deferred(), Deferred()]
    for later in waiting:
        linear(later, 0, torch.ones(3, requires_grad=True), layer.weight).sum().backward()
    run_together(waiting, portions=lambda _: (2,))
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.full((3, 3), 2.0))


@pytest.mark.parametrize("name", CASES)
def test_the_input_half_leaves_out_just_the_weights_of_products(name: str) -> None:
    found, stage, data = whole(name)
    later = Deferred()
    stage(*data, later)[0].backward()
    first = taken(found)
    later.run()
    second = taken(found)
    assert set(second) - set(first) == CASES[name][2]
    later.run()
    assert taken(found) == {}, "a second run has nothing left"


def test_the_input_half_gives_the_gradients_of_the_inputs() -> None:
    found, _, data = whole("images")
    cut = len(found.graph) // 2
    first, second = (
        StageModule(found.ops, found.graph, a, b, parameters=found.parameters, buffers=found.buffers)
        for a, b in ((0, cut), (cut, len(found.graph)))
    )
    gradients: list[list[Tensor]] = []
    with torch.no_grad():
        middle = first(data[0])
    for later in (None, Deferred()):
        inputs = tuple(t.detach().requires_grad_() for t in middle)
        second(inputs, data[1], later)[0].backward()
        gradients.append([t.grad for t in inputs if t.grad is not None])
    assert len(gradients[0]) == len(middle)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_result_that_no_loss_needs_has_no_weight_gradient() -> None:
    unused = nn.Linear(3, 3)
    later = Deferred()
    x = torch.randn(2, 3, requires_grad=True)
    linear(later, 0, x, unused.weight, unused.bias)
    x.sum().backward()
    later.run()
    assert unused.weight.grad is None


def test_like_pytorchs_own_halves() -> None:
    """The input and weight functions of torch.distributed.pipelining give the same gradients."""
    backward = pytest.importorskip("torch.distributed.pipelining._backward")
    found, _, data = whole("images")
    stage = StageModule(
        found.ops, found.graph, 1, len(found.graph), parameters=found.parameters, buffers=found.buffers
    )
    front = StageModule(found.ops, found.graph, 0, 1, parameters=found.parameters, buffers=found.buffers)
    with torch.no_grad():
        middle = front(data[0])
    inputs = tuple(t.detach().requires_grad_() for t in middle)
    loss = stage(inputs, data[1])[0]
    parameters = [p for p in stage.parameters() if p.requires_grad]
    of_inputs, groups = backward.stage_backward_input([loss], None, list(inputs), iter(parameters))
    backward.stage_backward_weight(iter(parameters), groups)
    expected = taken(found)
    again, later = tuple(t.detach().requires_grad_() for t in middle), Deferred()
    stage(again, data[1], later)[0].backward()
    later.run()
    halves = taken(found)
    assert halves.keys() == expected.keys()
    assert all(torch.allclose(halves[k], v, rtol=0, atol=1e-12) for k, v in expected.items())
    assert all(torch.equal(t.grad, g) for t, g in zip(again, of_inputs, strict=True) if t.grad is not None)
