"""From outlines to the plan that is kept: climbing by pace, then the simulator, then halves and segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spanwise.core.plan import Plan
from spanwise.planner.outline import Outline
from spanwise.planner.plans.bubble import likely_variants
from spanwise.planner.plans.build import Depth
from spanwise.planner.plans.halved import LARGE, Regroup, halved
from spanwise.planner.plans.near import built, near_borders, recounted
from spanwise.planner.plans.pace import pace_s
from spanwise.planner.plans.trial import (
    HOPELESS,
    MOST_EFFORT,
    Priced,
    priced,
    seconds_of,
    simulated,
    timeline,
)
from spanwise.planner.plans.variants import recomputed, segmented
from spanwise.planner.problem import Problem

SLACK = 0.01  # a plan whose pace is slower than the best's by more is hardly faster when simulated
# Forwards, backwards and messages of plans whose pace is worked out, a tenth of the time of a simulation.
MOST_PACED_EFFORT = 30_000
BUILT = 8  # plans are built and priced in the time that the pace of one takes
# Of large plans few are simulated without halves where these bring the likeliest below this part of its time.
MUCH, FEW_WHOLE = 0.97, 2
MOST_PACED = 5  # times as many plans as are simulated, at most


def at_both_depths(
    problem: Problem, strategy: str, outlines: Sequence[Outline], limit: int, *,
    halves: Sequence[Outline] = (), regroup: Regroup = "no",
) -> Plan:  # fmt: skip
    """The fastest of the outlines and of their likes, with warm-up 2(P-p)-1 or P-p, whole or in halves.

    Args:
        problem: what is planned.
        strategy: whose plans they are.
        outlines: cheapest first.
        limit: plans that are simulated at first, about a third of it.
        halves: more that may be good in halves, the likeliest first.
        regroup: whether the plan may have groups that no outline has.
    """
    pool = priced(problem, strategy, outlines)
    # Where memory lowers the depth, it does so stage by stage, and P-p may fit at once.
    lowered = any(_is_lowered(entry.plan) for entry in pool)
    again = [outline for outline in outlines if lowered or _is_shared(outline)]
    if again:
        pool += priced(problem, strategy, again, depth="shallow")
    pool += _recounted_pool(problem, strategy, pool, 2 * limit)
    likely = climbed(problem, strategy, paced(problem, pool, limit), limit)
    halves_win = problem.thorough and _halves_win(problem, likely)
    ranked = simulated(problem, likely, FEW_WHOLE if halves_win else 3 * limit)
    winner = ranked[0] if halves_win else shifted(problem, ranked[0], limit)
    winner = recomputed(problem, list(dict.fromkeys((winner, *ranked[: max(2, limit // 4)]))))
    further = [entry.plan for o in halves for entry in built(problem, strategy, o, "deep")]
    further += [entry.plan for entry in likely]
    found = halved(problem, list(dict.fromkeys((winner, *ranked))), further, regroup)
    if found[0].schedule == "zero_bubble":
        unlike = (plan for plan in found if len(plan.stages) != len(found[0].stages))
        second = next(unlike, None) if problem.thorough else None
        starts = [plan for plan in (found[0], second) if plan and plan.schedule == "zero_bubble"]
        moved = [shifted(problem, plan, limit // 2) for plan in starts]
        moved.sort(key=lambda plan: timeline(problem, plan).step_time_s)
        found = [*moved, *found]
    return segmented(problem, found)


def _halves_win(problem: Problem, likely: Sequence[Priced]) -> bool:
    """Whether plans are large, and the likeliest is so much faster in halves that none without can win."""
    first = likely[0]
    if first.kind[1] or first.effort <= LARGE:
        return False
    variant = next(likely_variants(problem, first.plan, 1), None)
    return variant is not None and pace_s(problem, variant) < MUCH * first.price_s


def paced(problem: Problem, candidates: Sequence[Priced], limit: int) -> list[Priced]:
    """The cheapest, and the cheapest few of every number of stages, by pace and at both depths.

    Those with a device in several stages stay as they are: only the simulator tells what they are worth.
    """
    shared = [c for c in candidates if c.kind[1]]
    ranked = sorted((c for c in candidates if not c.kind[1]), key=lambda entry: entry.price_s)
    few = max(1, limit // 4)
    kinds = sorted({c.kind for c in ranked})
    first = [c for kind in kinds for c in [c for c in ranked if c.kind == kind][:few]]
    out: dict[Plan, Priced] = {}
    effort = 0
    for candidate in (*ranked[:limit], *first, *ranked[limit : MOST_PACED * limit]):
        if effort > MOST_PACED_EFFORT and len(out) >= limit:
            break
        for plan in (candidate.plan, _shallow(candidate.plan)):
            if plan not in out:
                out[plan] = Priced(plan, pace_s(problem, plan))
                effort += candidate.effort
    return sorted((*out.values(), *shared), key=lambda entry: entry.price_s)


def climbed(problem: Problem, strategy: str, likely: Sequence[Priced], limit: int) -> list[Priced]:
    """With what comes of the first few by single layers over borders and other numbers of micro-batches."""
    out = {entry.plan: entry for entry in likely}
    effort = 0
    for start in [entry for entry in likely if not entry.kind[1]][: max(1, limit // 2)]:
        current, moved = start, True
        while moved and effort <= MOST_PACED_EFFORT:
            near = [*near_borders(problem, current.plan), *recounted(problem, current.plan)]
            depths: tuple[Depth, ...] = ("shallow",) if _shallow(current.plan) == current.plan else ("deep",)
            if _is_lowered(current.plan):
                depths = ("deep", "shallow")
            new = [entry for o in near for depth in depths for entry in built(problem, strategy, o, depth)]
            effort += sum(entry.effort for entry in new) // BUILT
            for entry in sorted(new, key=lambda entry: entry.price_s):
                if entry.plan not in out and entry.price_s <= HOPELESS * current.price_s:
                    out[entry.plan] = Priced(entry.plan, pace_s(problem, entry.plan))
                    effort += entry.effort
                if effort > MOST_PACED_EFFORT:
                    break
            met = [out[entry.plan] for entry in new if entry.plan in out]
            best = min(met, key=lambda entry: entry.price_s, default=current)
            moved = best.price_s < current.price_s
            current = best if moved else current
    return sorted(out.values(), key=lambda entry: entry.price_s)


def shifted(problem: Problem, plan: Plan, limit: int) -> Plan:
    """Moves single layers over stage borders while the simulator agrees, in at most ``limit`` simulations.

    A zero_bubble plan gets new orders at the new borders, and is tried with other numbers of micro-batches.
    """
    best, least = plan, timeline(problem, plan).step_time_s
    first = Priced(plan, 0.0)
    if not first.kind[1]:
        limit = max(1, min(limit, MOST_EFFORT // (2 * first.effort)))
    tried = [plan]
    moved = True
    while moved:
        moved = False
        for candidate in _promising(problem, best, limit):
            if candidate in tried:
                continue
            if len(tried) > limit:
                return best
            tried.append(candidate)
            seconds = seconds_of(problem, candidate)
            if seconds is not None and seconds < least:
                best, least, moved = candidate, seconds, True
                break
    return best


def _promising(problem: Problem, plan: Plan, limit: int) -> Iterator[Plan]:
    """What lies next to a plan and may be faster, the likeliest first."""
    depth: Depth = "shallow" if _shallow(plan) == plan else "deep"
    outlines = near_borders(problem, plan)
    if plan.schedule == "zero_bubble":  # halves pay for other numbers of micro-batches than wholes
        outlines += recounted(problem, plan)
    near = [p for o in outlines for p in built(problem, plan.strategy, o, depth)]
    near.sort(key=lambda entry: entry.price_s)
    if plan.schedule == "zero_bubble":  # the formula does not know halves
        halves = ([*likely_variants(problem, entry.plan, 1)] for entry in near[: 2 * limit])
        near = [Priced(min(each, key=lambda v: pace_s(problem, v)), 0.0) for each in halves if each]
    if Priced(plan, 0.0).kind[1]:
        hopeless = HOPELESS * timeline(problem, plan).step_time_s
    else:
        hopeless = (1 + SLACK) * pace_s(problem, plan)
    found = [Priced(entry.plan, pace_s(problem, entry.plan)) for entry in near[: 4 * limit]]
    for entry in sorted(found, key=lambda entry: entry.price_s):
        if entry.price_s >= hopeless:
            return
        yield entry.plan


def _recounted_pool(problem: Problem, strategy: str, pool: Sequence[Priced], count: int) -> list[Priced]:
    """The cheapest with other numbers of micro-batches, as far as it is no great effort."""
    known = {entry.plan: entry for entry in pool}
    out: dict[Plan, Priced] = {}
    effort = 0
    for entry in sorted(pool, key=lambda entry: entry.price_s)[:count]:
        for outline in () if effort > MOST_PACED_EFFORT // 4 else recounted(problem, entry.plan):
            for found in built(problem, strategy, outline, "deep"):
                effort += found.effort // BUILT
                if found.plan not in known:
                    out[found.plan] = found
    return list(out.values())


def _shallow(plan: Plan) -> Plan:
    """The same with warm-up depths of at most P-p; it needs no more memory."""
    total = len(plan.stages)
    if all(stage.warmup <= total - number for number, stage in enumerate(plan.stages)):
        return plan
    stages = tuple(
        stage.model_copy(update={"warmup": min(stage.warmup, total - number)})
        for number, stage in enumerate(plan.stages)
    )
    return plan.model_copy(update={"stages": stages})


def _is_lowered(plan: Plan) -> bool:
    """Whether memory asked for fewer forwards ahead than P-p."""
    total = len(plan.stages)
    return any(s.warmup < min(total - n, plan.micro_batches) for n, s in enumerate(plan.stages))


def _is_shared(outline: Outline) -> bool:
    held = [device for span in outline.spans for device in span.group]
    return len(set(held)) < len(held)
