"""What is compared: training whole, apart and merged, one narrow net, and averaging whole models."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tasks import Sets, Task, fresh
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from spanwise.core.decoupling import Decoupling, Negatives
from spanwise.cost.sub_models import TrainingFlops, sub_model_flops, target_flops
from spanwise.decoupler.build import he, sub_model
from spanwise.decoupler.local import Fit, accuracy, loss_of, predict
from spanwise.decoupler.merge import merge
from spanwise.decoupler.rows import class_counts, group_rows
from spanwise.decoupler.walk import Walked, walk
from spanwise.planner.decouple import decoupled, equal_groups, rows_per_epoch, shares_by_speed

Cell = dict[str, Any]


def walked(model: str, task: Task, sets: Sets, seed: int) -> Walked:
    """The target of a task."""
    return walk(fresh(model, task.classes, seed), sets[0].tensors[0][:2], name=model)


def central(model: str, task: Task, sets: Sets, seed: int) -> Cell:
    """The target on all data."""
    target = walked(model, task, sets, seed)
    flops = target_flops(target.net)
    start = time.perf_counter()
    net = fresh(model, task.classes, seed)
    losses = Fit(net, F.cross_entropy, sets[0], task.job(seed)).run()
    return {
        "accuracy": accuracy(net, sets[1]), "loss": losses[-1], **_compute(flops, len(sets[0]), task.epochs),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def divided(
    target: Walked, task: Task, sets: Sets, groups: int, negatives: Negatives, speeds: Sequence[float] = ()
) -> Decoupling:
    """Neighbouring classes together; equal shares, or such that devices of these speeds need equal times."""
    classes = equal_groups(task.classes, groups)
    if not speeds:
        return decoupled(target.net, classes, negatives=negatives)
    counts = class_counts(sets[0].tensors[1], task.classes)
    rows = rows_per_epoch(decoupled(target.net, classes, negatives=negatives), counts)
    return decoupled(target.net, classes, shares_by_speed(speeds, rows), negatives=negatives)


def apart(
    model: str, task: Task, sets: Sets, seed: int, groups: int, negatives: Negatives,
    speeds: Sequence[float] = (),
) -> Cell:  # fmt: skip
    """Sub-models trained apart, then merged."""
    target = walked(model, task, sets, seed)
    decoupling = divided(target, task, sets, groups, negatives, speeds)
    start = time.perf_counter()
    states: dict[int, dict[str, Tensor]] = {}
    devices: list[Cell] = []
    for group in range(groups):
        rows = group_rows(sets[0], decoupling, group, seed=seed)
        net = sub_model(target, decoupling, group, seed=seed)
        Fit(net, loss_of(decoupling.loss), rows, task.job(seed)).run()
        states[group] = net.state_dict()
        flops = sub_model_flops(decoupling, group)
        devices.append(
            {
                "share": decoupling.groups[group].share,
                **_compute(flops, len(rows), task.epochs),
                "sent_bytes": sum(t.numel() * t.element_size() for t in states[group].values()),
            }
        )
    seconds = time.perf_counter() - start
    scores = {form: _scores(target, decoupling, states, sets[1], form) for form in ("branches", "dense")}
    whole = target_flops(target.net)
    found: Cell = {
        "negatives": negatives.policy, "devices": devices, "seconds": seconds,
        "accuracy": _accuracy(scores["branches"], sets[1]),
        "largest_difference_of_forms": float((scores["branches"] - scores["dense"]).abs().max()),
        "least_saving_per_sample": whole.total / max(d["flops_per_sample"] for d in devices),
        "saving_per_sample": whole.total / min(d["flops_per_sample"] for d in devices),
        "saving_in_all": whole.total * task.epochs * len(sets[0]) / min(d["flops"] for d in devices),
        "saving_over_devices": whole.total / sum(d["flops_per_sample"] for d in devices),
    }  # fmt: skip
    for read_out in ("probability", "plain") if decoupling.other else ():
        other = decoupling.model_copy(update={"read_out": read_out})
        found[f"accuracy_{read_out}"] = _accuracy(
            _scores(target, other, states, sets[1], "branches"), sets[1]
        )
    return found


def single_width(model: str, task: Task, sets: Sets, seed: int, groups: int) -> Cell:
    """One net as narrow as a sub-model, for all classes, on all data: what a device could have by itself."""
    target = walked(model, task, sets, seed)
    decoupling = divided(target, task, sets, groups, Negatives())
    net = sub_model(target, decoupling, 0, seed=seed)
    narrow: Any = net.get_submodule(target.head)
    head = nn.Linear(narrow.in_features, task.classes)
    torch.manual_seed(seed)
    he(head)
    net.set_submodule(target.head, head)
    start = time.perf_counter()
    Fit(net, F.cross_entropy, sets[0], task.job(seed)).run()
    more = 2.0 * narrow.in_features * (task.classes - narrow.out_features)
    flops = sub_model_flops(decoupling, 0) + TrainingFlops(more, more, more)
    return {
        "accuracy": accuracy(net, sets[1]), **_compute(flops, len(sets[0]), task.epochs),
        "saving_per_sample": target_flops(target.net).total / flops.total,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def fedavg(model: str, task: Task, sets: Sets, seed: int, groups: int) -> Cell:
    """Whole models, each on its own classes for an epoch, averaged by rows; Adam begins anew every round.

    McMahan, Moore, Ramage, Hampson, Agueera y Arcas, "Communication-efficient learning of deep networks from
    decentralized data", AISTATS 2017, algorithm 1.
    """
    start = time.perf_counter()
    x, y = sets[0].tensors
    net = fresh(model, task.classes, seed)
    owned = [torch.isin(y, torch.tensor(group)) for group in equal_groups(task.classes, groups)]
    data = [TensorDataset(x[own], y[own]) for own in owned]
    job = task.job(seed, 1).model_copy(update={"scheduler": None})
    for number in range(task.rounds):
        sums: dict[str, Tensor] = {}
        for rows in data:
            client = copy.deepcopy(net)
            Fit(client, F.cross_entropy, rows, job.model_copy(update={"seed": seed * 1000 + number})).run()
            for key, value in client.state_dict().items():
                part = value.double() * (len(rows) / len(x))
                sums[key] = sums[key] + part if key in sums else part
        net.load_state_dict({k: v.to(net.state_dict()[k].dtype) for k, v in sums.items()})
    flops = target_flops(walked(model, task, sets, seed).net)
    return {
        "accuracy": accuracy(net, sets[1]), "rounds": task.rounds,
        **_compute(flops, max(map(len, data)), task.rounds), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _compute(flops: TrainingFlops, rows: int, epochs: int) -> Cell:
    return {
        "flops_per_sample": flops.total, "rows_per_epoch": rows, "epochs": epochs,
        "flops_per_epoch": flops.total * rows, "flops": flops.total * rows * epochs,
    }  # fmt: skip


def _scores(
    target: Walked, decoupling: Decoupling, states: dict[int, dict[str, Tensor]], test: TensorDataset,
    form: Any,
) -> Tensor:  # fmt: skip
    return predict(merge(target, decoupling, states, form=form).module, test.tensors[0])


def _accuracy(scores: Tensor, test: TensorDataset) -> float:
    return float((scores.argmax(1) == test.tensors[1]).double().mean())
