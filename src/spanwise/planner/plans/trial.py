"""Finalists are decided by the simulator: lower, simulate, keep the fastest that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from spanwise.core.errors import InfeasibleError, PlanError
from spanwise.core.plan import Plan, ScheduleName
from spanwise.core.timeline import Timeline
from spanwise.core.units import format_bytes
from spanwise.lowering import unchecked
from spanwise.planner.garbage import without_collection
from spanwise.planner.outline import Outline
from spanwise.planner.plans.build import Depth, build
from spanwise.planner.plans.feasible import ShortageError, closest
from spanwise.planner.plans.price import price
from spanwise.planner.problem import Problem
from spanwise.simulator import simulate

# The formula is at times above the simulation, by at most 3.2 % of 314 random pipelines (own measurement, see
# tests/unit/test_planner_price.py); beyond this factor of the best simulated time a plan can hardly win.
HOPELESS = 1.15
# Forwards, backwards and messages that a planner simulates among its finalists, in one plan at least.
MOST_EFFORT = 12_000


@dataclass(frozen=True)
class Priced:
    """A plan and its step time by formula."""

    plan: Plan
    price_s: float

    @cached_property
    def kind(self) -> tuple[int, int]:
        """Number of stages; where a device holds several also the depth of the first."""
        held = [device for stage in self.plan.stages for device in stage.devices]
        return len(self.plan.stages), 0 if len(set(held)) == len(held) else self.plan.stages[0].warmup

    @cached_property
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


def seconds_of(problem: Problem, plan: Plan) -> float | None:
    """A step by simulation; none if the plan does not fit or no order of it can end."""
    try:
        return timeline(problem, plan).step_time_s
    except InfeasibleError:
        return None


def timed(problem: Problem) -> Iterator[tuple[Plan, float]]:
    """All plans that were simulated for a problem so far and fit, with the seconds of a step."""
    for plan, (_, found) in problem.memo.trials.items():
        if isinstance(found, Timeline):
            yield plan, found.step_time_s


def unbounded_timeline(problem: Problem, plan: Plan) -> Timeline:
    """The same whatever the budgets, simulated anew.

    Raises:
        PlanError: no order of the plan can end.
    """
    with without_collection():
        return simulate(
            unchecked(plan, problem.graph, clip=problem.job.clip_norm is not None),
            plan,
            problem.graph,
            problem.profile,
            problem.cluster,
            optimizer_copies=problem.copies,
            spans=False,
        )


def _simulated(problem: Problem, plan: Plan) -> Timeline | InfeasibleError:
    try:
        result = unbounded_timeline(problem, plan)
    except PlanError as error:
        return InfeasibleError(str(error))
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
