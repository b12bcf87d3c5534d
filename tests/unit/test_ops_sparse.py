"""Layers that keep only what the trained parameters need: the same gradients, exactly the predicted bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spanwise.core.errors import InputError
from spanwise.core.model import ModelGraph
from spanwise.cost.sparse import sparse_saved_bytes
from spanwise.ops.arguments import Ref
from spanwise.ops.opgraph import Op
from spanwise.ops.sparse import Place, Places, Slice, Sparse
from spanwise.ops.stage_module import StageModule
from spanwise.profiler.trace import Traced, trace
from spanwise.zoo import mobilenet_v2

Chosen = dict[str, "int | None"]


class Branches(nn.Module):
    """A projection beside a chain, so that order alone does not tell what needs a gradient; stock pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.long = nn.Sequential(
            nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU6(),
        )  # fmt: skip
        self.short = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2), nn.BatchNorm2d(12, affine=False))
        self.head = nn.Sequential(
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 4, 16), nn.GELU(), nn.Linear(16, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.long(x) + self.short(x)))


class Shared(nn.Module):
    """Results of products, norms and activations that several read: nobody may overwrite these."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        product = self.first(x)
        norm = self.norms[0](product)
        active = F.relu6(norm) + F.relu(product)
        again = F.relu(self.norms[1](self.second(active)))
        both = self.norms[2](self.second(again)) + again + norm
        return self.head(F.relu(both).mean((2, 3)))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "branches": (Branches, 8),
    "shared": (Shared, 5),
    "mobilenet": (lambda: mobilenet_v2(num_classes=5, width=0.25), 16),
}
_TRACED: dict[str, tuple[nn.Module, Traced, tuple[Tensor, Tensor]]] = {}


def traced(name: str) -> tuple[nn.Module, Traced, tuple[Tensor, Tensor]]:
    if name not in _TRACED:
        torch.manual_seed(0)
        make, size = MODELS[name]
        model = make().double()
        x, y = torch.randn(4, 3, size, size, dtype=torch.float64), torch.randint(5, (4,))
        with torch.no_grad():  # statistics that are not those of a first step
            model.train()
            for _ in range(3):
                model(x + torch.randn_like(x))
        _TRACED[name] = (model, trace(model, F.cross_entropy, (x,), (y,), name=name), (x, y))
    return _TRACED[name]


def selection(graph: ModelGraph, seed: int, *, least: float = 0.0) -> Chosen:
    """Random parameters, about half of the weights that can be taken apart by some of their channels."""
    rng = random.Random(seed)
    share = max(rng.random(), least)
    out: Chosen = {}
    for parameter in graph.parameters:
        if rng.random() < share:
            _, channels = graph.sliceable.get(parameter.name, (0, 0))
            out[parameter.name] = (
                rng.randint(1, channels - 1) if channels > 1 and rng.random() < 0.5 else None
            )
    return out


def sparse(found: Traced, chosen: Mapping[str, int | None], *, stored: bool, packed: bool = False) -> Sparse:
    """Sets which parameters want gradients, and makes leaves of random channels."""
    slices: dict[str, Slice] = {}
    for name, parameter in found.parameters.items():
        parameter.grad = None
        count = chosen.get(name, 0)
        parameter.requires_grad_(count is None)
        if count:
            dimension, channels = found.graph.sliceable[name]
            index = torch.randperm(channels, generator=torch.Generator().manual_seed(count))[:count]
            slices[name] = Slice(nn.Parameter(parameter.detach().index_select(dimension, index)), index)
    return Sparse(slices, stored_statistics=stored, packed_masks=packed)


def stage(found: Traced, how: Sparse | None, start: int = 0, stop: int | None = None) -> StageModule:
    return StageModule(
        found.ops, found.graph, start, len(found.graph) if stop is None else stop,
        parameters=found.parameters, buffers=found.buffers, sparse=how,
    )  # fmt: skip


def dense_gradients(model: nn.Module, data: tuple[Tensor, Tensor], *, stored: bool) -> dict[str, Tensor]:
    """Plain PyTorch; statistics are left as they were."""
    kept = {name: value.clone() for name, value in model.named_buffers()}
    names = [name for name, _ in model.named_parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train(not stored)
    found = torch.autograd.grad(F.cross_entropy(model(data[0]), data[1]), list(model.parameters()))
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.copy_(kept[name])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_what_trains_are_the_dense_ones(name: str, stored: bool) -> None:
    model, found, data = traced(name)
    expected = dense_gradients(model, data, stored=stored)
    everything: Chosen = dict.fromkeys(found.parameters)
    halves: Chosen = {
        k: found.graph.sliceable[k][1] // 2 if k in found.graph.sliceable and at % 2 else None
        for at, k in enumerate(k for k in everything if found.graph.sliceable.get(k, (0, 2))[1] > 1)
    }
    for number, chosen in enumerate([everything, halves, *(selection(found.graph, s) for s in range(3))]):
        before = {k: b.clone() for k, b in found.buffers.items()}
        how = sparse(found, chosen, stored=stored, packed=number % 2 == 1)
        loss = stage(found, how)(data[:1], data[1:])[0]
        if chosen:
            loss.backward()
        for key, parameter in found.parameters.items():
            if key in how.slices:
                dimension, _ = found.graph.sliceable[key]
                own = how.slices[key]
                wanted = expected[key].index_select(dimension, own.index)
                assert torch.allclose(own.values.grad, wanted, rtol=0, atol=1e-12), key
                assert own.values.grad.shape == own.values.shape
            if key in chosen and key not in how.slices:
                assert torch.allclose(parameter.grad, expected[key], rtol=0, atol=1e-12), key
            else:
                assert parameter.grad is None, f"{key} is frozen"
        same = all(torch.equal(b, before[k]) for k, b in found.buffers.items())
        assert same == stored, "stored statistics stay, those of a batch are counted"
        for key, value in found.buffers.items():
            value.copy_(before[key])


def hooked(found: Traced, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps, parameters and buffers aside, each storage once."""
    held = {t.untyped_storage().data_ptr() for t in (found.parameters | found.buffers).values()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in held)


@pytest.mark.parametrize("name", MODELS)
def test_predicted_bytes_are_those_that_hooks_see(name: str) -> None:
    """In total for random selections, layer by layer for some; stock layers keep more."""
    _, found, data = traced(name)
    layers, rows, more = len(found.graph), len(data[0]), 0
    for seed in range(24):
        stored, packed = seed % 2 == 0, seed % 3 == 0
        chosen = selection(found.graph, seed)
        how = sparse(found, chosen, stored=stored, packed=packed)
        module = stage(found, how)
        expected = sparse_saved_bytes(found.graph, 0, layers, rows, chosen, stored=stored, packed=packed)
        assert hooked(found, lambda m=module: m(data[:1], data[1:])[0]) == sum(expected), (seed, chosen)
        if all(count is None for count in chosen.values()) or seed < 4:
            for slice_ in how.slices:
                found.parameters[slice_].requires_grad_(True)
            stock = stage(found, None)
            more += hooked(found, lambda m=stock: m(data[:1], data[1:])[0]) > sum(expected)
    assert more >= 3, "negative control: stock layers keep more than the formula says"


@pytest.mark.parametrize("name", MODELS)
def test_predicted_bytes_of_each_layer(name: str) -> None:
    """Each as a stage of its own, behind layers that train."""
    _, found, data = traced(name)
    chosen = selection(found.graph, 5, least=0.5)
    rows = len(data[0])
    tensors: tuple[Tensor, ...] = data[:1]
    for index, layer in enumerate(found.graph.layers):
        how = sparse(found, chosen, stored=True)
        one = stage(found, how, index, index + 1)
        specs = found.graph.cut_before(index)
        inputs = tuple(
            t.detach().requires_grad_(index > 0 and s.differentiable)
            for t, s in zip(tensors, specs, strict=True)
        )
        (expected,) = sparse_saved_bytes(found.graph, index, index + 1, rows, chosen, stored=True)
        outputs: list[tuple[Tensor, ...]] = []
        seen = hooked(found, lambda m=one, i=inputs, o=outputs: o.append(m(i, data[1:])) or i[0])
        assert seen == expected, layer.name
        tensors = outputs[0]


def test_layers_that_run_again_are_refused() -> None:
    _, found, _ = traced("branches")
    with pytest.raises(InputError, match="choose one"):
        StageModule(
            found.ops, found.graph, 0, 2, parameters=found.parameters, buffers=found.buffers,
            recompute=((0, 1),), sparse=Sparse(),
        )  # fmt: skip


CONVOLUTIONS = {
    "stride": ("conv2d", (2, 5, 7, 7), (4, 5, 3, 3), (2, 1), 1, 1, 1),
    "dilated": ("conv2d", (2, 4, 7, 6), (3, 4, 2, 3), 1, (1, 2), (1, 2), 1),
    "depthwise": ("conv2d", (2, 5, 6, 6), (5, 1, 3, 3), 2, 1, 1, 5),
    "line": ("conv1d", (2, 4, 9), (3, 4, 3), 2, 1, 1, 1),
    "point": ("conv2d", (2, 5, 3, 2), (4, 5, 1, 1), 1, 0, 1, 1),
    "point on a line": ("conv1d", (2, 4, 3), (3, 4, 1), 1, 0, 1, 1),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_numerical_gradients_of_odd_channels(case: str) -> None:
    kind, x_shape, w_shape, stride, padding, dilation, groups = CONVOLUTIONS[case]
    torch.manual_seed(0)
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(w_shape, dtype=torch.float64)
    bias = torch.randn(w_shape[0], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([3, 0])
    dimension = 0 if groups > 1 else 1

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        # Channels of the weight follow the leaf, as they do after every step of an optimizer.
        whole = weight.index_copy(dimension, index, values.detach())
        leaf = Sparse({"w": Slice(values, index)})  # pyright: ignore
        node = Op("c", f"aten.{kind}.default", (Ref("input", "x"), Ref("parameter", "w")))
        function = leaf.function(node, Place())
        assert function is not None
        return function(x, whole, bias, stride, padding, dilation, groups)

    values = weight.index_select(dimension, index).requires_grad_(True)
    assert torch.autograd.gradcheck(run, (x, values, bias))


@pytest.mark.parametrize("packed", [False, True])
def test_masks_pass_the_gradient_where_stock_ones_do(packed: bool) -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 5.9, 6.0, 7.0, 3.0, 1.0, 2.0], dtype=torch.float64)
    for op, args, stock in (
        ("aten.relu.default", (), F.relu), ("aten.relu6.default", (), F.relu6),
        ("aten.hardtanh.default", (-1.0, 2.0), lambda t: F.hardtanh(t, -1.0, 2.0)),
    ):  # fmt: skip
        function = Sparse(packed_masks=packed).function(Op("r", op, (Ref("input", "x"),)), Place())
        assert function is not None
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        result, expected = function(ours, *args), stock(theirs)
        assert torch.equal(result, expected)
        result.sum().backward()
        expected.sum().backward()
        assert torch.equal(ours.grad, theirs.grad), op


def test_only_what_one_operation_reads_is_overwritten() -> None:
    """And of that only what its maker keeps nothing of: not the result of an addition, nor what leaves."""

    def op(name: str, kind: str, *reads: str) -> Op:
        return Op(name, f"aten.{kind}", tuple(Ref("input" if r == "x" else "node", r) for r in reads))

    nodes = [
        op("alone", "conv2d.default", "x"), op("normed", "batch_norm.default", "alone"),
        op("clamped", "relu.default", "normed"), op("twice", "conv2d.default", "clamped"),
        op("one", "relu.default", "twice"), op("other", "relu.default", "twice"),
        op("sum", "add.Tensor", "one", "other"), op("behind", "relu.default", "sum"),
        op("last", "conv2d.default", "behind"), op("out", "relu.default", "last"),
    ]  # fmt: skip
    places = Places(nodes, (Ref("node", "last"), Ref("node", "out")))
    found = {node.name: places.of(node) for node in nodes}
    assert [name for name, place in found.items() if place.own_input] == ["normed", "clamped"]
    assert [name for name, place in found.items() if place.own_gradient] == [
        "alone", "normed", "clamped", "sum", "behind",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["batch_norm", "relu6"])
def test_a_place_that_may_be_overwritten_is(kind: str) -> None:
    """The same results and gradients in the memory of the input and of the result's gradient."""
    torch.manual_seed(0)
    leaf, gradient = (torch.randn(3, 4, 5, dtype=torch.float64) * 5 for _ in range(2))
    gamma, beta, mean, var = torch.rand(4, 4, dtype=torch.float64).add(0.5).unbind()
    node = Op("r", f"aten.{kind}.default", (Ref("input", "x"),))

    def run(place: Place, *, scale_trains: bool = False) -> tuple[bool, bool, list[Tensor]]:
        function = Sparse(stored_statistics=True).function(node, place)
        assert function is not None
        ends = [t.clone().requires_grad_() for t in (leaf, beta)]
        x, given = ends[0] * 1, gradient.clone()
        scale = gamma.clone().requires_grad_(scale_trains)
        others = (scale, ends[1], mean, var, True, 0.1, 1e-5, True) if kind == "batch_norm" else ()
        result = function(x, *others)
        wanted = (*ends[: 2 if others else 1], *[scale] * scale_trains)
        found = torch.autograd.grad(result, wanted, given)
        return result.data_ptr() == x.data_ptr(), not torch.equal(given, gradient), [result, *found]

    expected = run(Place())
    assert expected[:2] == (False, False)
    for place in (Place(own_input=True), Place(own_gradient=True), Place(True, True)):
        into, back, values = run(place)
        assert (into, back) == (place.own_input, place.own_gradient)
        assert all(torch.equal(a, b) for a, b in zip(values, expected[2], strict=True))
    if kind == "batch_norm":
        assert not run(Place(True, True), scale_trains=True)[0], "its gradient needs the input"
