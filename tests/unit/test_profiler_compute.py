"""Layer times: complete tables, nothing of the model or of torch changed, sums near the whole."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spanwise.core.errors import InputError
from spanwise.ops.allocator import keep_freed_memory
from spanwise.profiler.compute import LayerBench, measure_layers
from spanwise.profiler.export import Sample
from spanwise.profiler.trace import Traced, trace
from spanwise.zoo import mobilenet_v2


def conv_net() -> nn.Module:
    def block(channels: int, out: int, stride: int) -> nn.Sequential:
        wide = 4 * channels
        return nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True), nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), block(16, 24, 2), block(24, 24, 1), block(24, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 256), nn.ReLU(), nn.Linear(256, 256), nn.Tanh(),
                         nn.Linear(256, 10))  # fmt: skip


SAMPLE = (torch.randn(4, 3, 32, 32),), (torch.randint(10, (4,)),)


def traced(model: nn.Module) -> Traced:
    return trace(model, F.cross_entropy, *SAMPLE, name="model")


def test_table_is_complete_and_leaves_everything_as_it_was() -> None:
    model = conv_net()
    found = traced(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    table = measure_layers(found, rows=(1, 2, 4), threads=1, sample=SAMPLE, repeats=3)
    assert table.rows == (1, 2, 4)
    assert len(table.layers) == len(found.graph)
    assert all(min(layer.forward_s) > 0 and min(layer.backward_s) > 0 for layer in table.layers)
    assert table.update_s_per_byte > 0
    assert table.provenance == "measured"
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_limits() -> None:
    found = traced(mlp())
    assert measure_layers(found, rows=(1, 2, 4, 8), sample=SAMPLE, repeats=3, max_rows=4).rows == (1, 2, 4)
    assert measure_layers(found, rows=(1, 2, 4, 8), sample=SAMPLE, repeats=3, budget_s=0.0).rows == (1, 2)


def test_row_count_that_a_layer_refuses_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    sample = (torch.randn(4, 8),), (torch.randint(5, (4,)),)
    found = trace(model, F.cross_entropy, *sample, name="bn")
    assert measure_layers(found, rows=(1, 2), sample=sample, repeats=3).rows == (2,)
    with pytest.raises(InputError, match="measure with more"):
        measure_layers(found, rows=(1,), sample=sample, repeats=3)


def test_model_without_parameters_to_train() -> None:
    found = traced(mlp().requires_grad_(False))
    table = measure_layers(found, rows=(2,), sample=SAMPLE, repeats=3)
    assert table.update_s_per_byte == 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [mobilenet_v2, mlp])
def test_sum_of_layers_is_the_whole(make: Callable[[], nn.Module]) -> None:
    """Within 10 %, alternating; again if the machine was busy, as that disturbs caches too."""
    torch.manual_seed(0)
    model = make()
    sample = SAMPLE if make is mlp else ((torch.randn(8, 3, 32, 32),), (torch.randint(0, 5, (8,)),))
    traced_model = trace(model, F.cross_entropy, *sample, name="whole")
    bench = LayerBench(traced_model, Sample(*sample), "cpu")
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = bench.rows(16 if make is mlp else 8)
        overhead = sum(bench.overhead()) * len(bench.graph)
        ratios: list[float] = []
        while len(ratios) < 8 and not (ratios and abs(ratios[-1] - 1) < 0.1):
            ratios.append(_ratio(bench, data, overhead))
    finally:
        torch.set_num_threads(threads)
    assert abs(ratios[-1] - 1) < 0.1, ratios


def _ratio(bench: LayerBench, data: Sample, overhead: float) -> float:
    parts = bench.parts(1)
    whole: list[float] = []
    layers: list[float] = []
    for _ in range(7):
        whole.append(sum(map(sum, bench.layer_pass(data, stages=parts))))
        layers.append(sum(map(sum, bench.layer_pass(data))) - overhead)
    return median(layers) / median(whole)
