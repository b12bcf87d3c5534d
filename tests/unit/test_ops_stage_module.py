"""StageModule: holds the given objects, refuses what does not fit, keeps nothing alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spanwise.core.errors import InputError
from spanwise.ops.arguments import Ref
from spanwise.ops.opgraph import Op, OpGraph
from spanwise.ops.stage_module import StageModule
from spanwise.profiler.trace import Traced, trace


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.mid(self.embed(x)))))


@pytest.fixture(scope="module")
def traced() -> Traced:
    torch.manual_seed(0)
    return trace(Tied(), F.cross_entropy, (torch.randint(9, (4,)),), (torch.randint(9, (4,)),), name="tied")


def stage(traced: Traced, start: int, stop: int) -> StageModule:
    return StageModule(
        traced.ops, traced.graph, start, stop, parameters=traced.parameters, buffers=traced.buffers
    )


def test_holds_what_its_layers_use_under_own_names(traced: Traced) -> None:
    graph = traced.graph
    assert len(graph) == 3
    assert graph.ties == (("embed.weight", (0, 2)),)
    first, last = stage(traced, 0, 1), stage(traced, 2, 3)
    assert first.parameter_names == ("embed.weight",)
    assert last.parameter_names == ("embed.weight",)
    assert dict(first.named_parameters())["embed.weight"] is traced.parameters["embed.weight"]
    assert dict(first.named_parameters())["embed.weight"] is dict(last.named_parameters())["embed.weight"]
    middle = stage(traced, 1, 2)
    assert set(middle.state_dict()) == {"mid.weight", "mid.bias", *graph.layers[1].buffers} | {
        p.name for p in graph.layers[1].parameters
    }
    whole = stage(traced, 0, 3)
    assert set(whole.parameter_names) == {p.name for p in graph.parameters}
    assert set(whole.buffer_names) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def test_weights_can_be_changed_in_place(traced: Traced) -> None:
    parameters = {k: nn.Parameter(torch.zeros_like(p)) for k, p in traced.parameters.items()}
    module = StageModule(traced.ops, traced.graph, 0, 3, parameters=parameters, buffers=dict(traced.buffers))
    data = (torch.arange(4),), (torch.arange(4),)
    with torch.no_grad():
        assert not torch.equal(module(*data)[1], stage(traced, 0, 3)(*data)[1])
        for name, value in module.named_parameters():
            value.copy_(traced.parameters[name])
    assert torch.equal(module(*data)[1], stage(traced, 0, 3)(*data)[1])


def test_batch_norm_refuses_a_single_value(traced: Traced) -> None:
    with pytest.raises(InputError, match="has 1 value per channel, at least 2"):
        stage(traced, 0, 3)((torch.arange(1),), (torch.arange(1),))


def test_outputs_follow_the_cut(traced: Traced) -> None:
    (crossing,) = stage(traced, 0, 1)((torch.arange(5),))
    (spec,) = traced.graph.layers[0].outputs
    assert tuple(crossing.shape) == (5, *spec.shape)
    assert crossing.dtype is torch.float32
    loss, logits = stage(traced, 1, 3)((crossing,), (torch.arange(5),))
    assert loss.shape == ()
    assert logits.shape == (5, 9)


def test_other_precision(traced: Traced) -> None:
    parameters = {k: nn.Parameter(p.detach().double()) for k, p in traced.parameters.items()}
    buffers = {k: b.double() if b.is_floating_point() else b.clone() for k, b in traced.buffers.items()}
    module = StageModule(traced.ops, traced.graph, 0, 3, parameters=parameters, buffers=buffers)
    assert module((torch.arange(4),), (torch.arange(4),))[0].dtype is torch.float64


def test_wrong_use_is_refused(traced: Traced) -> None:
    ops, graph, p, b = traced.ops, traced.graph, traced.parameters, traced.buffers
    turned = {**p, "mid.weight": nn.Parameter(torch.zeros(2, 6))}
    whole = {**p, "mid.weight": nn.Parameter(torch.zeros(6, 6, dtype=torch.int32), requires_grad=False)}
    far = {**p, "mid.weight": nn.Parameter(torch.zeros(6, 6, device="meta"))}
    without = {k: v for k, v in b.items() if k != "norm.running_var"}
    for start, stop in ((0, 0), (2, 1), (-1, 2), (0, 4)):
        with pytest.raises(InputError, match=r"has layers \[0:3\)"):
            StageModule(ops, graph, start, stop, parameters=p, buffers=b)
    for parameters, buffers, part in (
        (turned, b, r"shape \(2, 6\)"),
        (whole, b, "int32"),
        (far, b, "is on meta"),
        ({}, b, "weight' is missing"),
        (p, without, "'norm.running_var' is missing"),
    ):
        with pytest.raises(InputError, match=part):
            StageModule(ops, graph, 0, 3, parameters=parameters, buffers=buffers)
    other = graph.model_copy(update={"source_digest": "0" * 64})
    with pytest.raises(InputError, match="of one trace"):
        StageModule(ops, other, 0, 3, parameters=p, buffers=b)
    with pytest.raises(InputError, match="takes 1 inputs and 0 labels, got 2 and 0"):
        stage(traced, 0, 1)((torch.arange(4), torch.arange(4)))
    with pytest.raises(InputError, match="takes 1 inputs and 1 labels, got 1 and 0"):
        stage(traced, 2, 3)((torch.zeros(4, 6),))


def test_source_cannot_be_smuggled_in(traced: Traced) -> None:
    bad = Op("relu_9", "aten.relu.default", (Ref("input", "input_0"),), (("x=1)\nimport os#", 1),))
    nodes = (bad, *traced.ops.nodes)
    fields = {name: getattr(traced.ops, name) for name in OpGraph.__dataclass_fields__}
    ops = OpGraph(**{**fields, "nodes": nodes})
    layers = traced.graph.model_copy(update={"source_digest": ops.digest})
    with pytest.raises(InputError, match="no argument name"):
        StageModule(ops, layers, 0, 3, parameters=traced.parameters, buffers=traced.buffers)


class Watch(TorchDispatchMode):
    """Most tensors made inside it that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.alive = [ref for ref in self.alive if ref() is not None]
        if isinstance(out, Tensor):
            self.alive.append(weakref.ref(out))
        self.peak = max(self.peak, len(self.alive))
        return out


def test_dead_values_are_dropped() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = torch.tanh(x)
            return self.last(x)

    sample = (torch.randn(4, 4),), (torch.randint(3, (4,)),)
    module = stage(found := trace(Deep(), F.cross_entropy, *sample, name="deep"), 0, 1)
    assert len(found.ops.nodes) == 22
    gc.collect()
    with torch.no_grad(), Watch() as watch:
        module(*sample)
    assert watch.peak <= 6
