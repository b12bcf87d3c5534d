"""Synthetic models, profiles, clusters and jobs for the planner's tests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations

from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError
from spanwise.core.job import Job
from spanwise.core.model import Layer, ModelGraph, Parameter, TensorSpec
from spanwise.core.plan import Plan
from spanwise.core.profile import DeviceTimes, LayerTimes, Profile, TimeTable
from spanwise.planner import Problem
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.build import Depth, build
from spanwise.planner.plans.trial import timeline

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def make_graph(
    layers: int, seed: int = 0, *, activation: int = 20_000, parameters: int = 200_000, inputs: int = 12_288
) -> ModelGraph:
    """A chain with more parameters and smaller activations towards the end, as convolutional nets have."""
    r = random.Random(seed)
    out: list[Layer] = []
    for i in range(layers):
        size = int(parameters * r.lognormvariate(0, 1) * (0.2 + 2 * i / layers)) // 4 + 1
        width = max(1, int(activation * r.lognormvariate(0, 0.5) * (1.5 - i / layers)) // 4)
        flops = r.lognormvariate(0, 0.7) * 4e6
        spec = TensorSpec(name=f"t{i}", shape=(width,), dtype="float32", item_bytes=4)
        out.append(
            Layer(
                name=f"l{i}", ops=(i, i + 1), forward_flops=flops, backward_flops=2 * flops,
                parameters=(Parameter(name=f"w{i}", shape=(size,), bytes=4 * size),),
                outputs=(spec,) if i + 1 < layers else (), saved_bytes=12 * width,
            )
        )  # fmt: skip
    return ModelGraph(
        name=f"chain-{layers}",
        source_digest=str(seed),
        layers=tuple(out),
        inputs=(TensorSpec(name="x", shape=(inputs // 4,), dtype="float32", item_bytes=4),),
        labels=(TensorSpec(name="y", shape=(), dtype="int64", item_bytes=8, differentiable=False),),
    )


def make_profile(
    graph: ModelGraph, cluster: Cluster, *, flops_per_s: float = 2e10, launch_s: float = 5e-5,
    update_s_per_byte: float = 1e-10, message_s: float = 0.0,
) -> Profile:  # fmt: skip
    """One analytic table: launch + flops / speed."""
    layers = tuple(
        LayerTimes(
            forward_s=tuple(launch_s + x.forward_flops * y / flops_per_s for y in ROWS),
            backward_s=tuple(2 * launch_s + x.backward_flops * y / flops_per_s for y in ROWS),
        )
        for x in graph.layers
    )
    table = TimeTable(
        rows=ROWS, layers=layers, update_s_per_byte=update_s_per_byte, message_s=message_s,
        provenance="analytic",
    )  # fmt: skip
    factors = tuple(DeviceTimes(device=d.id, factor=1 / d.speed) for d in cluster.devices)
    return Profile(graph_digest=graph.digest, tables=(table,), devices=factors)


def make_job(batch: int = 16, **options: object) -> Job:
    """SGD without momentum on named factories that nobody imports."""
    return Job.parse({"model": "m:f", "data": "m:d", "batch": batch, **options})


def make_cluster(devices: int, seed: int, *, memory: str = "1 GiB") -> Cluster:
    """Speeds 1, 2.8, 4, 10; in turn LAN 100 Mbit/s, LAN 1 Gbit/s, two sites 20 Mbit/s apart."""
    r = random.Random(seed)
    sites = ["a", "b"] if seed % 3 == 2 else ["a"]
    entries = [
        {"id": f"d{i}", "site": sites[i * len(sites) // devices], "speed": r.choice([1, 2.8, 4, 10]) / 10,
         "memory": memory}
        for i in range(devices)
    ]  # fmt: skip
    inside = "1 Gbit/s" if seed % 3 == 1 else "100 Mbit/s"
    links: list[dict[str, object]] = [
        {"between": [s, s], "bandwidth": inside, "latency": "1 ms"} for s in sites
    ]
    if len(sites) == 2:
        links.append({"between": sites, "bandwidth": "20 Mbit/s", "latency": "10 ms"})
    data = r.sample([e["id"] for e in entries], r.randint(1, 2))
    return Cluster.parse({"devices": entries, "links": links, "data": data})


def make_problem(devices: int, layers: int, seed: int, batch: int = 16, **options: object) -> Problem:
    """A random problem of that size."""
    cluster = make_cluster(devices, seed)
    graph = make_graph(layers, seed)
    speed = random.Random(seed).choice([2e9, 1e10, 4e10])
    profile = make_profile(graph, cluster, flops_per_s=speed)
    return Problem(graph, profile, cluster, make_job(batch, **options))


def group_sequences(devices: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every sequence of disjoint, not empty groups; devices may be left out."""
    for count in range(1, len(devices) + 1):
        for head in combinations(devices, count):
            yield (head,)
            rest = tuple(d for d in devices if d not in head)
            yield from ((head, *tail) for tail in group_sequences(rest))


def fastest_of_all(problem: Problem) -> tuple[float, Plan]:
    """Exhaustive search by simulation: all groups, cuts, micro-batch counts and both warm-up rules."""
    layers = len(problem.graph)
    best: tuple[float, Plan] | None = None
    depths: tuple[Depth, ...] = ("deep", "shallow")
    for groups in group_sequences(tuple(range(len(problem.cluster.devices)))):
        for cuts in combinations(range(1, layers), len(groups) - 1):
            edges = (0, *cuts, layers)
            spans = tuple(Span(a, b, g) for a, b, g in zip(edges, edges[1:], groups, strict=False))
            for m in problem.micro_batch_choices():
                for depth in depths if len(groups) > 1 else depths[:1]:
                    try:
                        plan = build(problem, "exhaustive", Outline(m, spans), depth=depth)
                        seconds = timeline(problem, plan).step_time_s
                    except InfeasibleError:
                        continue
                    if best is None or seconds < best[0]:
                        best = (seconds, plan)
    assert best is not None
    return best
