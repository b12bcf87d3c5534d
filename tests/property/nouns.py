"""Strategies for every noun that is also a file: any value its rules allow, sensible or not."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

from hypothesis import strategies as st

from spanwise.core.cluster import EVERYWHERE, Cluster, DataShare, Device, Emulation, Link
from spanwise.core.faults import Fault
from spanwise.core.job import Job, Recipe
from spanwise.core.model import Layer, ModelGraph, Parameter, TensorSpec
from spanwise.core.plan import Plan, Replica, Stage, Wire
from spanwise.core.profile import DeviceTimes, LayerTimes, LinkTimes, Profile, TimeTable
from spanwise.core.program import Action, Program, ProgramFile, RowPayload, SegmentPayload
from spanwise.core.syncs import ServerSync, Sync
from spanwise.core.timeline import DeviceUse, MemoryPoint, Span, Timeline

ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True)
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
counts = st.integers(0, 2**40)
positive = st.floats(1e-9, 1e15)
times = st.floats(0, 1e9)
maybe_rate = st.none() | positive


def tuples(one: st.SearchStrategy[Any], least: int = 0, most: int = 3) -> st.SearchStrategy[Any]:
    return st.lists(one, min_size=least, max_size=most).map(tuple)


devices = st.builds(
    Device, id=ids, site=ids, tier=st.sampled_from(["cloud", "edge", "end"]), torch_device=texts,
    threads=st.integers(1, 64), memory_bytes=st.integers(1, 2**40), speed=positive,
    address=st.none() | texts, up_bytes_per_s=maybe_rate, down_bytes_per_s=maybe_rate,
)  # fmt: skip
links = st.builds(Link, source=ids, target=ids, bandwidth_bytes_per_s=positive, latency_s=times)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    names = draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    sites = draw(st.lists(ids.filter(lambda s: s not in names), min_size=1, max_size=2, unique=True))
    found = [draw(devices).model_copy(update={"id": n, "site": draw(st.sampled_from(sites))}) for n in names]
    ends = sorted({*names, *(device.site for device in found)})
    pairs = draw(st.sets(st.tuples(st.sampled_from(ends), st.sampled_from(ends)), max_size=4))
    joined = [draw(links).model_copy(update={"source": a, "target": b})
              for a, b in sorted(pairs) if a != b or a not in names]  # fmt: skip
    holders = draw(st.lists(st.sampled_from(names), unique=True))
    shares = [DataShare(device=name, share=draw(positive)) for name in holders]
    return Cluster(
        name=draw(ids),
        description=draw(texts),
        devices=tuple(found),
        links=tuple(joined),
        data=draw(st.sampled_from([EVERYWHERE, tuple(shares)])),
        emulation=draw(st.none() | st.builds(Emulation, core_share=st.floats(0.01, 1))),
    )


plain = st.booleans() | st.integers(-(2**40), 2**40) | st.floats(-1e9, 1e9) | texts
recipes = st.builds(
    Recipe, name=texts, args=st.dictionaries(texts, plain | st.lists(plain, max_size=2), max_size=2)
)
factories = recipes.map(lambda recipe: recipe.model_copy(update={"name": "module:function"}))
jobs = st.builds(
    Job, name=texts, model=factories, data=factories, loss=texts, batch=st.integers(1, 10**6),
    optimizer=recipes, scheduler=st.none() | recipes, scheduler_every=st.sampled_from(["epoch", "step"]),
    statistics=st.sampled_from(["batch", "stored"]), trained_share=st.sampled_from([0.25, 1.0]),
    clip_norm=st.none() | positive, epochs=st.none() | st.integers(1, 9), steps=st.none() | st.integers(1, 9),
    seed=st.integers(-9, 9), dtype=st.sampled_from(["float32", "float64", "bfloat16"]), private=st.booleans(),
    share_labels=st.booleans(), data_devices=tuples(texts), checkpoint_every=counts,
    transfer_timeout_s=positive,
)  # fmt: skip

specs = st.builds(
    TensorSpec, name=texts, shape=tuples(st.integers(0, 99)), dtype=texts, item_bytes=st.integers(1, 16),
    differentiable=st.booleans(),
)  # fmt: skip
parameters = st.builds(Parameter, name=texts, shape=tuples(st.integers(0, 99)), bytes=counts)


@st.composite
def graphs(draw: st.DrawFn) -> ModelGraph:
    edges = sorted(draw(st.sets(st.integers(0, 50), min_size=2, max_size=5)))
    layers = [
        Layer(
            name=draw(texts), ops=(a, b), forward_flops=draw(times), backward_flops=draw(times),
            weight_flops=draw(times), deferred_bytes=draw(counts),
            parameters=draw(tuples(parameters)), buffers=draw(tuples(texts)), buffer_bytes=draw(counts),
            outputs=draw(tuples(specs, 1)) if b != edges[-1] else (), saved_bytes=draw(counts),
            saved_fixed_bytes=draw(counts), batch_statistics=draw(st.booleans()),
        )
        for a, b in pairwise(edges)
    ]  # fmt: skip
    return ModelGraph(
        name=draw(texts), source_digest=draw(texts), layers=tuple(layers), inputs=draw(tuples(specs, 1)),
        labels=draw(tuples(specs)),
    )  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> TimeTable:
    rows = sorted(draw(st.sets(st.integers(1, 999), min_size=1, max_size=3)))
    per_layer = st.lists(times, min_size=len(rows), max_size=len(rows)).map(tuple)
    return TimeTable(
        rows=tuple(rows),
        layers=draw(
            tuples(
                st.builds(
                    LayerTimes,
                    forward_s=per_layer,
                    backward_s=per_layer,
                    spread=times,
                    backward_input_s=st.none() | per_layer,
                    backward_weight_s=st.none() | per_layer,
                ),
                1,
            )
        ),
        update_s_per_byte=draw(times),
        message_s=draw(times),
        message_s_per_byte=draw(times),
        sum_s_per_byte=draw(times),
        provenance=draw(st.sampled_from(["measured", "analytic", "fitted"])),
        environment=draw(texts),
    )


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    found = draw(tuples(tables(), 1, 2))
    table = st.integers(0, len(found) - 1)
    names = draw(st.lists(texts, min_size=1, max_size=3, unique=True))
    link = st.builds(LinkTimes, source=texts, target=texts, bandwidth_bytes_per_s=positive, latency_s=times)
    return Profile(
        graph_digest=draw(texts),
        tables=found,
        devices=tuple(DeviceTimes(device=n, table=draw(table), factor=draw(positive)) for n in names),
        links=draw(tuples(link)),
    )


@st.composite
def replicas(draw: st.DrawFn, rows: int) -> tuple[Replica, ...]:
    cuts = draw(st.sets(st.integers(1, rows), max_size=2)) - {rows}
    edges = [0, *sorted(cuts), rows]
    names = draw(st.lists(ids, min_size=len(edges) - 1, max_size=len(edges) - 1, unique=True))
    return tuple(
        Replica(device=name, rows=b - a) for name, a, b in zip(names, edges, edges[1:], strict=False)
    )


@st.composite
def servers(draw: st.DrawFn, start: int, stop: int) -> ServerSync:
    """Of layers ``[start, stop)``."""
    inner = st.sets(st.integers(start, stop), max_size=3).map(lambda found: found - {start, stop})
    pushes, pulls = ((*sorted(draw(inner)), stop) for _ in range(2))
    names = draw(st.lists(ids, min_size=3, max_size=3, unique=True))
    return ServerSync(
        server=names[0], devices=tuple(names[draw(st.integers(0, 1)) :]), start=start, pushes=pushes,
        pulls=pulls, order=draw(st.permutations(range(len(pulls)))), as_aggregated=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    rows = draw(st.integers(1, 32))
    edges = [0, *sorted(draw(st.sets(st.integers(1, 20), min_size=1, max_size=3)))]
    depths = sorted((draw(st.integers(1, 9)) for _ in edges[1:]), reverse=True)
    ranges = tuples(st.tuples(st.integers(0, 9), st.integers(0, 9)), 1)
    micro_batches = draw(st.integers(1, 64))
    # Halves in turn, each micro-batch by itself: other orders are in the tests of schedules.
    order = draw(st.none() | st.just(" ".join(f"F{m} I{m} W{m}" for m in range(micro_batches))))
    wire = st.builds(Wire, source=ids, target=ids, precision=st.sampled_from(["full", "half", "int8"]))
    sync = st.builds(Sync, layers=ranges, devices=tuples(ids, 2), segments=st.integers(1, 9))
    served = [draw(servers(a, b)) for a, b in pairwise(edges) if draw(st.booleans())]
    return Plan(
        strategy=draw(texts), graph_digest=draw(texts), micro_batches=micro_batches,
        micro_batch_rows=rows, sources=draw(replicas(rows)), syncs=(*draw(tuples(sync)), *served),
        wires=draw(tuples(wire)),
        schedule="zero_bubble" if order else draw(st.sampled_from(["gpipe", "1f1b"])),
        stages=tuple(
            Stage(
                start=a, stop=b, replicas=draw(replicas(rows)), warmup=depth, order=order,
                recompute=draw(st.sampled_from([(), ((a, b),), tuple(pairwise(range(a, b)))])),
            )
            for a, b, depth in zip(edges, edges[1:], depths, strict=False)
        ),
    )  # fmt: skip


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    kind = draw(st.sampled_from(["lose", "slow", "cut"]))
    peer = ids if kind == "cut" else st.none() if kind == "lose" else st.none() | ids
    factor = draw(positive) if kind == "slow" else 1.0
    return Fault(kind=kind, device=draw(ids), peer=draw(peer), factor=factor, step=draw(counts))


spans = st.builds(Span, lane=texts, kind=texts, action=texts, start_s=times, end_s=times, step=counts)
timelines = st.builds(
    Timeline, origin=st.sampled_from(["simulated", "measured"]), step_time_s=times, spans=tuples(spans),
    memory=tuples(st.builds(MemoryPoint, device=texts, at_s=times, bytes=counts)),
    devices=tuples(st.builds(DeviceUse, device=texts, busy_s=times, utilization=times,
                             peak_memory_bytes=counts, sent_bytes=counts)),
)  # fmt: skip

COMPUTE = ("forward", "backward", "backward_input", "backward_weight")
ranges = st.tuples(st.integers(0, 999), st.integers(0, 999))
stages = st.integers(0, 99)


def action(kind: Any, **fields: Any) -> Action:
    """Others have their defaults, which hypothesis would make up by the types of a tuple's fields."""
    return Action(kind, **fields)


actions = st.one_of(
    st.just(Action("step")),
    st.builds(action, st.just("load"), micro_batch=stages, rows=ranges),
    st.builds(action, st.sampled_from(COMPUTE), stage=stages, micro_batch=stages,
              rows=ranges),
    st.builds(action, st.just("backward_weight"), stage=stages, micro_batch=stages, rows=ranges,
              layers=st.none() | ranges, at_once=st.integers(1, 9)),
    st.builds(action, st.sampled_from(["send", "recv"]), stage=st.just(-1) | stages, micro_batch=stages,
              rows=ranges, payload=st.sampled_from(get_args(RowPayload)), peer=ids, transfer=counts,
              nbytes=counts),
    st.builds(action, st.sampled_from(["send", "recv"]), payload=st.sampled_from(get_args(SegmentPayload)),
              sync=stages, segment=stages, peer=ids, transfer=counts, nbytes=counts),
    st.builds(action, st.just("update"), sync=stages, segment=stages, nbytes=counts),
    st.builds(action, st.just("reduce"), sync=stages, segment=stages, nbytes=counts, members=tuples(ids, 1)),
    st.builds(action, st.just("norm"), members=tuples(ids, 1)),
)  # fmt: skip
programs = st.builds(
    Program,
    st.dictionaries(ids, tuples(actions), max_size=3),
    st.dictionaries(ids, tuples(texts), max_size=3),
    tuples(tuples(tuples(texts))),
    tuples(tuples(tuples(texts))),
)
program_files = programs.map(ProgramFile.of)

NOUNS: dict[str, st.SearchStrategy[Any]] = {
    "Device": devices, "Link": links, "Cluster": clusters(), "Job": jobs, "ModelGraph": graphs(),
    "Profile": profiles(), "Plan": plans(), "Fault": faults(), "Timeline": timelines,
    "ProgramFile": program_files,
}  # fmt: skip
