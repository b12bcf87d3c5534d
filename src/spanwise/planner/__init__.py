"""Planners: functions from a Problem to a Plan, under literal names. ``auto`` takes the fastest of all."""

from spanwise.planner.advise import Advice, Evaluation, advise, bottleneck, fastest_of
from spanwise.planner.bounds.bound import Bound, lower_bound
from spanwise.planner.dsparse.strategy import SPARSE_STRATEGIES
from spanwise.planner.left_out import left_out
from spanwise.planner.problem import Problem
from spanwise.planner.registry import BASELINES, STRATEGIES, check_plan, compare, compare_baselines, make_plan
from spanwise.planner.sensitivity import MOST_REPLANS, WhatIf, what_if
from spanwise.planner.strategies.parameter_server import SERVER_STRATEGIES

__all__ = [
    "BASELINES",
    "MOST_REPLANS",
    "SERVER_STRATEGIES",
    "SPARSE_STRATEGIES",
    "STRATEGIES",
    "Advice",
    "Bound",
    "Evaluation",
    "Problem",
    "WhatIf",
    "advise",
    "bottleneck",
    "check_plan",
    "compare",
    "compare_baselines",
    "fastest_of",
    "left_out",
    "lower_bound",
    "make_plan",
    "what_if",
]
