"""``decouple``: a classifier divided by classes, its sub-models trained apart, harvested and merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from spanwise.api.sub_runs import Returned, run_apart
from spanwise.core.cluster import Cluster
from spanwise.core.decoupling import Decoupling, Loss, Negatives, ReadOut, Sharing
from spanwise.core.errors import InputError
from spanwise.core.job import Job
from spanwise.core.run_folder import RunFolder
from spanwise.cost.sub_models import sub_model_flops, sub_model_parameters, target_flops
from spanwise.cost.training import optimizer_copies
from spanwise.decoupler.build import Start
from spanwise.decoupler.local import accuracy, class_profiles, finetune
from spanwise.decoupler.merge import Form, Merged, merge
from spanwise.decoupler.rows import class_counts, tensors
from spanwise.decoupler.walk import Walked, walk
from spanwise.lab import Lab
from spanwise.planner.decouple import (
    clustered_groups,
    decoupled,
    equal_groups,
    equal_shares,
    most_share,
    owned_groups,
    rows_per_epoch,
    shares_by_speed,
)
from spanwise.runtime.checkpoint import save_weights
from spanwise.runtime.feed import Rows
from spanwise.runtime.imports import build, data_sets

Groups = int | Mapping[str, Sequence[int]] | Sequence[Sequence[int]]
Shares = Literal["speed", "equal"] | Sequence[float]
Backend = Literal["processes", "threads"]

_SAMPLE_ROWS = 2


@dataclass(frozen=True)
class DecoupleOptions:
    """How to divide, train and merge.

    Attributes:
        run: the folder to write.
        groups: how many, equally large; or devices with the classes whose samples they own; or class lists,
            for the devices of the cluster in order. A group for every device without.
        clustered: with a number of groups: classes whose activations in the job's model are alike together.
        shares: of the widths: by the ``speed`` and memory of the devices, ``equal``, or numbers.
        negatives: what sub-models see of foreign classes, and ``public`` the data set for that policy.
        shared: so many first layers stay whole, frozen as they are in the job's model. (``averaged`` ones are
            for ``decoupler.local`` only: sub-models that train as runs of their own do not talk.)
        start: fresh weights, or the blocks of the job's model.
        loss, read_out, form: see Decoupling and ``decoupler.merge``.
        tune_epochs: of a fine-tuning of the merged network on all data, which makes it a dense one.
        assembler: the device that merges; the cluster's first without.
        at_once: whether sub-models train at the same time, as on real devices; in turn, they do not disturb
            each other where one machine emulates all devices.
        backend, lab, cache: as in ``spanwise.train``.
        model, data, test: live objects in place of those that the job names.
    """

    run: Path = Path("runs/latest")
    groups: Groups | None = None
    clustered: bool = False
    shares: Shares = "speed"
    negatives: Negatives = field(default_factory=Negatives)
    public: Rows | None = None
    shared: int = 0
    sharing: Sharing = "frozen"
    start: Start = "fresh"
    loss: Loss = "softmax"
    read_out: ReadOut | None = None
    form: Form = "auto"
    tune_epochs: int = 0
    assembler: str | None = None
    at_once: bool = False
    backend: Backend = "processes"
    lab: Lab | None = None
    cache: Path | None = None
    model: nn.Module | None = None
    data: Rows | None = None
    test: Rows | None = None


@dataclass(frozen=True)
class Decoupled:
    """What came of it: the merged network and what is missing in it. ``summary`` is ``summary.json``."""

    decoupling: Decoupling
    merged: Merged
    returned: tuple[Returned, ...]
    summary: dict[str, Any]


def run_decoupled(job: Job, cluster: Cluster, options: DecoupleOptions) -> Decoupled:
    """Divides, trains every sub-model as a run of its own on its device, merges, and writes the folder.

    Raises:
        InputError: the job is no classification, the model does not divide, or options do not go together.
        InfeasibleError: the devices have no memory for the sub-models.
        PeerError: no device came back; one that is lost costs its classes only.
    """
    model, train, test = _objects(job, options)
    refuse_private(job, options.negatives)
    if options.sharing == "averaged" and options.shared:
        raise InputError(
            "decoupling: averaged first layers need rounds of messages, and sub-models that train as runs of "
            "their own send none; freeze them, or use spanwise.decoupler.local.fit_with_averages"
        )
    if options.at_once and options.lab is not None:
        raise InputError(
            "decoupling: sub-models take turns in a lab, as setting one up eases the CPU shares of all; "
            "leave out at_once"
        )
    sample = tensors(train)[0][:_SAMPLE_ROWS]
    walked = walk(model, sample.to(getattr(torch, job.dtype)), shared=options.shared)
    decoupling = divide(job, cluster, walked, model, train, options)
    folder = RunFolder.create(options.run)
    job.save(folder.job)
    cluster.save(folder.cluster)
    decoupling.save(folder.decoupling)
    returned = run_apart(job, cluster, walked, decoupling, (train, test, options.public), options)
    states = {r.group: r.state for r in returned if r.state is not None}
    if not states:
        raise returned[0].error or InputError("decoupling: no sub-model came back")
    merged = merge(walked, decoupling, states, form="dense" if options.tune_epochs else options.form)
    summary = _summary(job, cluster, decoupling, merged, returned, options)
    if test is not None:
        summary |= _accuracies(walked, decoupling, merged, states, test)
    if options.tune_epochs:
        finetune(merged, train, job.model_copy(update={"epochs": options.tune_epochs, "steps": None}))
        summary["tuned_accuracy"] = None if test is None else accuracy(merged.module, test)
    dense = merged if merged.form == "dense" else merge(walked, decoupling, states, form="dense")
    save_weights(folder.weights, dict(dense.module.state_dict()))
    folder.write_json(folder.summary, summary)
    return Decoupled(decoupling, merged, returned, summary)


def parse_negatives(text: str) -> Negatives:
    """Negatives as on the command line: ``none``, ``all`` or ``pool:20``."""
    policy, _, count = text.partition(":")
    if policy not in ("none", "all", "pool") or (policy == "pool") != count.isdigit():
        raise InputError(f"negatives '{text}': must be none, all, or pool:SAMPLES like pool:20")
    return Negatives.parse({"policy": policy} | ({"per_class": int(count)} if count else {}))


def parse_owners(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Owners as on the command line: ``cam-1=0,3`` for each device."""
    owners: dict[str, tuple[int, ...]] = {}
    for text in texts:
        device, _, classes = text.partition("=")
        if not all(part.isdigit() for part in classes.split(",")) or device in owners:
            raise InputError(f"owner '{text}': write each device once, with its classes, like cam-1=0,3")
        owners[device] = tuple(int(part) for part in classes.split(","))
    return owners


def parse_shares(text: str) -> Shares:
    """Shares as on the command line: ``speed``, ``equal`` or ``0.5,0.3,0.2``."""
    if text == "speed" or text == "equal":
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"shares '{text}': must be speed, equal, or numbers like 0.5,0.3,0.2") from None


def refuse_private(job: Job, negatives: Negatives) -> None:
    """``InputError`` where negatives would be samples that must not leave their device."""
    if job.private and negatives.policy in ("pool", "all"):
        raise InputError(
            f"decoupling: negatives '{negatives.policy}' means that {negatives.privacy}, but raw samples "
            "must not leave their devices (private = true); use 'public' negatives, or 'none', which costs "
            "much accuracy where there are several groups"
        )


def divide(
    job: Job, cluster: Cluster, walked: Walked, model: nn.Module, train: Rows, options: DecoupleOptions
) -> Decoupling:
    """Groups, devices and shares."""
    classes = walked.net.classes
    counts = class_counts(tensors(train)[1], classes)
    devices, groups = _groups(cluster, walked, model, train, options)
    for device in devices:
        cluster.device(device)
    given: dict[str, Any] = {"negatives": options.negatives, "loss": options.loss, "sharing": options.sharing}
    if options.read_out is not None:
        given["read_out"] = options.read_out
    shares: Any = options.shares
    if shares == "equal":
        shares = equal_shares(len(groups))
    elif shares == "speed":
        rows = rows_per_epoch(decoupled(walked.net, groups, **given), counts)
        found = [cluster.device(d) for d in devices]
        copies = optimizer_copies(job.optimizer)
        caps = [most_share(walked.net, d.memory_bytes, rows=job.batch, copies=copies) for d in found]
        shares = shares_by_speed([d.speed for d in found], rows, caps)
    return decoupled(walked.net, groups, shares, devices=devices, **given)


def _groups(
    cluster: Cluster, walked: Walked, model: nn.Module, train: Rows, options: DecoupleOptions
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    wanted, classes = options.groups, walked.net.classes
    if isinstance(wanted, Mapping):
        return owned_groups(wanted, classes)
    if wanted is None or isinstance(wanted, int):
        count = len(cluster.ids) if wanted is None else wanted
        groups = equal_groups(classes, count)
        if options.clustered:
            groups = clustered_groups(class_profiles(model, walked.head, train, classes), count)
    else:
        groups = tuple(tuple(group) for group in wanted)
    if len(groups) > len(cluster.ids):
        raise InputError(
            f"decoupling: {len(groups)} groups for the {len(cluster.ids)} devices of '{cluster.name}'; each "
            "trains one sub-model: make fewer groups, or add devices"
        )
    return cluster.ids[: len(groups)], groups


def _objects(job: Job, options: DecoupleOptions) -> tuple[nn.Module, Rows, Rows | None]:
    if job.loss != "cross_entropy":
        raise InputError(
            f"decoupling: loss '{job.loss}': only classifications by class number divide; use 'cross_entropy'"
        )
    torch.manual_seed(job.seed)  # pyright: ignore[reportUnknownMemberType]
    model = options.model or build(job.model.name, job.model.args, "model")
    train, test = options.data, options.test
    if train is None:
        train, test = data_sets(build(job.data.name, job.data.args, "data"))
    return model.to(getattr(torch, job.dtype)), train, test


def _summary(
    job: Job, cluster: Cluster, decoupling: Decoupling, merged: Merged, returned: Sequence[Returned],
    options: DecoupleOptions,
) -> dict[str, Any]:  # fmt: skip
    whole = target_flops(decoupling.net)
    devices: dict[str, Any] = {}
    for found in returned:
        flops = sub_model_flops(decoupling, found.group)
        group = decoupling.groups[found.group]
        devices[str(group.device)] = {
            "classes": list(group.classes),
            "share": group.share,
            "rows_per_epoch": found.rows,
            "parameters": sub_model_parameters(decoupling, found.group),
            "flops_per_sample": flops.total,
            "flops_per_epoch": flops.total * found.rows,
            "saving_per_sample": whole.total / flops.total,
            "sent_bytes": found.sent_bytes,
            "predicted_s": found.predicted_s,
            "predicted_arrival_s": found.predicted_arrival_s,
            "measured_s": found.measured_s,
            "accuracy_own_classes": found.accuracy,
            "lost": "" if found.error is None else str(found.error),
        }
    arrived = [r.predicted_arrival_s for r in returned if r.predicted_arrival_s is not None]
    measured = [r.measured_s for r in returned if r.measured_s is not None]
    return {
        "strategy": "decoupled",
        "cluster": cluster.name,
        "decoupling": decoupling.digest,
        "negatives": decoupling.negatives.policy,
        "privacy": decoupling.negatives.privacy,
        "assembler": options.assembler or cluster.ids[0],
        "target_flops_per_sample": whole.total,
        "all_flops_per_sample": sum(d["flops_per_sample"] for d in devices.values()),
        "epochs": job.epochs or 1,
        "predicted": {"seconds": max(arrived, default=None)},
        "measured": {"seconds": max(measured, default=None)},
        "devices": devices,
        "missing_classes": list(merged.missing),
        "form": merged.form,
    }


def _accuracies(
    walked: Walked, decoupling: Decoupling, merged: Merged, states: Mapping[int, Any], test: Rows
) -> dict[str, Any]:
    plain = decoupling.model_copy(update={"read_out": "plain"})
    return {
        "accuracy": accuracy(merged.module, test),
        "accuracy_without_read_out": accuracy(merge(walked, plain, states, form="branches").module, test),
    }
