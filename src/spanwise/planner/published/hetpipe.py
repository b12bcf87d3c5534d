"""``hetpipe``: baseline. Virtual workers of unlike devices, a pipeline inside each, gradients summed between.

Park et al., "HetPipe: Enabling Large DNN Training on (Whimpy) Heterogeneous GPU Clusters through Integration
of Pipelined Model Parallelism and Data Parallelism", USENIX ATC 2020, sections 4 to 6: equal distribution of
the kinds of devices over virtual workers, and inside one the partition whose slowest stage, its messages
included, is fastest under memory. From secondary sources, unverified.

Limits. Our Plan has one chain of stages. So only virtual workers that are alike and share cuts can be
written: the devices at one place of all of them are the replicas of a stage with equal rows. That is the
paper's equal distribution (ED); its node and hybrid policies are not modelled, and devices that do not divide
evenly stay out. The parameter server is the ring sum of gradients, and waves of stale weights (WSP) are left
out: it runs synchronously as 1F1B with a flush, warm-up depth P-p. A kind is a layer table, a factor and a
memory budget. The number of virtual workers, the paper's input, is the one that suits it best. Raw data and
privacy are unknown to it.
"""

from __future__ import annotations

from itertools import islice, permutations

import numpy as np

from spanwise.core.plan import Plan, Replica, Stage
from spanwise.planner.facts.lanes import Group
from spanwise.planner.facts.tables import Floats
from spanwise.planner.plans.build import warmup
from spanwise.planner.problem import Problem, largest_remainder
from spanwise.planner.published.decided import Decision, fastest_decision
from spanwise.planner.published.known import slowest_pair

MOST_ORDERS = 24  # orders of the kinds along the pipeline: all of up to four
MOST_DECISIONS = 24  # simulated, those with the fastest slowest stage first

Places = tuple[Group, ...]  # devices at every place of the pipeline, one of each virtual worker


def hetpipe(problem: Problem) -> Plan:
    """The plan of the partition at the number of virtual workers and micro-batches that suit it best.

    Raises:
        InfeasibleError: no partition fits memory, or links or privacy do not allow its plans; says why.
    """
    found: list[tuple[float, Decision]] = []
    for m in problem.micro_batch_choices():
        rows = problem.job.batch // m
        for places in virtual_workers(problem):
            if len(places[0]) > rows or len(places) > len(problem.graph):
                continue
            slowest, cuts = partition(problem, places, m)
            found.append((m * slowest, Decision(m, _stages(problem, places, cuts, m))))
    found.sort(key=lambda entry: entry[0])
    return fastest_decision(problem, "hetpipe", [d for _, d in found[:MOST_DECISIONS]])


def virtual_workers(problem: Problem) -> list[Places]:
    """For every number of virtual workers and order of the kinds: who stands at each place of the pipeline.

    V virtual workers have ``floor(count / V)`` devices of every kind.
    """
    kinds: dict[tuple[int, float, int], list[int]] = {}
    entries = {entry.device: entry for entry in problem.profile.devices}
    for index, device in enumerate(problem.cluster.devices):
        entry = entries[device.id]
        kinds.setdefault((entry.table, entry.factor, device.memory_bytes), []).append(index)
    by_memory = sorted(kinds.items(), key=lambda kind: -kind[0][2])
    out: dict[Places, None] = {}
    for workers in range(1, max(len(held) for held in kinds.values()) + 1):
        places = [
            tuple(tuple(held[i * workers : (i + 1) * workers]) for i in range(len(held) // workers))
            for _, held in by_memory
        ]
        for order in islice(permutations([p for p in places if p]), MOST_ORDERS):
            out[tuple(group for part in order for group in part)] = None
    return list(out)


def partition(problem: Problem, places: Places, micro_batches: int) -> tuple[float, tuple[int, ...]]:
    """Seconds a micro-batch of the slowest stage, and the borders ``0 .. L``, of the best partition.

    Where no partition fits the memory, the best without regard to memory, which then tells what is short.
    """
    for bounded in (True, False):
        found = _partition(problem, places, micro_batches, bounded=bounded)
        if np.isfinite(found[0]):
            return found
    return found


def _partition(
    problem: Problem, places: Places, micro_batches: int, *, bounded: bool
) -> tuple[float, tuple[int, ...]]:
    layers, total = len(problem.graph), len(places)
    best = np.full((total + 1, layers + 1), np.inf)
    best[0, 0] = 0.0
    chosen = np.zeros((total + 1, layers + 1), dtype=np.int64)
    for number, group in enumerate(places):
        before = places[number - 1] if number else ()
        depth = warmup("shallow", number, total, micro_batches)
        seconds = _stage_s(problem, group, before, micro_batches, depth if bounded else 0)
        slowest = np.maximum(best[number][:, None], seconds)
        chosen[number + 1] = np.argmin(slowest, axis=0)
        best[number + 1] = np.min(slowest, axis=0)
    cuts = [layers]
    for number in range(total, 0, -1):
        cuts.insert(0, int(chosen[number, cuts[0]]))
    return float(best[total, layers]), tuple(cuts)


def _stage_s(problem: Problem, group: Group, before: Group, micro_batches: int, depth: int) -> Floats:
    """``[start, stop]`` seconds a micro-batch with the messages to and from the stage before.

    Infinite below the diagonal and where ``depth`` micro-batches do not fit the memory (0: it is ignored).
    """
    tables, layers = problem.tables, len(problem.graph)
    rows = -(-(problem.job.batch // micro_batches) // len(group))
    begin, end = np.triu_indices(layers + 1, 1)
    seconds = np.zeros(len(begin))
    for device in group:
        both = tables.forward[device, :, rows] + tables.backward[device, :, rows]
        seconds = np.maximum(seconds, both[end] - both[begin])
        if depth:
            cap = tables.row_cap(device, begin, end, in_flight=depth, synced=len(group) > 1)
            seconds = np.where(cap >= rows, seconds, np.inf)
    paces = [slowest_pair(problem, (a,), (b,)) for a, b in zip(before, group, strict=bool(before))]
    if paces:  # inside each virtual worker
        slowest, farthest = max(p.s_per_byte for p in paces), max(p.latency_s for p in paces)
        seconds += rows * (tables.into[begin] + tables.back[begin]) * slowest + 2 * farthest
    out = np.full((layers + 1, layers + 1), np.inf)
    out[begin, end] = seconds
    return out


def _stages(problem: Problem, places: Places, cuts: tuple[int, ...], micro_batches: int) -> tuple[Stage, ...]:
    ids, rows = problem.cluster.ids, problem.job.batch // micro_batches
    out: list[Stage] = []
    for number, group in enumerate(places):
        equal = largest_remainder(rows, (1.0,) * len(group))
        replicas = tuple(Replica(device=ids[d], rows=y) for d, y in zip(group, equal, strict=True))
        depth = warmup("shallow", number, len(places), micro_batches)
        out.append(Stage(start=cuts[number], stop=cuts[number + 1], replicas=replicas, warmup=depth))
    return tuple(out)
