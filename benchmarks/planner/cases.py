"""Random clusters with models to plan for: small ones by family, large ones of few kinds in many sites."""

from __future__ import annotations

import random
from typing import Any

from spanwise.core.cluster import Cluster
from spanwise.core.job import Job
from spanwise.core.model import Layer, ModelGraph, Parameter, TensorSpec
from spanwise.core.profile import DeviceTimes, LayerTimes, Profile, TimeTable
from spanwise.planner import Problem

FAMILIES = ("lan", "wan", "memory-tight")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def chain(layers: int, r: random.Random) -> ModelGraph:
    """Weights grow and activations shrink towards the end, as in convolutional networks."""
    built: list[Layer] = []
    for i in range(layers):
        size = int(200_000 * r.lognormvariate(0, 1) * (0.2 + 2 * i / layers)) // 4 + 1
        width = max(1, int(20_000 * r.lognormvariate(0, 0.5) * (1.5 - i / layers)) // 4)
        flops = r.lognormvariate(0, 0.7) * 4e6
        cut = TensorSpec(name=f"t{i}", shape=(width,), dtype="float32", item_bytes=4)
        built.append(
            Layer(
                name=f"l{i}", ops=(i, i + 1), forward_flops=flops, backward_flops=2 * flops,
                parameters=(Parameter(name=f"w{i}", shape=(size,), bytes=4 * size),),
                outputs=(cut,) if i + 1 < layers else (), saved_bytes=12 * width,
            )
        )  # fmt: skip
    image = TensorSpec(name="x", shape=(3072,), dtype="float32", item_bytes=4, differentiable=False)
    label = TensorSpec(name="y", shape=(), dtype="int64", item_bytes=8, differentiable=False)
    return ModelGraph(
        name="chain", source_digest=f"chain-{layers}", layers=tuple(built), inputs=(image,), labels=(label,)
    )


def profile(graph: ModelGraph, cluster: Cluster, flops_per_s: float) -> Profile:
    """One analytic table, launch + FLOP / speed, and the speed of every device."""
    times = tuple(
        LayerTimes(
            forward_s=tuple(5e-5 + x.forward_flops * y / flops_per_s for y in ROWS),
            backward_s=tuple(1e-4 + x.backward_flops * y / flops_per_s for y in ROWS),
        )
        for x in graph.layers
    )
    table = TimeTable(rows=ROWS, layers=times, update_s_per_byte=1e-10, provenance="analytic")
    factors = tuple(DeviceTimes(device=d.id, factor=1 / d.speed) for d in cluster.devices)
    return Profile(graph_digest=graph.digest, tables=(table,), devices=factors)


def small(family: str, devices: int, seed: int, layers: int = 8, batch: int = 16) -> Problem:
    """One cluster of a family, speeds 1, 2.8, 4 and 10, memories apart by up to 8 times.

    Families: ``lan`` one site of 0.1 or 1 Gbit/s; ``wan`` two sites of 100 Mbit/s, 20 Mbit/s apart;
    ``memory-tight`` either of them where every device holds 15 to 90 % of what the model takes alone.
    """
    r = random.Random(f"{family} {devices} {seed}")
    sites = ["a", "b"] if family == "wan" or (family == "memory-tight" and r.random() < 0.5) else ["a"]
    inside = r.choice(["100 Mbit/s", "1 Gbit/s"]) if len(sites) == 1 else "100 Mbit/s"
    graph = chain(layers, r)
    alone = sum(3 * x.parameter_bytes + 2 * (x.saved_bytes + x.cut_bytes) for x in graph.layers)

    def memory() -> str:
        if family == "memory-tight":
            return f"{int(alone * r.uniform(0.15, 0.9))} B"
        return f"{r.choice([1, 2, 4, 8])} GiB"

    entries: list[dict[str, Any]] = [
        {"id": f"d{i}", "site": r.choice(sites) if i >= len(sites) else sites[i], "memory": memory(),
         "speed": r.choice([1, 2.8, 4, 10]) / 10}
        for i in range(devices)
    ]  # fmt: skip
    links: list[dict[str, Any]] = [{"between": [s, s], "bandwidth": inside, "latency": "1 ms"} for s in sites]
    if len(sites) == 2:
        links.append({"between": sites, "bandwidth": "20 Mbit/s", "latency": "10 ms"})
    data = [e["id"] for e in r.sample(entries, r.randint(1, 2))]
    cluster = Cluster.parse({"name": family, "devices": entries, "links": links, "data": data})
    return problem(graph, cluster, r.choice([2e9, 1e10, 4e10]), batch)


def unlike(devices: int, layers: int, seed: int) -> Problem:
    """Devices of four speeds on two sites, 50 Mbit/s apart; 500 Mbit/s inside."""
    return large(devices, layers, seed, sites=2, speeds=(1.0, 0.5, 0.25, 0.1))


def large(
    devices: int,
    layers: int,
    seed: int,
    *,
    sites: int = 10,
    speeds: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5, 0.25, 0.1),
) -> Problem:
    """Devices of as many kinds as there are speeds, dealt to sites: links are given by pairs of sites."""
    r = random.Random(f"{devices} {layers} {seed}")
    names = [f"s{i}" for i in range(sites)]
    entries: list[dict[str, Any]] = [
        {"id": f"d{i}", "site": names[i % sites], "speed": r.choice(speeds), "memory": "4 GiB"}
        for i in range(devices)
    ]
    links = [
        {"between": [a, b], "bandwidth": "500 Mbit/s" if a == b else "50 Mbit/s",
         "latency": "1 ms" if a == b else "10 ms"}
        for i, a in enumerate(names)
        for b in names[i:]
    ]  # fmt: skip
    data = [e["id"] for e in entries[:1]]
    cluster = Cluster.parse({"name": "large", "devices": entries, "links": links, "data": data})
    return problem(chain(layers, r), cluster, 2e10, 128)


def problem(graph: ModelGraph, cluster: Cluster, flops_per_s: float, batch: int) -> Problem:
    """With SGD without momentum."""
    job = Job.parse({"model": "live", "data": "live", "batch": batch})
    return Problem(graph, profile(graph, cluster, flops_per_s), cluster, job)
