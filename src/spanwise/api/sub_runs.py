"""Sub-models as runs of their own: each has its graph, its job and a one-stage plan on one device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import TensorDataset

from spanwise.api.planning import choose, predict
from spanwise.api.prepare import Prepared, prepare_live
from spanwise.api.run import TrainOptions, run_job
from spanwise.api.times import profile_prepared
from spanwise.core.cluster import Cluster, DataShare
from spanwise.core.decoupling import Decoupling
from spanwise.core.errors import SpanwiseError
from spanwise.core.job import LIVE, Job, Recipe
from spanwise.core.profile import Profile
from spanwise.decoupler.build import State, sub_model
from spanwise.decoupler.local import loss_of
from spanwise.decoupler.rows import group_rows, relabel, tensors
from spanwise.decoupler.walk import Walked
from spanwise.runtime.feed import Rows
from spanwise.simulator.uploads import Upload, arrivals

if TYPE_CHECKING:
    from spanwise.api.decoupled import DecoupleOptions

Data = tuple[Rows, Rows | None, Rows | None]  # training, test, public


@dataclass(frozen=True)
class Returned:
    """One sub-model after its run: ``state`` is None and ``error`` says why if it never came back.

    Times are of the whole training. ``predicted_arrival_s``: until its weights are at the assembling device.
    """

    group: int
    rows: int
    sent_bytes: int
    predicted_s: float
    predicted_arrival_s: float | None = None
    measured_s: float | None = None
    accuracy: float | None = None
    state: State | None = None
    error: SpanwiseError | None = None


@dataclass(frozen=True)
class SubRun:
    """What one sub-model is trained from."""

    group: int
    cluster: Cluster
    prepared: Prepared
    times: Profile
    sent_bytes: int
    predicted_s: float


def run_apart(
    job: Job,
    cluster: Cluster,
    walked: Walked,
    decoupling: Decoupling,
    data: Data,
    options: DecoupleOptions,
) -> tuple[Returned, ...]:
    """Trains every sub-model; those that fail are returned with their error. Nobody waits for anybody."""
    assembler = options.assembler or cluster.ids[0]
    for group in decoupling.groups:
        cluster.route(str(group.device), assembler)  # a missing link: now, not when all have trained
    runs = [
        prepared_run(job, cluster, walked, decoupling, group, data, options)
        for group in range(len(decoupling.groups))
    ]
    with ThreadPoolExecutor(len(runs) if options.at_once else 1, "sub-model") as pool:
        found = [future.result() for future in [pool.submit(_carried_out, run, options) for run in runs]]
    back = [returned for returned in found if returned.error is None]
    uploads = [Upload(runs[r.group].cluster.ids[0], r.predicted_s, r.sent_bytes) for r in back]
    arrived = dict(zip((r.group for r in back), arrivals(cluster, uploads, assembler), strict=True))
    return tuple(replace(r, predicted_arrival_s=arrived.get(r.group)) for r in found)


def prepared_run(
    job: Job,
    cluster: Cluster,
    walked: Walked,
    decoupling: Decoupling,
    group: int,
    data: Data,
    options: DecoupleOptions,
) -> SubRun:
    """Builds and traces one sub-model, and predicts its run."""
    train, test, public = data
    rows = group_rows(train, decoupling, group, public=public, seed=job.seed)
    model = sub_model(walked, decoupling, group, start=options.start, seed=job.seed)
    live = Recipe(name=LIVE)
    own = job.model_copy(
        update={
            "name": f"{job.name}-{group}", "model": live, "data": live, "loss": LIVE,
            "batch": min(job.batch, len(rows)), "data_devices": (),
        }
    )  # fmt: skip
    own_test = None if test is None else _own(test, decoupling, group)
    prepared = prepare_live(own, model, loss_of(decoupling.loss), rows, own_test)
    alone = cluster_of(cluster, str(decoupling.groups[group].device))
    times = profile_prepared(prepared, alone, options.cache)
    plan, _ = choose(prepared.job, alone, prepared.traced.graph, times, "single")
    timeline = predict(plan, prepared.traced.graph, times, alone, prepared.job)
    steps = _steps(prepared.job, len(rows))
    sent_bytes = _bytes(model, decoupling)
    return SubRun(group, alone, prepared, times, sent_bytes, steps * timeline.step_time_s)


def cluster_of(cluster: Cluster, device: str) -> Cluster:
    """One device of a cluster, with data of its own and nobody to talk to."""
    return cluster.model_copy(
        update={"devices": (cluster.device(device),), "links": (), "data": (DataShare(device=device),)}
    )


def _own(test: Rows, decoupling: Decoupling, group: int) -> TensorDataset:
    x, y = tensors(test)
    own = torch.isin(y, torch.tensor(decoupling.groups[group].classes))
    return TensorDataset(x[own], relabel(y[own], decoupling, group))


def _steps(job: Job, rows: int) -> int:
    limits = [job.steps] if job.steps is not None else []
    if job.epochs is not None or not limits:
        limits.append((job.epochs or 1) * (rows // job.batch))
    return min(limits)


def _bytes(model: nn.Module, decoupling: Decoupling) -> int:
    """Of the weights that come back, running statistics included; frozen layers are known already."""
    frozen = {layer.name for layer in decoupling.net.layers if layer.whole}
    found = (t for key, t in model.state_dict().items() if key.rpartition(".")[0] not in frozen)
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def _carried_out(run: SubRun, options: DecoupleOptions) -> Returned:
    folder = Path(options.run) / f"sub-{run.group}"
    settings = TrainOptions(
        run=folder, strategy="single", prepared=run.prepared, times=None if options.lab else run.times,
        backend=options.backend, lab=options.lab, cache=options.cache,
    )  # fmt: skip
    known = Returned(run.group, len(run.prepared.train), run.sent_bytes, run.predicted_s)
    try:
        outcome = run_job(run.prepared.job, run.cluster, settings)
    except SpanwiseError as error:
        return replace(known, error=error)
    steps = int(outcome.summary["steps"])
    return replace(
        known,
        predicted_s=steps * outcome.predicted.step_time_s,  # in a lab by the device's own pace
        measured_s=steps * outcome.measured.step_time_s,
        accuracy=outcome.summary["accuracy"],
        state=dict(outcome.model.state_dict()),
    )
