"""The same stages run another way: layers that run again, sums in segments. In halves: ``halved.py``.

Which of several plans is best so is not known from how fast each is without, so these take plans in a row,
the fastest first.
"""

from __future__ import annotations

from collections.abc import Sequence

from spanwise.core.plan import Plan
from spanwise.planner.plans.build import fitted, warmup
from spanwise.planner.plans.feasible import shortage
from spanwise.planner.plans.trial import MOST_EFFORT, Priced, seconds_of, timeline
from spanwise.planner.problem import Problem
from spanwise.planner.segments.rings import cut_by_layers, hidden_s

MOST_SEGMENTED, MOST_SEGMENTED_EFFORT = 3, MOST_EFFORT // 2  # besides the first, likewise
# By which part such variants of a plan must be faster: more actions cost what the simulator does not show.
LEAST_GAIN = 0.005


def recomputed(problem: Problem, plans: Sequence[Plan]) -> Plan:
    """The fastest of the plans at warm-up depth 2(P-p)-1 with layers run again, if that pays, else the first.

    Only those whose depth memory does not allow otherwise.
    """
    again = [run_again(problem, plan) for plan in plans]
    return paying(problem, plans[0], [plan for plan in again if plan is not None])


def run_again(problem: Problem, plan: Plan) -> Plan | None:
    """The plan at warm-up depth 2(P-p)-1 with as many layers run again as memory asks for, if it does."""
    total, count = len(plan.stages), plan.micro_batches
    deep = [
        stage.model_copy(update={"warmup": warmup("deep", number, total, count), "recompute": ()})
        for number, stage in enumerate(plan.stages)
    ]
    if shortage(problem, tuple(deep), plan.schedule, count) is None:
        return None
    stages, short = fitted(problem, deep, plan.schedule, count, recompute=True)
    return None if short is not None or stages == plan.stages else plan.model_copy(update={"stages": stages})


def segmented(problem: Problem, plans: Sequence[Plan]) -> Plan:
    """The first plan or one of the others with its gradients summed in several segments, if that pays.

    The first segments are summed while the last micro-batch still leaves the gradients of others behind. Cut
    at layers, where the formula of a ring has its optimum: of 109 cases two or four segments of equal bytes
    were better in one, by 0.1 %. The other plans are simulated ones; a few may win by what the formula hides.
    """
    best = _in_segments(problem, plans[0], plans[0])
    effort = 0
    for plan, _ in _promising(problem, best, plans[1:])[:MOST_SEGMENTED]:
        effort += Priced(plan, 0.0).effort
        if effort > MOST_SEGMENTED_EFFORT:
            break
        best = _in_segments(problem, best, plan)
    return best


def _in_segments(problem: Problem, best: Plan, plan: Plan) -> Plan:
    cut = cut_by_layers(problem, plan) if plan.syncs else plan
    return best if cut == plan else paying(problem, best, [cut])


def _promising(problem: Problem, best: Plan, plans: Sequence[Plan]) -> list[tuple[Plan, float]]:
    """Plans that would be faster than the best without what their segments can hide, and those seconds."""
    enough = (1 - LEAST_GAIN) * timeline(problem, best).step_time_s
    found: list[tuple[Plan, float]] = []
    for plan in plans:
        seconds = seconds_of(problem, plan) if plan.syncs else None
        if seconds is not None and (least := seconds - hidden_s(problem, plan)) < enough:
            found.append((plan, least))
    return sorted(found, key=lambda entry: entry[1])


def paying(problem: Problem, plan: Plan, variants: Sequence[Plan]) -> Plan:
    """The fastest of the variants that fit, if it is faster than the plan by enough; else the plan."""
    best, least = plan, (1 - LEAST_GAIN) * timeline(problem, plan).step_time_s
    for variant in variants:
        seconds = seconds_of(problem, variant)
        if seconds is not None and seconds < least:
            best, least = variant, seconds
    return best
