"""Zero-bubble variants of a plan: the same stages, with orders made for their seconds and links.

The simulator takes the best of four, the most promising first. The first two run at most 2(P-p)-1 forwards
ahead of their input halves, as links hold micro-batches too. One keeps up to 2P-1 micro-batches until their
weight halves, which leaves uniform stages no bubble but filling the pipeline, or fewer where memory asks for
it; the other as many as forwards run ahead. The third keeps the plan's own warm-up depths, the fourth is the
hand-made ZB-H1.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from spanwise.core.order import Kept, Op, kept_over, order_text
from spanwise.core.plan import Plan, Stage
from spanwise.cost import again_s
from spanwise.planner.build import warmup
from spanwise.planner.feasible import replica_bytes, shortage
from spanwise.planner.problem import Problem
from spanwise.schedules import Hop, StageSeconds, zb_h1, zero_bubble

VARIANTS = 4


def zero_bubble_variants(problem: Problem, plan: Plan) -> Iterator[Plan]:
    """Those that fit memory by formula; none for a single stage, where nobody waits for an input half."""
    known = problem.memo.halves
    key = (plan.stages, plan.micro_batches)
    if key not in known:
        known[key] = ([], _halves(problem, plan))
    made, more = known[key]
    for number in range(VARIANTS):
        if number == len(made):
            found = next(more, None)
            if found is None:
                return
            made.append(found)
        yield plan.model_copy(update={"stages": made[number], "schedule": "zero_bubble"})


def _halves(problem: Problem, plan: Plan) -> Iterator[tuple[Stage, ...]]:
    """Their stages."""
    count, total = plan.micro_batches, len(plan.stages)
    hops = [_hops(problem, plan, number) for number in range(total - 1)]
    forth = [hop for hop, _ in hops if hop is not None]
    back = [hop for _, hop in hops if hop is not None]
    if total == 1 or len(forth) + len(back) < 2 * (total - 1):
        return
    seconds = [stage_seconds(problem, stage) for stage in plan.stages]
    ahead = [_ahead(problem, plan, number) for number in range(total)]
    own = [stage.warmup for stage in plan.stages]
    limits = ((ahead, _kept(problem, plan, ahead)), (ahead, ahead), (own, _kept(problem, plan, own)))
    by_hand = tuple(zb_h1(count, number, total) for number in range(total))
    scheduled = (zero_bubble(count, seconds, forth, back, ahead=k1, kept=k2) for k1, k2 in limits)
    found: set[tuple[Stage, ...]] = set()
    for orders in chain(scheduled, (by_hand,)):
        stages = _with_orders(plan, orders)
        if stages not in found and shortage(problem, stages, "zero_bubble", count) is None:
            found.add(stages)
            yield stages


def _with_orders(plan: Plan, orders: tuple[tuple[Op, ...], ...]) -> tuple[Stage, ...]:
    return tuple(
        stage.model_copy(
            update={"order": order_text(order), "warmup": max(kept.whole for kept in kept_over(order))}
        )
        for stage, order in zip(plan.stages, orders, strict=True)
    )


def stage_seconds(problem: Problem, stage: Stage) -> StageSeconds:
    """A micro-batch in halves; those of the slowest replica, each by itself: the others wait for it."""
    key = (stage.start, stage.stop, stage.replicas, stage.recompute)
    if key not in problem.memo.seconds:
        problem.memo.seconds[key] = _stage_seconds(problem, stage)
    return problem.memo.seconds[key]


def _stage_seconds(problem: Problem, stage: Stage) -> StageSeconds:
    forward = into = weight = 0.0
    for replica in stage.replicas:
        where = (replica.device, stage.start, stage.stop, replica.rows)
        halves = problem.profile.halves_s(*where)
        forward = max(forward, problem.profile.forward_s(*where))
        again = again_s(problem.profile, stage, replica.device, replica.rows)
        into, weight = max(into, halves[0] + again), max(weight, halves[1])
    return StageSeconds(forward, into, weight)


def _hops(problem: Problem, plan: Plan, number: int) -> tuple[Hop | None, Hop | None]:
    """Both directions of the link behind a stage."""
    layer = problem.graph.layers[plan.stages[number].stop - 1]
    here, there = (
        tuple((problem.index[r.device], float(r.rows)) for r in stage.replicas)
        for stage in plan.stages[number : number + 2]
    )
    found: list[Hop | None] = []
    for a, b, size in ((here, there, layer.cut_bytes), (there, here, layer.gradient_cut_bytes)):
        lane = problem.links.lane(a, b, cut=True)
        busy = 0.0 if lane is None else plan.micro_batch_rows * size * lane.s_per_byte
        found.append(None if lane is None else Hop(busy, lane.latency_s))
    return found[0], found[1]


def _ahead(problem: Problem, plan: Plan, number: int) -> int:
    """2(P-p)-1, or what memory allows."""
    most = warmup("deep", number, len(plan.stages), plan.micro_batches)
    return next((k for k in range(most, 1, -1) if _fits(problem, plan.stages[number], k, 0)), 1)


def _kept(problem: Problem, plan: Plan, ahead: list[int]) -> list[int]:
    """2P-1, or what memory allows beside ``ahead`` whole micro-batches, by stage."""
    most = min(2 * len(plan.stages) - 1, plan.micro_batches)
    return [
        next((k for k in range(most, whole, -1) if _fits(problem, stage, whole, k - whole)), whole)
        for stage, whole in zip(plan.stages, ahead, strict=True)
    ]


def _fits(problem: Problem, stage: Stage, in_flight: int, halved: int) -> bool:
    return all(
        replica_bytes(
            problem, stage, replica.rows, Kept(in_flight, halved), in_halves=True,
            synced=len(stage.replicas) > 1,
        ) <= problem.cluster.device(replica.device).memory_bytes
        for replica in stage.replicas
    )  # fmt: skip
