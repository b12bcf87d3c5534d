"""Planners: functions from a Problem to a Plan, under literal names. ``auto`` takes the fastest of all."""

from __future__ import annotations

from collections.abc import Callable

from spanwise.core.errors import InfeasibleError, InputError, PlanError
from spanwise.core.plan import Plan
from spanwise.planner.advise import Advice, Evaluation, advise, fastest_of, no_plan
from spanwise.planner.data_parallel import data_parallel, weighted_data_parallel
from spanwise.planner.feasible import broken_rule
from spanwise.planner.gpipe import gpipe
from spanwise.planner.hpp import hpp
from spanwise.planner.pipeline import pipeline
from spanwise.planner.problem import Problem
from spanwise.planner.single import single
from spanwise.planner.trial import timeline

__all__ = ["STRATEGIES", "Advice", "Evaluation", "Problem", "advise", "check_plan", "compare", "make_plan"]

# What they raise is a reason without their name: ``make_plan`` and reports put that in front.
STRATEGIES: dict[str, Callable[[Problem], Plan]] = {
    "single": single,
    "data_parallel": data_parallel,
    "weighted_data_parallel": weighted_data_parallel,
    "gpipe": gpipe,
    "pipeline": pipeline,
    "hpp": hpp,
}


def make_plan(problem: Problem, strategy: str = "auto") -> Plan:
    """The plan of one strategy; ``auto``: of the one with the least simulated step time.

    Raises:
        InputError: there is no such strategy.
        InfeasibleError: it has no plan that keeps to memory, links and data constraints.
    """
    if strategy == "auto":
        evaluations = compare(problem)
        best = fastest_of(evaluations)
        if best is None or best.plan is None:
            raise InfeasibleError(f"auto: {no_plan(evaluations)}")
        return best.plan
    if strategy not in STRATEGIES:
        raise InputError(f"strategy '{strategy}': unknown; known: {', '.join((*STRATEGIES, 'auto'))}")
    try:
        return STRATEGIES[strategy](problem)
    except InfeasibleError as error:
        raise InfeasibleError(f"{strategy}: {error}") from error


def compare(problem: Problem) -> tuple[Evaluation, ...]:
    """Every strategy, planned and simulated (without spans), in the order of the registry."""
    return tuple(_evaluate(problem, name) for name in STRATEGIES)


def check_plan(problem: Problem, plan: Plan) -> None:
    """``PlanError`` if a plan from elsewhere breaks a rule of links, privacy or batch statistics."""
    rule = broken_rule(problem, plan)
    if rule:
        raise PlanError(f"plan '{plan.strategy}': {rule}; plan again")


def _evaluate(problem: Problem, strategy: str) -> Evaluation:
    try:
        plan = STRATEGIES[strategy](problem)
        return Evaluation(strategy, plan, timeline(problem, plan), "")
    except InfeasibleError as error:
        return Evaluation(strategy, None, None, str(error))
