"""The equality ladder's common part: random plans, and plain PyTorch on the same micro-batch slices."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from spanwise.core.cluster import Cluster
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.order import order_text
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.lowering import lower, natural_syncs
from spanwise.profiler.trace import Traced, trace
from spanwise.runtime import optimize
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.feed import Sampler
from spanwise.schedules import Hop, StageSeconds, zero_bubble

DEVICES = ("a", "b", "c", "d")


@dataclass(frozen=True)
class Case:
    """A model, its loss and data, and the job around them."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Tensor]
    data: Callable[[], TensorDataset]
    batch: int = 12
    optimizer: tuple[tuple[str, Any], ...] = (("name", "SGD"), ("lr", 0.05), ("momentum", 0.9))
    clip_norm: float | None = None
    dtype: str = "float64"
    slice_rows: int = 1  # least rows of a replica: batch statistics over few rows amplify rounding
    steps: int = 5

    def job(self, **changes: Any) -> Job:
        data = {
            "model": "live", "data": "live", "loss": "live", "batch": self.batch, "dtype": self.dtype,
            "optimizer": dict(self.optimizer), "clip_norm": self.clip_norm, "transfer_timeout_s": 30.0,
        }  # fmt: skip
        return Job.parse({k: v for k, v in (data | changes).items() if v is not None})


def cluster(sources: tuple[str, ...] = ("a",), **more: Any) -> Cluster:
    """Four devices on one switch; ``data = "everywhere"`` goes before ``sources``."""
    return Cluster.parse(
        {
            "name": "four",
            "devices": [{"id": d, "site": "lab"} for d in DEVICES],
            "links": [{"between": ["lab", "lab"], "bandwidth": "1 Gbit/s", "latency": "0.1 ms"}],
            "data": list(sources),
            **more,
        }
    )


def traced(case: Case, seed: int = 0) -> tuple[nn.Module, Traced]:
    torch.manual_seed(seed)
    model = case.model().to(getattr(torch, case.dtype)).train()
    x, y = case.data().tensors
    x = x[:4].to(getattr(torch, case.dtype)) if x.is_floating_point() else x[:4]
    return model, trace(model, case.loss, (x,), (y[:4],), name=case.name)


_TRACED: dict[str, tuple[nn.Module, Traced]] = {}


def of(case: Case) -> tuple[nn.Module, Traced]:
    """The same, traced once for all tests."""
    key = f"{case.name} {case.dtype}"
    if key not in _TRACED:
        _TRACED[key] = traced(case)
    return _TRACED[key]


def random_plan(
    graph: ModelGraph, batch: int, seed: int, *, same_slices: bool = False, least: int = 1
) -> Plan:
    """1 to 4 stages, uneven rows, devices that hold two stages, sources elsewhere, any warm-up and schedule,
    some layers run again.

    With ``same_slices`` all stages cut a micro-batch at the same rows, as batch statistics need.
    """
    rng = random.Random(seed)
    count = rng.randint(1, min(4, len(graph)))
    cuts = sorted(rng.sample(range(1, len(graph)), count - 1))
    bounds = [0, *cuts, len(graph)]
    divisors = [m for m in range(1, batch + 1) if batch % m == 0 and batch // m >= 2 * least]
    micro_batches = rng.choice(divisors)
    rows = batch // micro_batches
    pool = DEVICES
    names = [f"n{i}" for i in range(rng.randint(1, min(len(pool), rows // least, 3)))]
    sizes = [replica.rows for replica in deal(rng, names, rows, least)]
    stages: list[Stage] = []
    warmup = rng.randint(count, 2 * count)
    for start, stop in pairwise(bounds):
        devices = rng.sample(pool, len(sizes) if same_slices else rng.randint(1, min(len(pool), rows, 3)))
        replicas = deal(rng, devices, rows)
        if same_slices:
            replicas = tuple(Replica(device=d, rows=n) for d, n in zip(devices, sizes, strict=True))
        stages.append(Stage(start=start, stop=stop, replicas=replicas, warmup=warmup))
        warmup = max(1, warmup - rng.randint(0, 2))
    sources = deal(rng, rng.sample(pool, rng.randint(1, min(2, rows, len(pool)))), rows)
    schedule = rng.choice(["1f1b", "gpipe", "zero_bubble"])
    if schedule == "zero_bubble":
        stages = halved(rng, stages, micro_batches)
    stages = recomputing(random.Random(f"recompute {seed}"), stages)
    return plan_of(graph, tuple(stages), sources, micro_batches, schedule, rng.choice([1, 1, 3]))


def halved(rng: random.Random, stages: Sequence[Stage], micro_batches: int) -> list[Stage]:
    """The stages with orders that a scheduler made for random seconds."""
    seconds = [StageSeconds(rng.random(), rng.random(), rng.random()) for _ in stages]
    hops = [[Hop(rng.random(), rng.random()) for _ in stages[1:]] for _ in range(2)]
    ahead = [stage.warmup for stage in stages]
    kept = [depth + rng.randint(0, 2) for depth in ahead]
    together = rng.choice([1, 2, micro_batches])
    orders = zero_bubble(micro_batches, seconds, *hops, ahead=ahead, kept=kept, together=together)
    return [s.model_copy(update={"order": order_text(o)}) for s, o in zip(stages, orders, strict=True)]


def recomputing(rng: random.Random, stages: Sequence[Stage]) -> list[Stage]:
    """The stages, about half of them with ranges of layers that run again in backward."""
    out: list[Stage] = []
    for stage in stages:
        edges = [
            stage.start,
            *(i for i in range(stage.start + 1, stage.stop) if rng.random() < 0.5),
            stage.stop,
        ]
        ranges = tuple(pair for pair in pairwise(edges) if rng.random() < 0.7)
        out.append(stage.model_copy(update={"recompute": ranges}) if rng.random() < 0.5 else stage)
    return out


def plan_of(
    graph: ModelGraph, stages: tuple[Stage, ...], sources: tuple[Replica, ...], micro_batches: int,
    schedule: str = "1f1b", segments: int = 1,
) -> Plan:  # fmt: skip
    return Plan.parse(
        {
            "strategy": "test", "graph_digest": graph.digest, "micro_batches": micro_batches,
            "micro_batch_rows": stages[0].rows, "sources": sources, "stages": stages, "schedule": schedule,
            "syncs": [
                sync.model_copy(update={"segments": segments}) for sync in natural_syncs(stages, graph)
            ],
        }
    )  # fmt: skip


def deal(rng: random.Random, devices: list[str], rows: int, least: int = 1) -> tuple[Replica, ...]:
    """Uneven rows, at least ``least`` each."""
    spare = rows - least * len(devices)
    marks = sorted(rng.randint(0, spare) for _ in devices[1:])
    sizes = [least + b - a for a, b in zip([0, *marks], [*marks, spare], strict=False)]
    return tuple(Replica(device=d, rows=n) for d, n in zip(devices, sizes, strict=True))


def assignment(case: Case, traced_model: Traced, plan: Plan, machines: Cluster | None = None) -> Assignment:
    machines = machines or cluster(tuple(s.device for s in plan.sources))
    program = lower(plan, traced_model.graph, clip=case.clip_norm is not None)
    rows = len(case.data())
    return Assignment(case.job(), machines, traced_model.graph, traced_model.ops, plan, program, rows)


def reference(
    case: Case, model: nn.Module, work: Assignment, steps: int, *, ignore_rows: bool = False
) -> tuple[dict[str, Tensor], list[float]]:
    """Plain PyTorch: the same rows, micro-batch by micro-batch, in the slices of the last stage's replicas.

    Batch statistics depend on the slices, so every replica boundary of every stage is honoured by running
    the finest common slices when the model has none, and whole stage slices otherwise.
    """
    model = copy.deepcopy(model)
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    job = work.job
    optimizer = optimize.make_optimizer(job.optimizer, parameters)
    sampler, data = work.sampler, case.data()
    losses: list[float] = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        indices = batch_indices(work, sampler, step)
        for m in range(work.plan.micro_batches):
            x, y = (t[indices[m]] for t in data.tensors)
            x = x.to(getattr(torch, case.dtype)) if x.is_floating_point() else x
            for _, a, b in work.plan.stages[0].row_ranges():
                share = 1.0 / len(work.plan.stages[0].replicas) / work.plan.micro_batches
                weight = share if ignore_rows else (b - a) / work.plan.batch
                loss = case.loss(model(x[a:b]), y[a:b]) * weight
                loss.backward()
                total += float(loss.detach())
        losses.append(total)
        if case.clip_norm is not None:
            nn.utils.clip_grad_norm_(list(parameters.values()), case.clip_norm)
        optimizer.step()
    return {k: p.detach() for k, p in model.named_parameters()}, losses


def batch_indices(work: Assignment, sampler: Sampler, step: int) -> list[Tensor]:
    """Data indices of every micro-batch of a step, sources in order."""
    parts = []
    for number, source in enumerate(work.plan.sources):
        held = work.held_by(source.device)
        parts.append(held[sampler.indices(number, step)])
    return [torch.cat([part[m] for part in parts]) for m in range(work.plan.micro_batches)]


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all parameters, relative to the size of the expected value where that is above one."""
    assert found.keys() == expected.keys()
    return max(float(((found[k] - v).abs() / v.abs().clamp(min=1.0)).max()) for k, v in expected.items())
