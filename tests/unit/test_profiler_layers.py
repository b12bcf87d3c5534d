"""Layers: where models are cut, and what each layer is said to hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spanwise import zoo
from spanwise.core.model import ModelGraph
from spanwise.profiler.trace import Traced, trace


def graph_of(model: nn.Module, *shape: int, classes: int = 10) -> ModelGraph:
    return traced(model, *shape, classes=classes).graph


def traced(model: nn.Module, *shape: int, classes: int = 10) -> Traced:
    sample = (torch.randn(4, *shape),), (torch.randint(classes, (4,)),)
    return trace(model, F.cross_entropy, *sample, name="model")


@pytest.mark.parametrize(("make", "least", "most"), [(zoo.mobilenet_v2, 50, 60), (zoo.resnet18, 18, 22)])
def test_layers_of_known_models(make: Callable[[], nn.Module], least: int, most: int) -> None:
    model = make()
    graph = graph_of(model, 3, 16, 16)
    assert least <= len(graph) <= most
    assert graph.parameter_bytes == 4 * sum(p.numel() for p in model.parameters())
    own = dict(model.named_parameters())
    assert {p.name for p in graph.parameters} == set(own)
    assert all(p.shape == tuple(own[p.name].shape) for p in graph.parameters)
    held = {name for layer in graph.layers for name in layer.buffers}
    assert held == set(dict(model.named_buffers()))
    assert len({layer.name for layer in graph.layers}) == len(graph)
    assert all(layer.name.partition("#")[0] in dict(model.named_modules()) for layer in graph.layers)
    assert max(len(layer.outputs) for layer in graph.layers) == 2  # the skip connection crosses too
    assert graph.layers[0].batch_statistics
    assert not graph.layers[-1].batch_statistics


def test_normalisation_and_activation_stay_with_the_product() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    graph = graph_of(model, 3, 12, 12)
    assert [layer.name for layer in graph.layers] == ["0", "4", "8"]
    first, second, last = graph.layers
    assert [spec.shape for spec in first.outputs] == [(8, 5, 5)]  # behind the pooling: fewest bytes
    assert [spec.shape for spec in second.outputs] == [(8,)]
    assert last.outputs == ()
    assert [p.name for p in first.parameters] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert first.buffer_bytes == 8 * 4 * 2 + 8
    assert first.cut_bytes == first.gradient_cut_bytes == 8 * 5 * 5 * 4


def test_skip_connection_counts_at_the_cut() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.d(x + self.c(torch.tanh(self.b(x))))

    graph = graph_of(Skip(), 8, classes=8)
    assert [len(layer.outputs) for layer in graph.layers] == [1, 2, 1, 0]


def test_detached_values_send_no_gradient() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(self.b(x) * torch.sigmoid(x.detach()))

    first = graph_of(Detached(), 8, classes=8).layers[0]
    assert first.gradient_cut_bytes == 8 * 4
    inner = [
        spec.differentiable for layer in graph_of(Detached(), 8, classes=8).layers for spec in layer.outputs
    ]
    assert all(inner[:1])


def test_frozen_parameters_are_buffers() -> None:
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 8))
    found = traced(model, 8, classes=8)
    assert {p.name for p in found.graph.parameters} == {"2.weight", "2.bias"}
    assert found.graph.layers[0].buffers == ("0.weight", "0.bias")
    assert found.buffers["0.weight"] is model[0].weight
    assert not found.graph.layers[0].outputs[0].differentiable
    assert found.graph.layers[1].backward_flops < 2 * found.graph.layers[1].forward_flops


def test_position_table_is_tied_between_its_users() -> None:
    class Shared(nn.Module):
        """A value of parameters alone is no reason not to cut: whoever needs it recomputes it."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 8))
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            bias = torch.tanh(self.table)
            return self.c(self.b(self.a(x) + bias) + bias)

    assert graph_of(Shared(), 8, classes=8).ties == (("table", (0, 1)),)


def test_rows_that_meet_are_noticed() -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b((x @ x.t()) @ x)

    assert any(layer.batch_statistics for layer in graph_of(Gram(), 8, classes=8).layers)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    assert not any(layer.batch_statistics for layer in graph_of(plain, 8, classes=8).layers)


def test_saved_bytes_are_those_of_the_whole_model() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )  # fmt: skip
    graph = graph_of(model, 3, 12, 12)
    rows = 6
    saved = sum(layer.saved_bytes * rows + layer.saved_fixed_bytes for layer in graph.layers)
    assert saved == _kept(model, torch.randn(rows, 3, 12, 12), torch.randint(10, (rows,)))
    # by hand: conv saves its input, BatchNorm its input and two statistics
    assert graph.layers[0].saved_bytes == 4 * (3 * 12 * 12 + 8 * 10 * 10)
    assert graph.layers[0].saved_fixed_bytes == 4 * 2 * 8


def _kept(model: nn.Module, x: Tensor, y: Tensor) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_extra_outputs_do_not_forbid_cuts() -> None:
    class Talkative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            seen: list[Tensor] = []
            for layer in self.layers:
                x = torch.tanh(layer(x))
                seen.append(x)
            return (x, *seen)

    sample = (torch.randn(4, 8),), (torch.randint(8, (4,)),)
    found = trace(Talkative(), lambda out, y: F.cross_entropy(out[0], y), *sample, name="model")
    assert len(found.graph) == 6
    assert len(found.ops.outputs) == 1


def test_mask_of_the_data_crosses_the_cuts() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            scale = 1.0 - mask.to(x.dtype)
            return self.c(self.b(self.a(x) * scale) * scale)

    inputs = torch.randn(4, 8), torch.randint(2, (4, 8))
    labels = (torch.randint(8, (4,)),)
    graph = trace(Masked(), F.cross_entropy, inputs, labels, name="model").graph
    assert [spec.dtype for spec in graph.inputs] == ["float32", "int64"]
    crossing = graph.layers[0].outputs
    assert [spec.differentiable for spec in crossing] in ([False, True], [True, False], [True])
    assert len(graph) == 3
