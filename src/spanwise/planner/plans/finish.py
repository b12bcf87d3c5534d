"""From outlines to the plan that is kept: climbing by pace, then the simulator, then halves and segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.bubble import likely_variants, zero_bubble_variants
from spanwise.planner.plans.build import Depth, fitted, warmup
from spanwise.planner.plans.feasible import shortage
from spanwise.planner.plans.pace import pace_s
from spanwise.planner.plans.trial import HOPELESS, MOST_EFFORT, Priced, priced, simulated, timeline
from spanwise.planner.problem import Problem
from spanwise.planner.segments.rings import cut_by_layers

SLACK = 0.01  # a plan whose pace is slower than the best's by more is hardly faster when simulated
# Forwards, backwards and messages of plans whose pace is worked out, a tenth of the time of a simulation.
MOST_PACED_EFFORT = 30_000
BUILT = 8  # plans are built and priced in the time that the pace of one takes
MOST_PACED = 5  # times as many plans as are simulated, at most
SEGMENTS = (2, 4)
MOST_HALVED = 6  # of all of these, so many are simulated, of large ones as many as have this effort together
MOST_HALVED_EFFORT = 3 * MOST_EFFORT
# By which part such variants of a plan must be faster: more actions cost what the simulator does not show.
LEAST_GAIN = 0.005


def at_both_depths(problem: Problem, strategy: str, outlines: Sequence[Outline], limit: int) -> Plan:
    """The fastest of the outlines and of their likes, with warm-up 2(P-p)-1 or P-p, whole or in halves."""
    pool = priced(problem, strategy, outlines)
    # Where memory lowers the depth, it does so stage by stage, and P-p may fit at once.
    lowered = any(_is_lowered(entry.plan) for entry in pool)
    again = [outline for outline in outlines if lowered or _is_shared(outline)]
    if again:
        pool += priced(problem, strategy, again, depth="shallow")
    pool += _recounted_pool(problem, strategy, pool, 2 * limit)
    likely = climbed(problem, strategy, paced(problem, pool, limit), limit)
    ranked = simulated(problem, likely, 3 * limit)
    winner = shifted(problem, ranked[0], limit)
    winner = recomputed(problem, list(dict.fromkeys((winner, *ranked[: max(2, limit // 4)]))))
    winner = halved(problem, list(dict.fromkeys((winner, *ranked))))
    if winner.schedule == "zero_bubble":
        winner = shifted(problem, winner, limit // 2)
    return segmented(problem, winner)


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
            near = [*_near(problem, current.plan), *_recounted(problem, current.plan)]
            depths: tuple[Depth, ...] = ("shallow",) if _shallow(current.plan) == current.plan else ("deep",)
            if _is_lowered(current.plan):
                depths = ("deep", "shallow")
            built = [entry for o in near for depth in depths for entry in _built(problem, strategy, o, depth)]
            effort += sum(entry.effort for entry in built) // BUILT
            for entry in sorted(built, key=lambda entry: entry.price_s):
                if entry.plan not in out and entry.price_s <= HOPELESS * current.price_s:
                    out[entry.plan] = Priced(entry.plan, pace_s(problem, entry.plan))
                    effort += entry.effort
                if effort > MOST_PACED_EFFORT:
                    break
            met = [out[entry.plan] for entry in built if entry.plan in out]
            best = min(met, key=lambda entry: entry.price_s, default=current)
            moved = best.price_s < current.price_s
            current = best if moved else current
    return sorted(out.values(), key=lambda entry: entry.price_s)


def halved(problem: Problem, plans: Sequence[Plan]) -> Plan:
    """The fastest zero_bubble variant of any of the plans if that pays, else the first plan.

    Which plan is best in halves is not known from how fast it is without, but by the pace of its variants.
    """
    firsts = dict.fromkeys(v for p in plans for v in likely_variants(problem, p))
    order = sorted(firsts, key=lambda variant: pace_s(problem, variant))
    most = max(2, MOST_HALVED_EFFORT // Priced(order[0], 0.0).effort) if order else 0
    best = _paying(problem, plans[0], order[: min(most, MOST_HALVED)])
    if best not in firsts:
        return best
    hopeless = HOPELESS * pace_s(problem, best)
    more = [variant for variant in zero_bubble_variants(problem, best) if variant not in firsts]
    return _paying(problem, best, [variant for variant in more if pace_s(problem, variant) <= hopeless])


def recomputed(problem: Problem, plans: Sequence[Plan]) -> Plan:
    """The fastest of the plans at warm-up depth 2(P-p)-1 with layers run again, if that pays, else the first.

    Only those whose depth memory does not allow otherwise.
    """
    variants: list[Plan] = []
    for plan in plans:
        total, count = len(plan.stages), plan.micro_batches
        deep = [
            stage.model_copy(update={"warmup": warmup("deep", number, total, count), "recompute": ()})
            for number, stage in enumerate(plan.stages)
        ]
        if shortage(problem, tuple(deep), plan.schedule, count) is not None:
            stages, short = fitted(problem, deep, plan.schedule, count, recompute=True)
            if short is None and stages != plan.stages:
                variants.append(plan.model_copy(update={"stages": stages}))
    return _paying(problem, plans[0], variants)


def segmented(problem: Problem, plan: Plan) -> Plan:
    """The plan with its gradients summed in several segments if that pays.

    The first segments are summed while the last micro-batch still leaves the gradients of others behind. Cut
    at layers, where the formula of a ring has its optimum; or, where the simulator finds that better, into a
    few segments of equal bytes.
    """
    if not plan.syncs:
        return plan
    equal = (tuple(sync.model_copy(update={"segments": count}) for sync in plan.syncs) for count in SEGMENTS)
    more = [cut_by_layers(problem, plan), *(plan.model_copy(update={"syncs": syncs}) for syncs in equal)]
    return _paying(problem, plan, [variant for variant in more if variant != plan])


def _paying(problem: Problem, plan: Plan, variants: Sequence[Plan]) -> Plan:
    best, least = plan, (1 - LEAST_GAIN) * timeline(problem, plan).step_time_s
    for variant in variants:
        try:
            seconds = timeline(problem, variant).step_time_s
        except InfeasibleError:
            continue
        if seconds < least:
            best, least = variant, seconds
    return best


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
            try:
                seconds = timeline(problem, candidate).step_time_s
            except InfeasibleError:
                continue
            if seconds < least:
                best, least, moved = candidate, seconds, True
                break
    return best


def _promising(problem: Problem, plan: Plan, limit: int) -> Iterator[Plan]:
    """What lies next to a plan and may be faster, the likeliest first."""
    depth: Depth = "shallow" if _shallow(plan) == plan else "deep"
    outlines = _near(problem, plan)
    if plan.schedule == "zero_bubble":  # halves pay for other numbers of micro-batches than wholes
        outlines += _recounted(problem, plan)
    near = [p for o in outlines for p in _built(problem, plan.strategy, o, depth)]
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


def _built(problem: Problem, strategy: str, outline: Outline, depth: Depth) -> list[Priced]:
    try:
        return priced(problem, strategy, [outline], depth=depth)
    except InfeasibleError:
        return []


def _near(problem: Problem, plan: Plan) -> list[Outline]:
    """The same devices with one border, or both borders of a stage, one layer further."""
    last = len(plan.stages) - 1
    edges = [0, *(stage.stop for stage in plan.stages)]
    out: list[Outline] = []
    for first, width in product(range(1, last + 1), (1, 2)):
        for step in (-1, 1):
            new = [e + step if first <= i < first + width else e for i, e in enumerate(edges)]
            if first + width > last + 1 or any(a >= b for a, b in pairwise(new)):
                continue
            spans: list[Span] = []
            for number, (stage, a, b) in enumerate(zip(plan.stages, new[:-1], new[1:], strict=True)):
                fixed = (number == 0 and problem.first_is_fixed) or (number == last and problem.last_is_fixed)
                group = tuple(problem.index[d] for d in stage.devices)
                rows = tuple(r.rows for r in stage.replicas) if fixed else None
                spans.append(Span(a, b, group if fixed else tuple(sorted(group)), rows))
            out.append(Outline(plan.micro_batches, tuple(spans)))
    return out


def _recounted_pool(problem: Problem, strategy: str, pool: Sequence[Priced], count: int) -> list[Priced]:
    """The cheapest with other numbers of micro-batches, as far as it is no great effort."""
    known = {entry.plan: entry for entry in pool}
    out: dict[Plan, Priced] = {}
    effort = 0
    for entry in sorted(pool, key=lambda entry: entry.price_s)[:count]:
        for outline in () if effort > MOST_PACED_EFFORT // 4 else _recounted(problem, entry.plan):
            for found in _built(problem, strategy, outline, "deep"):
                effort += found.effort // BUILT
                if found.plan not in known:
                    out[found.plan] = found
    return list(out.values())


def _recounted(problem: Problem, plan: Plan) -> list[Outline]:
    """The same stages with other numbers of micro-batches."""
    if problem.first_is_fixed:
        return []
    ids = problem.index
    spans = tuple(Span(s.start, s.stop, tuple(sorted(ids[d] for d in s.devices))) for s in plan.stages)
    return [Outline(m, spans) for m in problem.micro_batch_choices() if m != plan.micro_batches]


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
