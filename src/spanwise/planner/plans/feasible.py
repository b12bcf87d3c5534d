"""Memory, links, privacy and batch statistics: what a plan must keep to, and by how much it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

from spanwise.core.errors import InfeasibleError
from spanwise.core.model import ModelGraph
from spanwise.core.order import Kept
from spanwise.core.plan import Plan, ScheduleName, Stage, row_ranges
from spanwise.core.syncs import ServerSync
from spanwise.core.units import format_bytes
from spanwise.cost.training import stage_bytes
from spanwise.lowering import buckets_of, holders, updaters
from spanwise.planner.problem import Problem


@dataclass(frozen=True, slots=True)
class Shortage:
    """A device whose budget does not hold its stages."""

    device: str
    needed_bytes: int
    budget_bytes: int
    where: str

    @property
    def over_bytes(self) -> int:
        """Bytes too many."""
        return self.needed_bytes - self.budget_bytes

    def error(self) -> ShortageError:
        """As an error that says where and by how much."""
        return ShortageError(
            self.over_bytes,
            f"{self.device} needs {format_bytes(self.needed_bytes)} for {self.where}, "
            f"its budget is {format_bytes(self.budget_bytes)}, {format_bytes(self.over_bytes)} short; "
            "raise its memory, shrink the batch or add devices",
        )


class ShortageError(InfeasibleError):
    """A plan does not fit a device, by ``over_bytes``."""

    def __init__(self, over_bytes: int, message: str) -> None:
        super().__init__(message)
        self.over_bytes = over_bytes


def closest(errors: Sequence[InfeasibleError]) -> InfeasibleError:
    """What to tell of many failures: the least shortage of memory, else the first."""
    short = [error for error in errors if isinstance(error, ShortageError)]
    return min(short, key=lambda error: error.over_bytes) if short else errors[0]


def memory_bytes(
    problem: Problem, stages: tuple[Stage, ...], schedule: ScheduleName, micro_batches: int
) -> dict[str, int]:
    """Most bytes that every computing device needs, over all its stages."""
    out = _flat_bytes(problem.graph, stages)
    for stage in stages:
        most = kept(stage, schedule, micro_batches)
        for replica in stage.replicas:
            rows, in_halves = replica.rows, stage.order is not None
            needed = max(replica_bytes(problem, stage, rows, k, in_halves=in_halves) for k in most)
            out[replica.device] = out.get(replica.device, 0) + needed
    return out


def replica_bytes(
    problem: Problem, stage: Stage, rows: int, most: Kept, *, in_halves: bool, synced: bool = False
) -> int:
    """``cost.stage_bytes`` of a replica that keeps so many micro-batches at once."""
    known = problem.memo.stage_bytes
    key = (stage.start, stage.stop, rows, most, in_halves, stage.recompute, synced)
    if key not in known:
        known[key] = stage_bytes(
            problem.graph,
            stage.start,
            stage.stop,
            rows=rows,
            in_flight=most.whole,
            halved=most.halved,
            in_halves=in_halves,
            recompute=stage.recompute,
            copies=problem.copies,
            synced=synced,
        )
    return known[key]


def kept(stage: Stage, schedule: ScheduleName, micro_batches: int) -> tuple[Kept, ...]:
    """Micro-batches that a stage keeps at once: before their backward, and between its halves."""
    if stage.order is not None:
        return stage.kept
    return (Kept(micro_batches if schedule == "gpipe" else min(stage.warmup, micro_batches), 0),)


def _flat_bytes(graph: ModelGraph, stages: tuple[Stage, ...]) -> dict[str, int]:
    """Bytes of the flat buffers in which every device sends gradients.

    They hold each parameter that several devices have, once: replicas of a stage, holders of a tied weight.
    """
    out: dict[str, int] = {}
    if not graph.ties:
        for stage in stages:
            if len(stage.replicas) > 1:
                nbytes = sum(parameter.bytes for parameter in graph.parameters_of(stage.start, stage.stop))
                for device in stage.devices:
                    out[device] = out.get(device, 0) + nbytes
    else:
        sizes = {parameter.name: parameter.bytes for parameter in graph.parameters}
        for name, devices in holders(stages, graph).items():
            if len(devices) > 1:
                for device in devices:
                    out[device] = out.get(device, 0) + sizes[name]
    return out


def shortage(
    problem: Problem, stages: tuple[Stage, ...], schedule: ScheduleName, micro_batches: int
) -> Shortage | None:
    """The device that is shortest of memory, if any."""
    worst: Shortage | None = None
    for device, needed in memory_bytes(problem, stages, schedule, micro_batches).items():
        budget = problem.cluster.device(device).memory_bytes
        if needed > budget and (worst is None or needed - budget > worst.over_bytes):
            held = [stage for stage in stages if device in stage.devices]
            ranges = " and ".join(f"[{s.start}:{s.stop})" for s in held)
            rows = "+".join(str(r.rows) for s in held for r in s.replicas if r.device == device)
            depth = "+".join(str(kept(s, schedule, micro_batches)[0].whole) for s in held)
            where = f"layers {ranges} at {rows} rows with {depth} of {micro_batches} micro-batches in flight"
            again = sum(len(stage.recompute) for stage in held)
            if again:
                where += f" and {again} part{'s' if again > 1 else ''} run again in backward"
            worst = Shortage(device, needed, budget, where)
    return worst


def broken_rule(problem: Problem, plan: Plan) -> str:
    """Which rule of links, privacy or batch statistics a plan breaks; empty if none."""
    for a, b in _routes(problem, plan):
        if not problem.links.connected(a, b):
            return f"no link from {a} to {b}"
    held = " and ".join(source.device for source in plan.sources)
    if problem.job.private and plan.stages[0].replicas != plan.sources:
        return f"raw data on {held} must not leave"
    if problem.labels_stay and plan.stages[-1].replicas != plan.sources:
        return (
            f"labels on {held} must not leave them (private = true); set share_labels = true or use one stage"
        )
    for stage in plan.stages:
        least = problem.least_rows(stage.start, stage.stop)
        for replica in stage.replicas:
            if replica.rows < least:
                return (
                    f"{replica.device} would compute {replica.rows} row of each micro-batch of "
                    f"{plan.micro_batch_rows} in layers [{stage.start}:{stage.stop}), whose batch statistics "
                    f"need {least}; raise the batch or use fewer devices"
                )
    return ""


def _routes(problem: Problem, plan: Plan) -> set[tuple[str, str]]:
    """Pairs of devices between which something travels."""
    held = row_ranges(plan.sources)
    pairs = _meeting(held, plan.stages[0].row_ranges())
    if problem.graph.label_row_bytes:
        pairs |= _meeting(held, plan.stages[-1].row_ranges())
    for before, after in pairwise(plan.stages):
        if before.replicas == after.replicas:
            continue  # all rows stay where they are
        forth = _meeting(before.row_ranges(), after.row_ranges())
        pairs |= forth | {(b, a) for a, b in forth}
    for sync in plan.syncs:
        if isinstance(sync, ServerSync):
            pairs |= {ends for d in sync.clients for ends in ((d, sync.server), (sync.server, d))}
        else:
            pairs |= set(zip(sync.devices, sync.devices[1:] + sync.devices[:1], strict=True))
    if problem.job.clip_norm is not None:  # all that update tell each other the norm of their gradients
        graph = problem.graph
        norming = updaters(plan, graph, buckets_of(plan, graph)) if plan.servers else plan.computing
        pairs |= set(permutations(norming, 2))
    return pairs


def _meeting(
    senders: tuple[tuple[str, int, int], ...], receivers: tuple[tuple[str, int, int], ...]
) -> set[tuple[str, str]]:
    return {(d, e) for d, a, b in senders for e, c, f in receivers if d != e and max(a, c) < min(b, f)}
