"""Finalists are decided by the simulator: lower, simulate, keep the fastest that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, product

from spanwise.core.errors import InfeasibleError, PlanError
from spanwise.core.plan import Plan, ScheduleName
from spanwise.core.timeline import Timeline
from spanwise.core.units import format_bytes
from spanwise.lowering import lower
from spanwise.planner.bubble import zero_bubble_variants
from spanwise.planner.build import Depth, build, fitted, warmup
from spanwise.planner.feasible import ShortageError, closest, shortage
from spanwise.planner.outline import Outline, Span
from spanwise.planner.price import price
from spanwise.planner.problem import Problem
from spanwise.simulator import simulate

# The formula is at times above the simulation, by at most 3.2 % of 314 random pipelines (own measurement, see
# tests/unit/test_planner_price.py); beyond this factor of the best simulated time a plan can hardly win.
HOPELESS = 1.15
# Forwards, backwards and messages that a planner simulates among its finalists, in three plans at least.
MOST_EFFORT = 12_000
SEGMENTS = (2, 4)
# By which part such variants of a plan must be faster: more actions cost what the simulator does not show.
LEAST_GAIN = 0.005


@dataclass(frozen=True, slots=True)
class Priced:
    """A plan and its step time by formula."""

    plan: Plan
    price_s: float

    @property
    def kind(self) -> tuple[int, int]:
        """Number of stages; where a device holds several also the depth of the first."""
        held = [device for stage in self.plan.stages for device in stage.devices]
        return len(self.plan.stages), 0 if len(set(held)) == len(held) else self.plan.stages[0].warmup

    @property
    def effort(self) -> int:
        """About how many forwards, backwards and messages a step has."""
        held = [len(stage.replicas) for stage in self.plan.stages]
        messages = sum(a + b for a, b in pairwise(held)) + held[0] + held[-1]
        return self.plan.micro_batches * (2 * sum(held) + 4 * messages)

    @property
    def handicap(self) -> float:
        """Of equals the one with fewer actions: they are simulated and run with less overhead."""
        return 1 + self.effort / 200_000


def timeline(problem: Problem, plan: Plan) -> Timeline:
    """The simulated timeline without spans; each plan is simulated once a problem.

    Raises:
        InfeasibleError: the simulated peak of a device is above its budget, or no order of the plan can end.
    """
    key = plan.model_copy(update={"strategy": ""})
    if key not in problem.memo.trials:
        problem.memo.trials[key] = (plan.strategy, _simulated(problem, plan))
    _, found = problem.memo.trials[key]
    if isinstance(found, InfeasibleError):
        raise found
    return found


def _simulated(problem: Problem, plan: Plan) -> Timeline | InfeasibleError:
    try:
        program = lower(plan, problem.graph, clip=problem.job.clip_norm is not None)
    except PlanError as error:
        return InfeasibleError(str(error))
    result = simulate(
        program,
        plan,
        problem.graph,
        problem.profile,
        problem.cluster,
        optimizer_copies=problem.copies,
        spans=False,
    )
    for use in result.devices:
        budget = problem.cluster.device(use.device).memory_bytes
        if use.peak_memory_bytes > budget:
            peak, over = format_bytes(use.peak_memory_bytes), format_bytes(use.peak_memory_bytes - budget)
            return ShortageError(
                use.peak_memory_bytes - budget,
                f"{use.device} peaks at {peak} when simulated, its budget is "
                f"{format_bytes(budget)}, {over} short; raise its memory, shrink the batch or add devices",
            )
    return result


def priced(
    problem: Problem,
    strategy: str,
    outlines: Sequence[Outline],
    *,
    depth: Depth = "deep",
    schedule: ScheduleName = "1f1b",
) -> list[Priced]:
    """The plans of all outlines that are feasible, cheapest first, each once.

    Raises:
        InfeasibleError: none is; tells why of the one that comes closest.
    """
    found: dict[Plan, float] = {}
    reasons: list[InfeasibleError] = []
    for outline in outlines:
        try:
            plan = build(problem, strategy, outline, depth=depth, schedule=schedule)
        except InfeasibleError as error:
            reasons.append(error)
            continue
        if plan not in found:
            found[plan] = price(problem, plan).step_time_s
    if not found and reasons:
        raise closest(reasons)
    if not found:
        raise InfeasibleError(
            "the links allow no plan; data devices must reach those of the first and last stage"
        )
    return sorted((Priced(plan, p) for plan, p in found.items()), key=lambda entry: entry.price_s)


def simulated(problem: Problem, candidates: Sequence[Priced], limit: int) -> list[Plan]:
    """About ``limit`` candidates worth simulating, least simulated step time first.

    The formula is optimistic by a factor that grows with the number of stages, above all where a device holds
    several. That factor is learnt on the way, per kind of plan: next comes the candidate with the least price
    times the least factor seen for its kind, so that a kind that disappoints makes room for others.

    Raises:
        InfeasibleError: none fits in simulation.
    """
    left: list[Priced] = list(candidates)
    least = float("inf")
    factor: dict[tuple[int, int], float] = {}
    done: list[tuple[float, int, Plan]] = []
    reason: InfeasibleError | None = None
    tried, effort = 0, 0
    while left and not (done and (tried >= limit or (effort > MOST_EFFORT and tried >= 3))):
        candidate = min(left, key=lambda c: c.price_s * factor.get(c.kind, 1.0) * c.handicap)
        left.remove(candidate)
        tried += 1
        effort += candidate.effort
        try:
            seconds = timeline(problem, candidate.plan).step_time_s
        except InfeasibleError as error:
            reason = reason or error
            continue
        factor[candidate.kind] = min(
            factor.get(candidate.kind, float("inf")), seconds / max(candidate.price_s, 1e-12)
        )
        done.append((seconds, tried, candidate.plan))
        least = min(least, seconds)
        left = [c for c in left if c.price_s <= HOPELESS * least]
    if not done:
        raise reason or InfeasibleError("there is nothing to choose from")
    return [plan for _, _, plan in sorted(done, key=lambda entry: entry[:2])]


def fastest(problem: Problem, candidates: Sequence[Priced], limit: int) -> Plan:
    """The first of ``simulated``."""
    return simulated(problem, candidates, limit)[0]


def at_both_depths(problem: Problem, strategy: str, outlines: Sequence[Outline], limit: int) -> Plan:
    """The fastest of the outlines with warm-up 2(P-p)-1, the best quarter of them also with P-p.

    The best few are tried with backwards in two halves, too.

    Where a device holds several stages, which depth is better cannot be told before, and both are candidates.
    """
    pool = priced(problem, strategy, outlines)
    shared = [outline for outline in outlines if _is_shared(outline)]
    if shared:
        pool += priced(problem, strategy, shared, depth="shallow")
    ranked = simulated(problem, pool, limit)
    best = ranked[: max(2, limit // 4)]
    shallow = [Priced(_shallow(plan), 0.0) for plan in best if len(plan.stages) > 1]
    winner = fastest(problem, [Priced(best[0], 0.0), *shallow], 1 + len(shallow))
    winner = shifted(problem, winner, limit)
    winner = recomputed(problem, list(dict.fromkeys((winner, *best))))
    winner = halved(problem, list(dict.fromkeys((winner, *ranked))))
    if winner.schedule == "zero_bubble":
        winner = shifted(problem, winner, limit // 2)
    return segmented(problem, winner)


def halved(problem: Problem, plans: Sequence[Plan]) -> Plan:
    """The fastest zero_bubble variant of any of the plans if that pays, else the first plan.

    Which plan is best in halves is not known from how fast it is without: one variant of each is tried, and
    of the best the others too.
    """
    first: dict[Plan, Plan] = {}
    for plan in plans:
        variant = next(zero_bubble_variants(problem, plan), None)
        if variant is not None:
            first[variant] = plan
    best = _paying(problem, plans[0], list(first))
    return _paying(problem, best, list(zero_bubble_variants(problem, first.get(best, best))))


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

    The first segments are summed while the last micro-batch still leaves the gradients of others behind.
    """
    if not plan.syncs:
        return plan
    more = [tuple(sync.model_copy(update={"segments": count}) for sync in plan.syncs) for count in SEGMENTS]
    return _paying(problem, plan, [plan.model_copy(update={"syncs": syncs}) for syncs in more])


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

    A zero_bubble plan gets new orders at the new borders.
    """
    best, least = plan, timeline(problem, plan).step_time_s
    depth: Depth = "shallow" if _shallow(plan) == plan else "deep"
    tried = [plan]
    moved = True
    while moved:
        moved = False
        near = [p for o in _near(problem, best) for p in _built(problem, best.strategy, o, depth)]
        for candidate in sorted(near, key=lambda entry: entry.price_s):
            found = [candidate.plan] if candidate.price_s <= HOPELESS * least else []
            if best.schedule == "zero_bubble":  # the formula, without halves, is no bound
                found = list(islice(zero_bubble_variants(problem, candidate.plan), 1))
            if not found or found[0] in tried:
                continue
            if len(tried) > limit:
                return best
            tried += found
            try:
                seconds = timeline(problem, found[0]).step_time_s
            except InfeasibleError:
                continue
            if seconds < least:
                best, least, moved = found[0], seconds, True
                break
    return best


def _built(problem: Problem, strategy: str, outline: Outline, depth: Depth) -> list[Priced]:
    try:
        return priced(problem, strategy, [outline], depth=depth)
    except InfeasibleError:
        return []


def _near(problem: Problem, plan: Plan) -> list[Outline]:
    """The same devices with one border, or both borders of a stage, one layer further."""
    ids, last = problem.cluster.ids, len(plan.stages) - 1
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
                group = tuple(ids.index(d) for d in stage.devices)
                rows = tuple(r.rows for r in stage.replicas) if fixed else None
                spans.append(Span(a, b, group if fixed else tuple(sorted(group)), rows))
            out.append(Outline(plan.micro_batches, tuple(spans)))
    return out


def _shallow(plan: Plan) -> Plan:
    """The same with warm-up depths of at most P-p; it needs no more memory."""
    total = len(plan.stages)
    stages = tuple(
        stage.model_copy(update={"warmup": min(stage.warmup, total - number)})
        for number, stage in enumerate(plan.stages)
    )
    return plan.model_copy(update={"stages": stages})


def _is_shared(outline: Outline) -> bool:
    held = [device for span in outline.spans for device in span.group]
    return len(set(held)) < len(held)
