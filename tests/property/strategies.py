"""Random models, clusters, profiles and plans that fit together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import strategies as st

from spanwise.core.cluster import Cluster, Device, Link
from spanwise.core.model import Layer, ModelGraph, Parameter, TensorSpec
from spanwise.core.order import order_text
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.core.profile import DeviceTimes, LayerTimes, LinkTimes, Profile, TimeTable
from spanwise.core.syncs import Sync
from spanwise.lowering import natural_syncs
from spanwise.schedules import Hop, StageSeconds, zero_bubble

SECONDS = st.floats(1e-4, 1e-1)


@dataclass(frozen=True, slots=True)
class Case:
    """One plan with everything that it needs; ``clip`` adds the exchange of the gradient norm."""

    graph: ModelGraph
    cluster: Cluster
    profile: Profile
    plan: Plan
    clip: bool


def _tensor(name: str, size: int, item_bytes: int = 4) -> TensorSpec:
    return TensorSpec(
        name=name, shape=(size,), dtype="float32", item_bytes=item_bytes, differentiable=item_bytes == 4
    )


@st.composite
def graphs(draw: st.DrawFn, layers: int) -> ModelGraph:
    """A chain, now and then with skip connections, ties, layers without parameters, integer tensors."""
    tied = draw(st.sets(st.integers(0, layers - 1), max_size=3)) if draw(st.booleans()) else set[int]()
    inputs = (_tensor("x", draw(st.integers(1, 5000))),)
    built: list[Layer] = []
    for i in range(layers):
        parameters = [
            Parameter(name=f"l{i}.p{j}", shape=(size,), bytes=4 * size)
            for j, size in enumerate(draw(st.lists(st.integers(1, 50_000), max_size=2)))
        ]
        if i in tied:
            parameters.append(Parameter(name="tied", shape=(3000,), bytes=12_000))
        outputs = [_tensor(f"t{i}", draw(st.integers(1, 5000)))]
        if draw(st.booleans()):
            outputs.append(_tensor(f"skip{i}", draw(st.integers(1, 2000)), draw(st.sampled_from((4, 8)))))
        built.append(
            Layer(
                name=f"l{i}",
                ops=(i, i + 1),
                forward_flops=1.0,
                backward_flops=2.0,
                parameters=tuple(parameters),
                buffer_bytes=draw(st.sampled_from((0, 64))),
                outputs=tuple(outputs) if i + 1 < layers else (),
                saved_bytes=draw(st.integers(0, 40_000)),
                deferred_bytes=draw(st.sampled_from((0, 3_000, 60_000))),
                saved_fixed_bytes=draw(st.sampled_from((0, 100))),
            )
        )
    labels = (_tensor("y", 1, 8),) if draw(st.booleans()) else ()
    return ModelGraph(name="random", source_digest="0", layers=tuple(built), inputs=inputs, labels=labels)


@st.composite
def clusters(draw: st.DrawFn, devices: int) -> Cluster:
    """One to three sites, every pair of them linked; some pairs of devices, some ports."""
    rates = st.floats(1e5, 1e8)
    latencies = st.sampled_from((0.0, 1e-3, 2e-2))
    sites = [f"s{draw(st.integers(0, 2))}" for _ in range(devices)]
    ports = st.one_of(st.none(), rates)
    found = [
        Device(id=f"d{i}", site=site, up_bytes_per_s=draw(ports), down_bytes_per_s=draw(ports))
        for i, site in enumerate(sites)
    ]
    names = sorted(set(sites))
    links = [
        Link(source=a, target=b, bandwidth_bytes_per_s=draw(rates), latency_s=draw(latencies))
        for a in names
        for b in names
    ]
    pairs = [(a.id, b.id) for a in found for b in found if a is not b]
    chosen = draw(st.sets(st.sampled_from(pairs), max_size=3)) if pairs else set[tuple[str, str]]()
    links += [
        Link(source=a, target=b, bandwidth_bytes_per_s=draw(rates), latency_s=draw(latencies))
        for a, b in sorted(chosen)
    ]
    return Cluster(devices=tuple(found), links=tuple(links))


@st.composite
def profiles(draw: st.DrawFn, graph: ModelGraph, cluster: Cluster) -> Profile:
    """One or two tables; some links measured."""
    tables: list[TimeTable] = []
    for _ in range(draw(st.integers(1, 2))):
        rows = draw(st.sampled_from(((1,), (1, 4), (1, 2, 8))))
        layers: list[LayerTimes] = []
        for _ in graph.layers:
            forward = sorted(draw(SECONDS) for _ in rows)
            backward = tuple(draw(SECONDS) + 2 * s for s in forward)
            halves = draw(st.sampled_from((None, (0.7, 0.4), (1.0, 0.0))))
            layers.append(
                LayerTimes(
                    forward_s=tuple(forward),
                    backward_s=backward,
                    backward_input_s=tuple(halves[0] * b for b in backward) if halves else None,
                    backward_weight_s=tuple(halves[1] * b for b in backward) if halves else None,
                )
            )
        tables.append(
            TimeTable(
                rows=rows,
                layers=tuple(layers),
                update_s_per_byte=draw(st.sampled_from((0.0, 1e-9, 1e-7))),
                message_s=draw(st.sampled_from((0.0, 1e-4))),
                message_s_per_byte=draw(st.sampled_from((0.0, 1e-8))),
                sum_s_per_byte=draw(st.sampled_from((0.0, 1e-8))),
            )
        )
    devices = [
        DeviceTimes(
            device=device, table=draw(st.integers(0, len(tables) - 1)), factor=draw(st.floats(0.2, 5))
        )
        for device in cluster.ids
    ]
    pairs = [(a, b) for a in cluster.ids for b in cluster.ids if a != b]
    chosen = draw(st.sets(st.sampled_from(pairs), max_size=2)) if pairs else set[tuple[str, str]]()
    links = [
        LinkTimes(source=a, target=b, bandwidth_bytes_per_s=draw(st.floats(1e5, 1e8)), latency_s=2e-3)
        for a, b in sorted(chosen)
    ]
    return Profile(
        graph_digest=graph.digest, tables=tuple(tables), devices=tuple(devices), links=tuple(links)
    )


@st.composite
def replicas(draw: st.DrawFn, devices: tuple[str, ...], rows: int) -> tuple[Replica, ...]:
    """Some of the devices in some order, with uneven rows that add up."""
    count = draw(st.integers(1, min(len(devices), rows, 3)))
    chosen = draw(st.permutations(devices))[:count]
    borders = sorted(draw(st.sets(st.integers(1, rows - 1), min_size=count - 1, max_size=count - 1))) if (
        rows > 1
    ) else []  # fmt: skip
    edges = [0, *borders, rows]
    return tuple(
        Replica(device=device, rows=b - a) for device, a, b in zip(chosen, edges, edges[1:], strict=False)
    )


@st.composite
def recomputes(draw: st.DrawFn, start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """No, some or all layers of a stage in ranges that run again."""
    if not draw(st.booleans()):
        return ()
    edges = [start, *(i for i in range(start + 1, stop) if draw(st.booleans())), stop]
    return tuple(pair for pair in pairwise(edges) if draw(st.booleans()))


@st.composite
def plans(draw: st.DrawFn, graph: ModelGraph, cluster: Cluster) -> Plan:
    """One to four stages on any devices, also the same in several; sources anywhere."""
    layers, rows = len(graph), draw(st.integers(1, 6))
    count = draw(st.integers(1, min(layers, 4)))
    cuts = sorted(draw(st.permutations(range(1, layers)))[: count - 1])
    edges = [0, *cuts, layers]
    warmups = sorted((draw(st.integers(1, 7)) for _ in range(count)), reverse=True)
    stages = tuple(
        Stage(
            start=a,
            stop=b,
            replicas=draw(replicas(cluster.ids, rows)),
            warmup=warmup,
            recompute=draw(recomputes(a, b)),
        )
        for a, b, warmup in zip(edges, edges[1:], warmups, strict=False)
    )
    schedule, micro_batches = draw(st.sampled_from(("gpipe", "1f1b", "zero_bubble"))), draw(st.integers(1, 6))
    if schedule == "zero_bubble":
        seconds = [draw(st.builds(StageSeconds, SECONDS, SECONDS, SECONDS)) for _ in stages]
        hops = [draw(st.builds(Hop, SECONDS, SECONDS)) for _ in stages[1:]]
        kept = [warmup + draw(st.integers(0, 3)) for warmup in warmups]
        orders = zero_bubble(
            micro_batches, seconds, hops, hops, ahead=warmups, kept=kept, together=draw(st.integers(1, 3)),
            held_back=draw(st.booleans()),
        )  # fmt: skip
        stages = tuple(
            stage.model_copy(update={"order": order_text(order)})
            for stage, order in zip(stages, orders, strict=True)
        )
    return Plan(
        strategy="random",
        graph_digest=graph.digest,
        micro_batches=micro_batches,
        micro_batch_rows=rows,
        sources=draw(replicas(cluster.ids, rows)),
        stages=stages,
        schedule=schedule,
        syncs=tuple(draw(cut(sync)) for sync in natural_syncs(stages, graph)),
    )


@st.composite
def cut(draw: st.DrawFn, sync: Sync) -> Sync:
    """In a few segments of equal bytes, or at layers."""
    first, stop = sync.layers[0][0], sync.layers[-1][1]
    if stop - first > 1 and draw(st.booleans()):
        inner = draw(st.sets(st.integers(first + 1, stop - 1), max_size=3))
        return sync.model_copy(update={"ends": (*sorted(inner), stop)})
    return sync.model_copy(update={"segments": draw(st.integers(1, 3))})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Everything that a simulation takes."""
    graph = draw(graphs(draw(st.integers(1, 6))))
    cluster = draw(clusters(draw(st.integers(1, 5))))
    return Case(
        graph=graph,
        cluster=cluster,
        profile=draw(profiles(graph, cluster)),
        plan=draw(plans(graph, cluster)),
        clip=draw(st.booleans()),
    )
