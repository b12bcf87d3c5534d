"""Zero-bubble variants of a plan: the same stages, with orders made for their seconds and links.

The simulator takes the best of a few, the most promising first. The first two run at most 2(P-p)-1 forwards
ahead of their input halves, as links hold micro-batches too. One keeps up to 2P-1 micro-batches until their
weight halves, which leaves uniform stages no bubble but filling the pipeline, or fewer where memory asks for
it; the other as many as forwards run ahead. The next keeps the plan's own warm-up depths, the last is the
hand-made ZB-H1. Where weight halves of several micro-batches at once take less than one by one, two more
come first: they keep as many micro-batches as memory holds, and take all that are there at once, or hold them
back until memory or the end of the step asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count, islice

from spanwise.core.order import Kept, Op, kept_over, order_text
from spanwise.core.plan import Plan, Stage
from spanwise.cost.halves import weight_s
from spanwise.cost.training import again_s
from spanwise.planner.plans.build import warmup
from spanwise.planner.plans.feasible import replica_bytes, shortage
from spanwise.planner.problem import Problem
from spanwise.schedules import Hop, StageSeconds, zb_h1, zero_bubble

FIRST = 2  # variants of a plan that are worth a look at its pace, besides those that join weight halves
_FEW = 4  # weight halves at once
_GAIN = 0.05  # what joining so many must take off their time in some stage


def zero_bubble_variants(problem: Problem, plan: Plan) -> Iterator[Plan]:
    """Those that fit memory by formula; none for a single stage, where nobody waits for an input half."""
    known = problem.memo.halves
    key = (plan.stages, plan.micro_batches)
    if key not in known:
        known[key] = ([], _halves(problem, plan))
    made, more = known[key]
    for number in count():
        if number == len(made):
            found = next(more, None)
            if found is None:
                return
            made.append(found)
        yield plan.model_copy(update={"stages": made[number], "schedule": "zero_bubble"})


def likely_variants(problem: Problem, plan: Plan, most: int = FIRST) -> Iterator[Plan]:
    """The first few, and before them those that join weight halves, if that pays."""
    more = 2 if _joining_pays(problem, plan) else 0
    return islice(zero_bubble_variants(problem, plan), most + more)


def _joining_pays(problem: Problem, plan: Plan) -> bool:
    """Whether weight halves of a few micro-batches take less time at once in any stage."""
    few = min(_FEW, plan.micro_batches)
    return any(
        joined_s(problem, stage, few) < (1 - _GAIN) * few * joined_s(problem, stage, 1)
        for stage in plan.stages
    )


def _halves(problem: Problem, plan: Plan) -> Iterator[tuple[Stage, ...]]:
    """Their stages."""
    micro_batches, total = plan.micro_batches, len(plan.stages)
    hops = [_hops(problem, plan, number) for number in range(total - 1)]
    forth = [hop for hop, _ in hops if hop is not None]
    back = [hop for _, hop in hops if hop is not None]
    if total == 1 or len(forth) + len(back) < 2 * (total - 1):
        return
    seconds = [stage_seconds(problem, stage) for stage in plan.stages]
    ahead = [_ahead(problem, plan, number) for number in range(total)]
    own = [stage.warmup for stage in plan.stages]
    few = 2 * total - 1
    limits = [(ahead, few, 1, False), (ahead, 0, 1, False), (own, few, 1, False)]
    several: list[Callable[[int], float]] = []
    if _joining_pays(problem, plan):
        most = micro_batches
        limits = [(ahead, most, most, False), (ahead, most, most, True), *limits]
        several = [partial(joined_s, problem, stage) for stage in plan.stages]
    by_hand = tuple(zb_h1(micro_batches, number, total) for number in range(total))
    scheduled = (
        zero_bubble(
            micro_batches, seconds, forth, back, ahead=whole, kept=_kept(problem, plan, whole, most),
            together=together, held_back=held_back, joined_s=several,
        )
        for whole, most, together, held_back in limits
    )  # fmt: skip
    found: set[tuple[Stage, ...]] = set()
    for orders in chain(scheduled, (by_hand,)):
        stages = _with_orders(plan, orders)
        if stages not in found and shortage(problem, stages, "zero_bubble", micro_batches) is None:
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
    forward = into = 0.0
    for replica in stage.replicas:
        where = (replica.device, stage.start, stage.stop, replica.rows)
        forward = max(forward, problem.profile.forward_s(*where))
        again = again_s(problem.profile, stage, replica.device, replica.rows)
        into = max(into, problem.profile.halves_s(*where)[0] + again)
    return StageSeconds(forward, into, joined_s(problem, stage, 1))


def joined_s(problem: Problem, stage: Stage, count: int) -> float:
    """The weight halves of ``count`` micro-batches at once, those of the slowest replica."""
    known, key = problem.memo.joined, (stage.start, stage.stop, stage.replicas, count)
    if key not in known:
        known[key] = max(
            weight_s(
                problem.profile, problem.graph, r.device, stage.start, stage.stop, rows=r.rows, count=count
            )
            for r in stage.replicas
        )
    return known[key]


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


def _kept(problem: Problem, plan: Plan, ahead: list[int], most: int) -> list[int]:
    """``most``, or what memory allows beside ``ahead`` whole micro-batches, by stage."""
    most = min(most, plan.micro_batches)
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
