"""Stages that are short of memory run layers again in backward, as many as it takes."""

from __future__ import annotations

from spanwise.core.plan import ScheduleName, Stage
from spanwise.planner.facts.ways import Way, way, ways
from spanwise.planner.plans.feasible import Shortage, kept
from spanwise.planner.problem import Problem


def eased(
    problem: Problem,
    stages: tuple[Stage, ...],
    short: Shortage,
    schedule: ScheduleName,
    micro_batches: int,
    *,
    enough: bool,
) -> tuple[Stage, ...] | None:
    """One stage of the short device changed so that this fits, with the least work done again.

    No replica of the stage needs more than before. If no way makes it fit, the one that frees most, unless it
    must be ``enough``.

    Returns:
        All stages; None if no way to run layers again does it.
    """
    found: list[tuple[int, float, int, Way]] = []
    for index, stage in enumerate(stages):
        if short.device not in stage.devices:
            continue
        in_flight = max(whole for whole, _ in kept(stage, schedule, micro_batches))
        rows = {replica.device: replica.rows for replica in stage.replicas}
        now = {n: way(problem.graph, stage.start, stage.stop, n, stage.recompute) for n in rows.values()}
        before = now[rows[short.device]].bytes(in_flight)
        for at, candidate in enumerate(_ways(problem, stage, rows[short.device])):
            freed = before - candidate.bytes(in_flight)
            if freed > 0 and all(
                _ways(problem, stage, n)[at].bytes(in_flight) <= now[n].bytes(in_flight) for n in now
            ):
                found.append((freed, candidate.flops * stage.rows, index, candidate))
    fits = [entry for entry in found if entry[0] >= short.over_bytes]
    if not found or (enough and not fits):
        return None
    best = min(fits, key=lambda entry: entry[1]) if fits else max(found, key=lambda entry: entry[0])
    _, _, index, chosen = best
    changed = stages[index].model_copy(update={"recompute": chosen.ranges})
    return (*stages[:index], changed, *stages[index + 1 :])


def _ways(problem: Problem, stage: Stage, rows: int) -> tuple[Way, ...]:
    """In the same order whatever the rows."""
    key = (stage.start, stage.stop, rows)
    if key not in problem.memo.ways:
        problem.memo.ways[key] = ways(problem.graph, stage.start, stage.stop, rows)
    return problem.memo.ways[key]
