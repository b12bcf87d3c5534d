"""Stages that are short of memory run layers again in backward, as many as it takes."""

from __future__ import annotations

from spanwise.core.plan import ScheduleName, Stage
from spanwise.planner.feasible import Shortage, kept
from spanwise.planner.problem import Problem
from spanwise.planner.ways import Way, way, ways


def eased(
    problem: Problem,
    stages: tuple[Stage, ...],
    short: Shortage,
    schedule: ScheduleName,
    micro_batches: int,
    *,
    enough: bool = True,
) -> tuple[Stage, ...] | None:
    """One stage of the short device changed so that this fits, with the least work done again.

    No replica of the stage needs more than before. Without ``enough`` it is what needs least, be it
    still too much.

    Returns:
        All stages; None if no way to run layers again does it.
    """
    found: list[tuple[float, int, Way]] = []
    for index, stage in enumerate(stages):
        if short.device not in stage.devices:
            continue
        in_flight = max(whole for whole, _ in kept(stage, schedule, micro_batches))
        rows = {replica.device: replica.rows for replica in stage.replicas}
        now = {n: way(problem.graph, stage.start, stage.stop, n, stage.recompute) for n in rows.values()}
        for at, candidate in enumerate(_ways(problem, stage, rows[short.device])):
            freed = now[rows[short.device]].bytes(in_flight) - candidate.bytes(in_flight)
            if freed < (short.over_bytes if enough else 1):
                continue
            if all(_ways(problem, stage, n)[at].bytes(in_flight) <= now[n].bytes(in_flight) for n in now):
                work = candidate.flops * stage.rows
                found.append((work if enough else -freed, index, candidate))
                if enough:
                    break  # the ways come with the least work first
    if not found:
        return None
    _, index, chosen = min(found, key=lambda entry: entry[:2])
    changed = stages[index].model_copy(update={"recompute": chosen.ranges})
    return (*stages[:index], changed, *stages[index + 1 :])


def _ways(problem: Problem, stage: Stage, rows: int) -> tuple[Way, ...]:
    """In the same order whatever the rows."""
    key = (stage.start, stage.stop, rows)
    if key not in problem.memo.ways:
        problem.memo.ways[key] = ways(problem.graph, stage.start, stage.stop, rows)
    return problem.memo.ways[key]
