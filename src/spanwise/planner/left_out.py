"""Devices that a plan does not use, and why: said, not passed over."""

from __future__ import annotations

from spanwise.core.plan import Plan
from spanwise.core.units import format_bytes
from spanwise.planner.problem import Problem


def left_out(problem: Problem, plan: Plan) -> dict[str, str]:
    """Why each device of the cluster that is not in the plan is not: links, memory, or no gain."""
    return {d: _reason(problem, plan, d) for d in problem.cluster.ids if d not in plan.devices}


def _reason(problem: Problem, plan: Plan, device: str) -> str:
    cluster = problem.cluster
    missing = [
        (a, b)
        for other in plan.devices
        for a, b in ((device, other), (other, device))
        if not cluster.connected(a, b)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"no link from {missing[0][0]} to {missing[0][1]}{more}; add links to use it"
    least = min(layer.parameter_bytes for layer in problem.graph.layers) * (2 + problem.copies)
    budget = cluster.device(device).memory_bytes
    if least > budget:
        return f"the smallest layer needs {format_bytes(least)}, its budget is {format_bytes(budget)}"
    return "no plan that was found is faster with it"
