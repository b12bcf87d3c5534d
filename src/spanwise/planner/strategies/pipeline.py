"""``pipeline``: consecutive layers balanced by time, one device a stage."""

from __future__ import annotations

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner.outline import Outline
from spanwise.planner.plans.finish import at_both_depths
from spanwise.planner.problem import Problem
from spanwise.planner.search.outlines import all_cut_outlines, refined_outlines

FINALISTS = 6
ALL_CUTS_DEVICES = 6
ALL_CUTS_LAYERS = 100


def pipeline(problem: Problem) -> Plan:
    """Exact by formula over all cuts, device orders and subsets up to 6 devices; then decided by simulation.

    Raises:
        InfeasibleError: private data lies on several devices, or memory or links allow no pipeline.
    """
    one_source(problem)
    return at_both_depths(problem, "pipeline", _outlines(problem), FINALISTS, regroup="singles")


def _outlines(problem: Problem) -> list[Outline]:
    """Cheapest by formula first; if memory allows none, the best without regard to memory."""
    small = len(problem.cluster.devices) <= ALL_CUTS_DEVICES and len(problem.graph) <= ALL_CUTS_LAYERS
    search = all_cut_outlines if small else refined_outlines
    found = search(problem, singles=True, keep=24)
    return found or search(problem, singles=True, in_flight=0)


def one_source(problem: Problem) -> None:
    """``InfeasibleError`` if private data lies on several devices: a stage here is one device."""
    if problem.first_is_fixed and len(problem.sources) > 1:
        raise InfeasibleError(
            f"raw data on {' and '.join(problem.sources)} must not leave them (private = true), "
            "but every stage is one device here; use hpp"
        )
