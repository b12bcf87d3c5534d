"""Scaling, analytic times, the cache on disk, and links from message times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spanwise.core.defaults import default_cluster
from spanwise.core.errors import InputError, ResourceError
from spanwise.core.model import Layer, ModelGraph, Parameter, TensorSpec
from spanwise.core.profile import LayerTimes, TimeTable
from spanwise.profiler.cache import cache_key, cached_table
from spanwise.profiler.network import fit_link
from spanwise.profiler.scale import analytic_table, scaled_profile
from spanwise.profiler.trace import trace

TABLE = TimeTable(rows=(1, 4), layers=(LayerTimes(forward_s=(1.0, 2.0), backward_s=(2.0, 4.0)),) * 2)


def graph() -> ModelGraph:
    crossing = TensorSpec(name="a", shape=(10,), dtype="float32", item_bytes=4)
    weight = Parameter(name="w", shape=(100,), bytes=400)
    return ModelGraph(
        name="m",
        source_digest="d",
        layers=(
            Layer(name="0", ops=(0, 1), forward_flops=100, backward_flops=200, weight_flops=80,
                  parameters=(weight,), outputs=(crossing,), saved_bytes=60),
            Layer(name="1", ops=(1, 2), forward_flops=50, backward_flops=100),
        ),
        inputs=(TensorSpec(name="x", shape=(5,), dtype="float32", item_bytes=4, differentiable=False),),
    )  # fmt: skip


def test_profile_scales_by_speed_and_core_share() -> None:
    cluster = default_cluster()
    profile = scaled_profile(graph(), {1: TABLE}, cluster)
    assert profile.graph_digest == graph().digest
    assert profile.forward_s("cloud", 0, 2, 4) == pytest.approx(2 * 2.0 / 0.65)
    assert profile.forward_s("end-2", 0, 1, 4) == pytest.approx(2.0 / (0.15 * 0.65))
    real = scaled_profile(graph(), {1: TABLE}, cluster.model_copy(update={"emulation": None}))
    assert real.forward_s("edge", 0, 1, 1) == pytest.approx(1.0 / 0.5)


def test_analytic_table_by_arithmetic() -> None:
    table = analytic_table(graph(), flops_per_s=1000.0)
    assert table.provenance == "analytic"
    assert table.forward(0, 1) == pytest.approx(0.1)
    assert table.backward(0, 10) == pytest.approx(2.0)
    assert table.halves(0, 10) == pytest.approx((1.2, 0.8))
    assert table.halves(1, 10) == pytest.approx((1.0, 0.0))
    assert table.forward(1, 7) == pytest.approx(0.35)
    assert table.update_s_per_byte == 0


def test_analytic_table_by_memory() -> None:
    table = analytic_table(graph(), flops_per_s=1e12, bytes_per_s=100.0)
    # weights once; per row the input (20 bytes) and the larger of what leaves (40) and what is kept (60)
    assert table.forward(0, 1) == pytest.approx((400 + 80) / 100)
    assert table.forward(0, 64) == pytest.approx((400 + 64 * 80) / 100)
    assert table.backward(0, 64) == pytest.approx(2 * table.forward(0, 64))
    assert table.update_s_per_byte == pytest.approx(0.05)


def test_cache_measures_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> TimeTable:
        calls.append(1)
        return TABLE

    folder = tmp_path / "deep" / "cache"
    assert cached_table(folder, "key", 2, measure) == TABLE
    assert cached_table(folder, "key", 2, measure) == TABLE
    assert len(calls) == 1
    assert cached_table(folder, "other", 2, measure) == TABLE
    assert len(calls) == 2
    for damage in ("", "{", '{"rows": []}', TABLE.to_json()[:40]):
        (folder / "key.json").write_text(damage)
        assert cached_table(folder, "key", 2, measure) == TABLE
    assert len(calls) == 6
    cached_table(folder, "key", 3, measure)  # of another number of layers
    assert len(calls) == 7
    assert sorted(path.name for path in folder.iterdir()) == ["key.json", "other.json"]


def test_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        cached_table(tmp_path / "file", "key", 2, lambda: TABLE)


def test_cache_key_tells_models_threads_and_precision_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    single = trace(model, F.cross_entropy, (x,), (y,), name="m")
    double = trace(model.double(), F.cross_entropy, (x.double(),), (y,), name="m")
    keys = {
        cache_key(found, device="cpu", threads=threads, rows=rows)
        for found in (single, double)
        for threads in (1, 2)
        for rows in ((1, 2), (1, 2, 4))
    }
    assert len(keys) == 8
    assert cache_key(single, device="cpu", threads=1, rows=(1, 2)) in keys


def test_fit_link_finds_latency_and_rate() -> None:
    samples = [(100, 0.01 + 100 / 5e6), (1_000_000, 0.01 + 1_000_000 / 5e6)]
    latency, rate = fit_link(samples)
    assert latency == pytest.approx(0.01)
    assert rate == pytest.approx(5e6)


def test_fit_link_resists_outliers() -> None:
    rng = random.Random(0)
    samples = [(size, 0.002 + size / 1e7 + rng.random() * 1e-5) for size in (1, 2_000_000) for _ in range(9)]
    samples += [(1, 0.5), (2_000_000, 3.0)]
    latency, rate = fit_link(samples)
    assert latency == pytest.approx(0.002, rel=0.02)
    assert rate == pytest.approx(1e7, rel=0.01)


def test_fit_link_never_gives_negative_latency() -> None:
    assert fit_link([(1000, 0.0001), (2000, 0.0009)])[0] == 0.0


def test_fit_link_refuses_what_tells_nothing() -> None:
    with pytest.raises(InputError, match="two are needed"):
        fit_link([(10, 0.1), (10, 0.2)])
    with pytest.raises(InputError, match="send larger messages"):
        fit_link([(10, 0.1), (20, 0.1)])
