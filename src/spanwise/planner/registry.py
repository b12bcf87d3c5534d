"""Strategies and baselines by their literal names. ``auto`` takes the fastest of all."""

from __future__ import annotations

from collections.abc import Callable

from spanwise.core.errors import InfeasibleError, InputError, PlanError
from spanwise.core.plan import Plan
from spanwise.planner.advise import Evaluation, fastest_of, no_plan
from spanwise.planner.dsparse.strategy import SPARSE_STRATEGIES
from spanwise.planner.hiertrain.baselines import (
    all_cloud,
    all_device,
    all_edge,
    rounded_lp,
    split_two,
    two_tier,
)
from spanwise.planner.hiertrain.strategy import hiertrain, hiertrain_n
from spanwise.planner.plans.feasible import broken_rule
from spanwise.planner.plans.trial import timeline
from spanwise.planner.problem import Problem
from spanwise.planner.published.asteroid import asteroid
from spanwise.planner.published.dapple import dapple
from spanwise.planner.published.hetpipe import hetpipe
from spanwise.planner.published.pipedream import pipedream
from spanwise.planner.strategies.data_parallel import data_parallel, weighted_data_parallel
from spanwise.planner.strategies.gpipe import gpipe
from spanwise.planner.strategies.hpp import hpp
from spanwise.planner.strategies.parameter_server import SERVER_STRATEGIES
from spanwise.planner.strategies.pipeline import pipeline
from spanwise.planner.strategies.single import single

# What they raise is a reason without their name: ``make_plan`` and reports put that in front.
STRATEGIES: dict[str, Callable[[Problem], Plan]] = {
    "single": single,
    "data_parallel": data_parallel,
    "weighted_data_parallel": weighted_data_parallel,
    "gpipe": gpipe,
    "pipeline": pipeline,
    "hiertrain": hiertrain,
    "hiertrain_n": hiertrain_n,
    "hpp": hpp,
}

# Planners of others from their published rules, to compare with; ``auto`` does not consider them.
BASELINES: dict[str, Callable[[Problem], Plan]] = {
    "asteroid": asteroid,
    "pipedream": pipedream,
    "dapple": dapple,
    "hetpipe": hetpipe,
    "gpipe": gpipe,
    "all_device": all_device,
    "all_edge": all_edge,
    "all_cloud": all_cloud,
    "split_two": split_two,
    "two_tier": two_tier,
    "rounded_lp": rounded_lp,
}


def make_plan(problem: Problem, strategy: str = "auto") -> Plan:
    """The plan of one strategy or baseline; ``auto``: of the one in ``STRATEGIES`` that is simulated fastest.

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
    planners = BASELINES | SERVER_STRATEGIES | SPARSE_STRATEGIES | STRATEGIES
    planner = planners.get(strategy)
    if planner is None:
        others = (*BASELINES, *SERVER_STRATEGIES, *SPARSE_STRATEGIES)
        known = ", ".join(dict.fromkeys((*STRATEGIES, "auto", *others)))
        raise InputError(f"strategy '{strategy}': unknown; known: {known}")
    try:
        return planner(problem)
    except InfeasibleError as error:
        raise InfeasibleError(f"{strategy}: {error}") from error


def compare(problem: Problem) -> tuple[Evaluation, ...]:
    """Every strategy, planned and simulated (without spans), in the order of the registry."""
    return tuple(_evaluate(problem, name, planner) for name, planner in STRATEGIES.items())


def compare_baselines(problem: Problem) -> tuple[Evaluation, ...]:
    """The same of every baseline."""
    return tuple(_evaluate(problem, name, planner) for name, planner in BASELINES.items())


def check_plan(problem: Problem, plan: Plan) -> None:
    """``PlanError`` if a plan from elsewhere breaks a rule of links, privacy or batch statistics."""
    rule = broken_rule(problem, plan)
    if rule:
        raise PlanError(f"plan '{plan.strategy}': {rule}; plan again")


def _evaluate(problem: Problem, name: str, planner: Callable[[Problem], Plan]) -> Evaluation:
    try:
        plan = planner(problem)
        return Evaluation(name, plan, timeline(problem, plan), "")
    except InfeasibleError as error:
        return Evaluation(name, None, None, str(error))
