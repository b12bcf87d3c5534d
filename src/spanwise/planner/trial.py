"""Finalists are decided by the simulator: lower, simulate, keep the fastest that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from spanwise.core.errors import InfeasibleError, PlanError
from spanwise.core.plan import Plan, ScheduleName
from spanwise.core.timeline import Timeline
from spanwise.core.units import format_bytes
from spanwise.lowering import lower
from spanwise.planner.build import Depth, build
from spanwise.planner.feasible import ShortageError, closest
from spanwise.planner.outline import Outline, Span
from spanwise.planner.pace import pace_s
from spanwise.planner.price import price
from spanwise.planner.problem import Problem
from spanwise.simulator import simulate

# The formula is at times above the simulation, by at most 3.2 % of 314 random pipelines (own measurement, see
# tests/unit/test_planner_price.py); beyond this factor of the best simulated time a plan can hardly win.
HOPELESS = 1.15
SLACK = 0.01  # a plan whose pace is slower than the best's by more is hardly faster when simulated
# Forwards, backwards and messages that a planner simulates among its finalists, in one plan at least.
MOST_EFFORT = 12_000
# The same of plans whose pace is worked out, which takes about a tenth of the time.
MOST_PACED_EFFORT = 30_000
BUILT = 8  # plans are built and priced in the time that the pace of one takes
MOST_PACED = 5  # times as many plans as are simulated, at most


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
    most = MOST_EFFORT * (2 if any(candidate.kind[1] for candidate in left) else 1)  # no pace tells of these
    while left and not (done and tried >= limit):
        candidate = min(left, key=lambda c: c.price_s * factor.get(c.kind, 1.0) * c.handicap)
        if done and effort + candidate.effort > most:
            break
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
    """The fastest of the outlines and of their likes, with warm-up 2(P-p)-1 or P-p."""
    pool = priced(problem, strategy, outlines)
    # Where memory lowers the depth, it does so stage by stage, and P-p may fit at once.
    lowered = any(_is_lowered(entry.plan) for entry in pool)
    again = [outline for outline in outlines if lowered or _is_shared(outline)]
    if again:
        pool += priced(problem, strategy, again, depth="shallow")
    pool += _recounted_pool(problem, strategy, pool, 2 * limit)
    likely = climbed(problem, strategy, paced(problem, pool, limit), limit)
    return shifted(problem, fastest(problem, likely, 3 * limit), limit)


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


def shifted(problem: Problem, plan: Plan, limit: int) -> Plan:
    """Moves single layers over stage borders while the simulator agrees, in at most ``limit`` simulations."""
    best, least = plan, timeline(problem, plan).step_time_s
    pace, first = pace_s(problem, plan), Priced(plan, 0.0)
    is_shared = first.kind[1] > 0
    depth: Depth = "shallow" if _shallow(plan) == plan else "deep"
    limit = limit if is_shared else max(1, min(limit, MOST_EFFORT // (2 * first.effort)))
    tried = [plan]
    moved = True
    while moved:
        moved = False
        near = [p for o in _near(problem, best) for p in _built(problem, best.strategy, o, depth)]
        near.sort(key=lambda entry: entry.price_s)
        untried = [c for c in near[: 4 * limit] if c.plan not in tried]
        faster = [Priced(c.plan, pace_s(problem, c.plan)) for c in untried]
        hopeless = HOPELESS * least if is_shared else pace * (1 + SLACK)
        for candidate in sorted(faster, key=lambda entry: entry.price_s):
            if candidate.price_s >= hopeless:
                break
            if len(tried) > limit:
                return best
            tried.append(candidate.plan)
            try:
                seconds = timeline(problem, candidate.plan).step_time_s
            except InfeasibleError:
                continue
            if seconds < least:
                best, least, pace, moved = candidate.plan, seconds, candidate.price_s, True
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
