"""Chains of convolutions, norms and ReLUs whose operations are known, without torch."""

from __future__ import annotations

import random

from spanwise.core.cluster import Cluster
from spanwise.core.importance import Importance, ParameterScore
from spanwise.core.model import Kept, Layer, ModelGraph, Parameter, Site, TensorSpec


def conv_chain(layers: int, seed: int = 0, *, width: int = 8, pixels: int = 64) -> ModelGraph:
    """Layer i: a convolution of 1 x 1 with a norm and a ReLU; some without norm or bias, the last linear."""
    r = random.Random(seed)
    out: list[Layer] = []
    channels, number, storage = 3, 0, 0
    for i in range(layers):
        last = i + 1 == layers
        into, made = channels, r.randint(2, width)
        size = pixels if not last else 1
        pixels = max(1, pixels // r.choice([1, 1, 2]))
        weight, norm = f"w{i}", not last and r.random() < 0.8
        parameters = [Parameter(name=weight, shape=(made, into), bytes=4 * made * into)]
        shift = f"b{i}" if r.random() < 0.7 or norm else ""
        if shift:
            parameters.append(Parameter(name=shift, shape=(made,), bytes=4 * made))

        def site(kind: str, **more: object) -> Site:
            nonlocal number
            sources = (number - 1,) if number else ()
            number += 1
            return Site.model_validate({"kind": kind, "sources": sources, **more})

        given = Kept(storage=storage, row_bytes=4 * into * size)
        sites = [
            site(
                "linear" if last else "conv", weight=weight, shift="" if norm else shift, channels=into,
                kept=(given,), elements=made * pixels, input_bytes=4 * into * size,
                output_bytes=4 * made * pixels,
            )
        ]  # fmt: skip
        if norm:
            x = Kept(storage=storage + 1, row_bytes=4 * made * pixels)
            own = (
                x,
                Kept(storage=storage + 2, fixed_bytes=4 * made),
                Kept(storage=storage + 3, fixed_bytes=4 * made),
            )
            sites.append(
                site(
                    "norm", weight=f"g{i}", shift=shift, channels=made, kept=own, elements=made * pixels,
                    input_bytes=4 * made * pixels, output_bytes=4 * made * pixels,
                )
            )  # fmt: skip
            parameters.append(Parameter(name=f"g{i}", shape=(made,), bytes=4 * made))
        storage += 4
        if not last and r.random() < 0.8:
            sites.append(
                site(
                    "relu",
                    elements=made * pixels,
                    input_bytes=4 * made * pixels,
                    output_bytes=4 * made * pixels,
                )
            )
        if last:
            sites.append(site("other", kept=(Kept(storage=storage, row_bytes=4 * made, fixed_bytes=4),)))
        channels = made
        out.append(
            Layer(
                name=f"l{i}", ops=(i, i + 1), forward_flops=1e5 * made, backward_flops=2e5 * made,
                weight_flops=1e5 * made, parameters=tuple(parameters),
                outputs=() if last else (
                    TensorSpec(name=f"t{i}", shape=(made, pixels), dtype="float32", item_bytes=4),
                ),
                saved_bytes=sum(k.row_bytes for s in sites for k in s.kept), sites=tuple(sites),
            )
        )  # fmt: skip
    return ModelGraph(
        name="convs", source_digest=str(seed), layers=tuple(out),
        inputs=(TensorSpec(name="x", shape=(3, 64), dtype="float32", item_bytes=4),),
        labels=(TensorSpec(name="y", shape=(), dtype="int64", item_bytes=8, differentiable=False),),
    )  # fmt: skip


def scores(graph: ModelGraph, seed: int = 0, *, stored: bool = True) -> Importance:
    """Random ones, some below zero."""
    r = random.Random(f"scores {seed}")
    found: list[ParameterScore] = []
    for parameter in graph.parameters:
        count = graph.sliceable.get(parameter.name, (0, 0))[1]
        channels = tuple(r.uniform(-0.2, 1) for _ in range(count)) if count else None
        total = sum(channels) if channels else r.uniform(-0.2, 1)
        found.append(ParameterScore(parameter=parameter.name, score=total, channels=channels))
    return Importance(graph_digest=graph.digest, stored_statistics=stored, scores=tuple(found))


def unequal(budgets: dict[str, int], **more: object) -> Cluster:
    """Devices that differ in memory only; all have the data."""
    return Cluster.parse(
        {
            "devices": [{"id": d, "site": "lan", "memory": b} for d, b in budgets.items()],
            "links": [{"between": ["lan", "lan"], "bandwidth": "10 Mbit/s", "latency": "1 ms"}],
            "data": "everywhere",
            **more,
        }
    )
