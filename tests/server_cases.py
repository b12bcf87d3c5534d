"""Plans over a parameter server, and clusters on which their steps are those of the planner's formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spanwise.core.cluster import Cluster
from spanwise.core.model import Layer, ModelGraph, Parameter, TensorSpec
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.core.profile import DeviceTimes, LayerTimes, Profile, TimeTable
from spanwise.core.syncs import ServerSync
from spanwise.planner.segments.chain import Cuts, Exchange

NS = 1e-9


def server_plan(
    graph: ModelGraph, rows: dict[str, int], sync: ServerSync, *, micro_batches: int = 1,
    sources: tuple[Replica, ...] = (), **more: Any,
) -> Plan:  # fmt: skip
    """All layers on all devices, in stages cut wherever a push or pull ends."""
    replicas = tuple(Replica(device=d, rows=n) for d, n in rows.items())
    ends = sorted({*sync.pushes, *sync.pulls})
    stages = tuple(Stage(start=a, stop=b, replicas=replicas) for a, b in zip((0, *ends), ends, strict=False))
    return Plan.parse(
        {
            "strategy": "test", "graph_digest": graph.digest, "micro_batches": micro_batches,
            "micro_batch_rows": sum(rows.values()), "sources": sources or replicas, "stages": stages,
            "syncs": [sync], **more,
        }
    )  # fmt: skip


def served(
    devices: Sequence[str], cuts: Cuts, *, server: str = "s", order: Sequence[int] | None = None
) -> ServerSync:
    """A server of all layers; with an ``order`` it sends what is aggregated, else all after all pushes."""
    return ServerSync(
        server=server, devices=tuple(devices), pushes=cuts.push, pulls=cuts.pull,
        order=tuple(range(len(cuts.pull)) if order is None else order), as_aggregated=order is not None,
    )  # fmt: skip


def exchange_graph(exchange: Exchange) -> ModelGraph:
    """Layers with the bytes of an exchange whose messages take a nanosecond a byte."""
    layers = len(exchange.layer_bytes)
    return ModelGraph(
        name="exchange",
        source_digest="0",
        layers=tuple(
            Layer(
                name=f"l{i}", ops=(i, i + 1), forward_flops=1, backward_flops=2,
                parameters=(Parameter(name=f"w{i}", shape=(nbytes,), bytes=nbytes),),
                outputs=(TensorSpec(name=f"t{i}", shape=(1,), dtype="float32", item_bytes=4),)
                if i + 1 < layers else (),
            )
            for i, nbytes in enumerate(exchange.layer_bytes)
        ),
        inputs=(TensorSpec(name="x", shape=(1,), dtype="float32", item_bytes=4),),
    )  # fmt: skip


def exchange_profile(exchanges: Sequence[Exchange], graph: ModelGraph, **costs: float) -> Profile:
    """One row a device: the compute of its exchange; the server's takes no time."""
    tables = [
        TimeTable(
            rows=(1,),
            layers=tuple(
                LayerTimes(forward_s=(f * NS,), backward_s=(b * NS,))
                for f, b in zip(own.pull.compute_ns, own.push.compute_ns, strict=True)
            ),
            **costs,
        )
        for own in exchanges
    ]
    devices = [DeviceTimes(device=f"d{i}", table=i) for i in range(len(exchanges))]
    return Profile(
        graph_digest=graph.digest, tables=tuple(tables), devices=(*devices, DeviceTimes(device="s", table=0))
    )


def star(count: int, bandwidth: float = 1 / NS, latency: float = 0.0, **more: Any) -> Cluster:
    """Devices d0, d1, ... each with a link of its own to the server s; the data is everywhere."""
    names = [f"d{i}" for i in range(count)]
    return Cluster.parse(
        {
            "devices": [{"id": d} for d in (*names, "s")],
            "links": [{"between": [d, "s"], "bandwidth": bandwidth, "latency": latency} for d in names],
            "data": "everywhere", **more,
        }
    )  # fmt: skip
