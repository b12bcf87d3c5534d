"""Small models and plans that the tests of lowering share; nothing here needs torch."""

from __future__ import annotations

from spanwise.core.model import Layer, ModelGraph, Parameter, TensorSpec
from spanwise.core.plan import Plan, Replica, ScheduleName, Stage
from spanwise.lowering import natural_syncs


def spec(name: str, *shape: int, dtype: str = "float32", item_bytes: int = 4) -> TensorSpec:
    return TensorSpec(
        name=name, shape=shape, dtype=dtype, item_bytes=item_bytes, differentiable=dtype == "float32"
    )


def chain(layers: int, *, tied: tuple[int, int] | None = None) -> ModelGraph:
    """Layer i: parameter ``w{i}`` of 4(i+1) bytes, 8(i+1) a row behind it. ``tied`` ones share ``w-tied``."""
    found: list[Layer] = []
    for index in range(layers):
        parameters = [Parameter(name=f"w{index}", shape=(index + 1,), bytes=4 * (index + 1))]
        if tied is not None and index in tied:
            parameters.append(Parameter(name="w-tied", shape=(10,), bytes=40))
        found.append(
            Layer(
                name=f"l{index}",
                ops=(index, index + 1),
                forward_flops=1,
                backward_flops=2,
                parameters=tuple(parameters),
                outputs=(spec(f"x{index}", 2 * (index + 1)),) if index + 1 < layers else (),
                saved_bytes=16,
            )
        )
    label = spec("label", dtype="int64", item_bytes=8)
    return ModelGraph(
        name="chain", source_digest="0", layers=tuple(found), inputs=(spec("x", 3),), labels=(label,)
    )


def replicas(text: str) -> tuple[Replica, ...]:
    """``"a:3 b:5"`` as replicas."""
    pairs = [word.split(":") for word in text.split()]
    return tuple(Replica(device=device, rows=int(rows)) for device, rows in pairs)


def stage(start: int, stop: int, on: str, warmup: int = 1) -> Stage:
    return Stage(start=start, stop=stop, replicas=replicas(on), warmup=warmup)


def plan(
    graph: ModelGraph,
    *stages: Stage,
    sources: str | None = None,
    micro_batches: int = 2,
    schedule: ScheduleName = "1f1b",
) -> Plan:
    """A plan with natural syncs; the data lies on the replicas of the first stage unless told otherwise."""
    return Plan(
        strategy="test",
        graph_digest=graph.digest,
        micro_batches=micro_batches,
        micro_batch_rows=stages[0].rows,
        sources=stages[0].replicas if sources is None else replicas(sources),
        stages=stages,
        schedule=schedule,
        syncs=natural_syncs(stages, graph),
    )
