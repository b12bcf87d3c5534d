"""``single``: everything on the best device, the data moved there."""

from __future__ import annotations

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.trial import fastest, priced
from spanwise.planner.problem import Problem

FINALISTS = 5


def single(problem: Problem) -> Plan:
    """The fastest one-device plan by simulation, moving the data included.

    Raises:
        InfeasibleError: private data lies on several devices, or no device has the memory.
    """
    ids = problem.cluster.ids
    if problem.first_is_fixed and len(problem.sources) > 1:
        raise InfeasibleError(
            f"raw data on {' and '.join(problem.sources)} must not leave them (private = true), "
            "so no single device may hold all of it"
        )
    allowed = problem.sources if problem.first_is_fixed else ids
    layers = len(problem.graph)
    outlines = [
        Outline(m, (Span(0, layers, (ids.index(d),)),))
        for d in allowed
        for m in problem.micro_batch_choices()[::-1]
    ]
    return fastest(problem, priced(problem, "single", outlines), FINALISTS)
