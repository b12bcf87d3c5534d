"""Plans that are compared: what each device trains, and dense rivals that save memory otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from spanwise.core.cluster import Cluster
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.core.trained import GroupSync
from spanwise.lowering import natural_syncs
from spanwise.planner import Problem
from spanwise.planner.dsparse.strategy import (
    Sparsity,
    dsparse_last_k,
    dsparse_magnitude,
    dsparse_random,
    dsparse_shifts,
    sparse_plan,
)

SUBJECT, DENSE, TENSORS = "dsparse", "dense", "dense_by_tensor"
REFRESH_EVERY = 10
TRAINED_SHARE = 0.23  # of the model's bytes, for all sparse plans that choose: the job says so


@dataclass(frozen=True)
class Contestant:
    """``make`` gives its plan.

    ``roomy``: it needs more memory than the devices have, and gets it. ``stored``: it normalises by the
    statistics of the model as it was, and learns at a rate of its own.
    """

    make: Callable[[Problem], Plan]
    roomy: bool = False
    stored: bool = False


def dense(problem: Problem, *, stored: bool = False, micro_batches: int = 1, parts: int = 0) -> Plan:
    """Every device trains everything on equal rows; one flat buffer.

    ``parts``: into so many the model is cut, each of which runs again in backward.
    """
    ids, layers = problem.cluster.ids, len(problem.graph)
    rows = problem.job.batch // micro_batches // len(ids)
    replicas = tuple(Replica(device=d, rows=rows) for d in ids)
    edges = [round(layers * i / parts) for i in range(parts + 1)] if parts else []
    stage = Stage(start=0, stop=layers, replicas=replicas, recompute=tuple(pairwise(edges)))
    return Plan(
        strategy=DENSE, graph_digest=problem.graph.digest, micro_batches=micro_batches,
        micro_batch_rows=rows * len(ids), sources=replicas, stages=(stage,),
        syncs=natural_syncs((stage,), problem.graph), stored_statistics=stored or None,
    )  # fmt: skip


def by_tensor(problem: Problem) -> Plan:
    """Dense, with a sum for each parameter."""
    plan = dense(problem)
    segments = len(problem.graph.parameters)
    syncs = tuple(sync.model_copy(update={"segments": segments}) for sync in plan.syncs)
    return plan.model_copy(update={"syncs": syncs, "strategy": TENSORS})


def same_for_all(problem: Problem) -> Plan:
    """Every device trains what the smallest can: no groups, but for the one of all."""
    least = min(device.memory_bytes for device in problem.cluster.devices)
    devices = tuple(d.model_copy(update={"memory_bytes": least}) for d in problem.cluster.devices)
    equal = problem.cluster.model_copy(update={"devices": devices})
    own = Problem(problem.graph, problem.profile, equal, problem.job, problem.importance)
    return sparse_plan(own, "same_for_all", Sparsity())


def lazy(problem: Problem) -> Plan:
    """The choice of the subject; who does not train a unit gets its values every ten steps."""
    return sparse_plan(problem, "dsparse_lazy", Sparsity(refresh_every=REFRESH_EVERY))


def wide(problem: Problem) -> Plan:
    """As much as fits, though all of it travels."""
    return sparse_plan(problem, "dsparse_wide", Sparsity(most_union=1.0))


def subject(problem: Problem) -> Plan:
    """The strategy as users get it."""
    return sparse_plan(problem, SUBJECT, Sparsity())


def one_way(way: str) -> Callable[[Problem], Plan]:
    """The subject with one way for all groups."""

    def make(problem: Problem) -> Plan:
        return sparse_plan(problem, f"dsparse_{way}", Sparsity(ways=(way, "grouped")))

    def forced(problem: Problem) -> Plan:
        plan = make(problem)
        syncs = tuple(
            sync.model_copy(update={"way": way}) if isinstance(sync, GroupSync) else sync
            for sync in plan.syncs
        )
        return plan.model_copy(update={"syncs": syncs})

    return forced


CONTESTANTS: dict[str, Contestant] = {
    DENSE: Contestant(dense, roomy=True),
    TENSORS: Contestant(by_tensor, roomy=True),
    "dense_stored": Contestant(lambda p: dense(p, stored=True), roomy=True, stored=True),
    "dense_micro_batch": Contestant(lambda p: dense(p, micro_batches=8), roomy=True),
    "dense_recompute": Contestant(
        lambda p: dense(p, parts=round(math.sqrt(len(p.graph)))), roomy=True
    ),
    SUBJECT: Contestant(subject),
    "dsparse_wide": Contestant(wide),
    "dsparse_stored": Contestant(subject, stored=True),
    "dsparse_lazy": Contestant(lazy),
    "dsparse_grouped": Contestant(one_way("grouped")),
    "dsparse_masked": Contestant(one_way("masked")),
    "same_for_all": Contestant(same_for_all),
    "last_k": Contestant(dsparse_last_k),
    "shifts_only": Contestant(dsparse_shifts),
    "magnitude": Contestant(dsparse_magnitude),
    "random": Contestant(dsparse_random),
}  # fmt: skip


def with_room(cluster: Cluster, nbytes: int = 2**30) -> Cluster:
    """The same devices with as much memory each."""
    devices = tuple(d.model_copy(update={"memory_bytes": nbytes}) for d in cluster.devices)
    return cluster.model_copy(update={"devices": devices})
