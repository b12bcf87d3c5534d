"""From layers and groups to a Plan: rows, replica order, warm-up depths, syncs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Literal

import numpy as np

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan, Replica, ScheduleName, Stage, Wire
from spanwise.lowering import natural_syncs
from spanwise.planner.facts.links import Shares
from spanwise.planner.facts.rows import min_max_rows
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.feasible import Shortage, broken_rule, shortage
from spanwise.planner.plans.recompute import eased
from spanwise.planner.problem import Problem

Depth = Literal["deep", "shallow"]


def fixed_span(problem: Problem, start: int, stop: int, micro_batches: int) -> Span:
    """A stage on the data devices with exactly their own rows."""
    replicas = problem.source_rows(problem.job.batch // micro_batches)
    group = tuple(problem.index[r.device] for r in replicas)
    return Span(start, stop, group, tuple(r.rows for r in replicas))


def warmup(depth: Depth, stage: int, stages: int, micro_batches: int) -> int:
    """Forwards ahead of backwards: 2(P-p)-1, as links hold micro-batches too (Asteroid), or P-p (PyTorch)."""
    left = stages - stage
    return min(micro_batches, 2 * left - 1 if depth == "deep" else left)


def build(
    problem: Problem,
    strategy: str,
    outline: Outline,
    *,
    depth: Depth = "deep",
    schedule: ScheduleName = "1f1b",
) -> Plan:
    """The Plan of an outline, with warm-up depths lowered as far as memory asks.

    Where that does not do, layers run again in backward instead.

    Raises:
        InfeasibleError: memory is short even so, a link is missing, or data would leave.
    """
    count, total = outline.micro_batches, len(outline.spans)
    rows = problem.job.batch // count
    sources = problem.source_rows(rows)
    stages: list[Stage] = []
    for number, span in enumerate(outline.spans):
        ahead = count if schedule == "gpipe" else warmup(depth, number, total, count)
        shares = span_shares(problem, span, rows, ahead)
        if number == 0 and not problem.first_is_fixed:
            shares = problem.links.aligned(
                shares, tuple((problem.index[s.device], float(s.rows)) for s in sources)
            )
        stages.append(_stage(problem, span, shares, ahead))
    found, short = fitted(problem, stages, schedule, count)
    if short is not None:
        found, short = fitted(problem, stages, schedule, count, recompute=True)
    if short is not None:
        raise short.error()
    plan = Plan(
        strategy=strategy,
        graph_digest=problem.graph.digest,
        micro_batches=count,
        micro_batch_rows=rows,
        sources=sources or found[0].replicas,
        stages=found,
        schedule=schedule,
        syncs=natural_syncs(found, problem.graph),
        wires=_wires(problem, found),
    )
    broken = broken_rule(problem, plan)
    if broken:
        raise InfeasibleError(broken)
    return plan


def _stage(problem: Problem, span: Span, shares: Shares, ahead: int) -> Stage:
    """Made once: the plans that are tried have most stages in common."""
    key, known = (span.start, span.stop, shares, ahead), problem.memo.stages
    if key not in known:
        ids = problem.cluster.ids
        replicas = tuple(Replica(device=ids[d], rows=int(y)) for d, y in shares)
        known[key] = Stage(start=span.start, stop=span.stop, replicas=replicas, warmup=ahead)
    return known[key]


def _wires(problem: Problem, stages: tuple[Stage, ...]) -> tuple[Wire, ...]:
    """Pairs of devices of neighbouring stages whose link is one of reduced precision."""
    if not problem.links.reduces:
        return ()
    pairs = {
        ends
        for before, after in pairwise(stages)
        for a, b in product(before.devices, after.devices)
        for ends in ((a, b), (b, a))
        if a != b and problem.cluster.connected(*ends)
    }
    found = (Wire(source=a, target=b, precision=problem.cluster.precision(a, b)) for a, b in sorted(pairs))
    return tuple(wire for wire in found if wire.precision != "full")


def span_shares(problem: Problem, span: Span, rows: int, ahead: int) -> Shares:
    """Rows of a micro-batch of each device of a span: as given, else by speed and memory.

    ``ahead`` is how many micro-batches are kept at once. Devices that would get no row are left out.
    """
    if span.rows is not None:
        return tuple((d, float(y)) for d, y in zip(span.group, span.rows, strict=True))
    key, known = (span.group, span.start, span.stop, rows, ahead), problem.memo.shares
    if key not in known:
        known[key] = _fastest_shares(problem, span, rows, ahead)
    return known[key]


def _fastest_shares(problem: Problem, span: Span, rows: int, ahead: int) -> Shares:
    group = problem.links.in_order(span.group)
    if len(group) == 1:
        return ((group[0], float(rows)),)
    tables = problem.tables
    start, stop = np.array([span.start]), np.array([span.stop])
    upto, before = (tables.both[list(group), edge, 1 : rows + 1] for edge in (span.stop, span.start))
    seconds = (upto - before)[None]
    for in_flight in (ahead, 1, 0):  # 0: nothing fits, then the fastest rows tell by how much
        limited = np.array(seconds)
        if in_flight:
            for at, device in enumerate(group):
                cap = tables.row_cap(device, start, stop, in_flight=in_flight, synced=True)[0]
                limited[0, at, max(int(cap), 0) :] = np.inf
        found, feasible = min_max_rows(limited, rows, tables.least_rows(start, stop))
        if feasible[0]:
            return tuple((d, float(y)) for d, y in zip(group, found[0], strict=True) if y)
    raise AssertionError("unreachable: rows without a cap are always feasible")


def fitted(
    problem: Problem,
    stages: Sequence[Stage],
    schedule: ScheduleName,
    micro_batches: int,
    *,
    recompute: bool = False,
) -> tuple[tuple[Stage, ...], Shortage | None]:
    """Lowers the depth of the stage that keeps most until every device fits.

    With ``recompute`` layers run again as soon as that is enough, and where no depth is.
    """
    current = tuple(stages)
    while True:
        short = shortage(problem, current, schedule, micro_batches)
        if short is None:
            return current, short
        held = [i for i, s in enumerate(current) if short.device in s.devices and s.warmup > 1]
        lowest = not held or schedule == "gpipe"
        again = (
            eased(problem, current, short, schedule, micro_batches, enough=not lowest) if recompute else None
        )
        if again is not None:
            current = again
            continue
        if lowest:
            return current, short
        saved = problem.tables.saved
        worst = max(held, key=lambda i: float(saved[current[i].stop] - saved[current[i].start]))
        most = current[worst].warmup - 1
        current = tuple(
            s if i < worst or s.warmup <= most else s.model_copy(update={"warmup": most})
            for i, s in enumerate(current)
        )
