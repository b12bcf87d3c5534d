"""Small chains, clusters and plans whose simulated times one can work out by hand."""

from __future__ import annotations

from spanwise.core.cluster import Cluster
from spanwise.core.faults import Fault
from spanwise.core.model import Layer, ModelGraph, Parameter, TensorSpec
from spanwise.core.order import Op, order_text
from spanwise.core.plan import Plan, Replica, ScheduleName, Stage
from spanwise.core.profile import DeviceTimes, LayerTimes, LinkTimes, Profile, TimeTable
from spanwise.core.timeline import Timeline
from spanwise.lowering import lower, natural_syncs
from spanwise.simulator import simulate

F, B = 3.0, 5.0
FAST = 1e15  # bytes per second: takes no time


def chain(layers: int, *, width: int = 25, parameter_bytes: int = 0, saved: int = 0) -> ModelGraph:
    """Layers that pass ``4 * width`` bytes a row on; 40 bytes of input and 8 of label a row."""
    return ModelGraph(
        name="chain",
        source_digest="0",
        layers=tuple(
            Layer(
                name=f"l{i}", ops=(i, i + 1), forward_flops=1, backward_flops=2, saved_bytes=saved,
                parameters=(Parameter(name=f"w{i}", shape=(1,), bytes=parameter_bytes),)
                if parameter_bytes else (),
                outputs=(TensorSpec(name=f"t{i}", shape=(width,), dtype="float32", item_bytes=4),)
                if i + 1 < layers else (),
            )
            for i in range(layers)
        ),
        inputs=(TensorSpec(name="x", shape=(10,), dtype="float32", item_bytes=4),),
        labels=(TensorSpec(name="y", shape=(), dtype="int64", item_bytes=8, differentiable=False),),
    )  # fmt: skip


def times(
    graph: ModelGraph, cluster: Cluster, *, rows: int = 1, update_s_per_byte: float = 0.0,
    message_s: float = 0.0, message_s_per_byte: float = 0.0, links: tuple[LinkTimes, ...] = (),
    **factors: float,
) -> Profile:  # fmt: skip
    """F and B seconds a layer at ``rows`` rows, linear in rows."""
    table = TimeTable(
        rows=(rows,),
        layers=(LayerTimes(forward_s=(F,), backward_s=(B,)),) * len(graph),
        update_s_per_byte=update_s_per_byte,
        message_s=message_s,
        message_s_per_byte=message_s_per_byte,
    )
    devices = tuple(DeviceTimes(device=d, factor=factors.get(d, 1.0)) for d in cluster.ids)
    return Profile(graph_digest=graph.digest, tables=(table,), devices=devices, links=links)


def switch(count: int, bandwidth: float = FAST, latency: float = 0.0) -> Cluster:
    """Devices a, b, c .. of one site."""
    return Cluster.parse(
        {
            "devices": [{"id": "abcdefghij"[i]} for i in range(count)],
            "links": [{"between": ["site", "site"], "bandwidth": bandwidth, "latency": latency}],
        }
    )


def two(bandwidth: float = FAST, latency: float = 0.0, back: float | None = None) -> Cluster:
    """Devices a and b with a pipe each way."""
    link = {"between": ["a", "b"], "up": bandwidth, "down": back or bandwidth, "latency": latency}
    return Cluster.parse({"devices": [{"id": "a"}, {"id": "b"}], "links": [link]})


def replicas(text: str) -> tuple[Replica, ...]:
    """``"a:2 b:1"`` is 2 rows on a and 1 on b."""
    return tuple(Replica(device=d, rows=int(n)) for d, n in (part.split(":") for part in text.split()))


def make(
    graph: ModelGraph, stages: list[tuple[str, int]], *, sources: str, m: int = 1,
    schedule: ScheduleName = "1f1b", segments: int = 1,
) -> Plan:  # fmt: skip
    """Stages as (replicas, warm-up depth), one layer each, the last the rest."""
    built = tuple(
        Stage(start=i, stop=i + 1 if i + 1 < len(stages) else len(graph), replicas=replicas(text), warmup=k)
        for i, (text, k) in enumerate(stages)
    )
    syncs = tuple(s.model_copy(update={"segments": segments}) for s in natural_syncs(built, graph))
    return Plan(
        strategy="hand",
        graph_digest=graph.digest,
        micro_batches=m,
        micro_batch_rows=built[0].rows,
        sources=replicas(sources),
        stages=built,
        schedule=schedule,
        syncs=syncs,
    )


def run(
    plan: Plan, graph: ModelGraph, profile: Profile, cluster: Cluster, *, clip: bool = False,
    steps: int = 1, faults: tuple[str, ...] = (), copies: int = 1,
) -> Timeline:  # fmt: skip
    program = lower(plan, graph, clip=clip)
    found = tuple(Fault.of(text) for text in faults)
    return simulate(
        program, plan, graph, profile, cluster, steps=steps, faults=found, optimizer_copies=copies
    )


def ends(timeline: Timeline, lane: str, kind: str) -> list[float]:
    return [span.end_s for span in timeline.spans if (span.lane, span.kind) == (lane, kind)]


def sites(bandwidth: float) -> Cluster:
    """a and b at one site, c and d at another, one pipe each way between them; inside takes no time."""
    return Cluster.parse(
        {
            "devices": [{"id": d, "site": s} for d, s in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "y"))],
            "links": [
                {"between": ["x", "y"], "bandwidth": bandwidth},
                {"between": ["x", "x"], "bandwidth": FAST},
                {"between": ["y", "y"], "bandwidth": FAST},
            ],
        }
    )


def in_halves(plan: Plan, orders: tuple[tuple[Op, ...], ...]) -> Plan:
    """The plan as a zero_bubble one, a stage an order."""
    stages = [
        stage.model_copy(update={"order": order_text(order)})
        for stage, order in zip(plan.stages, orders, strict=True)
    ]
    return Plan.parse({**plan.to_data(), "stages": stages, "schedule": "zero_bubble"})
