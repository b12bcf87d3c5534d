"""``hpp``: hybrid pipeline parallelism, stages held by groups of unlike devices with uneven rows.

After Asteroid (Ye et al., MobiCom 2024) and SpanTrain (Wang, Liu et al., Big Data Research 2025, arXiv
2505.15536). Asteroid's equations are known to us from unofficial re-implementations, of SpanTrain only the
abstracts; the search over sets of devices instead of one device order is our own (``search/sets.py``).
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner.garbage import without_collection
from spanwise.planner.outline import Outline
from spanwise.planner.plans.build import warmup
from spanwise.planner.plans.finish import at_both_depths
from spanwise.planner.plans.halved import halved
from spanwise.planner.plans.trial import priced, timeline
from spanwise.planner.plans.variants import segmented
from spanwise.planner.problem import Problem
from spanwise.planner.published.asteroid import asteroid
from spanwise.planner.search.outlines import refined_outlines
from spanwise.planner.strategies.data_parallel import weighted_outlines

FINALISTS = 16
IN_HALVES = 48  # outlines that are the best in halves
MANY = 12  # devices; with more only plans in halves are searched for, and Asteroid's is not tried


@without_collection()
def hpp(problem: Problem) -> Plan:
    """Layers, groups, rows, micro-batches and warm-up depths with the least simulated step time found.

    Raises:
        InfeasibleError: memory, links or data constraints allow no plan.
    """
    few = len(problem.kinds) <= MANY
    halves = list[Outline]()
    if problem.thorough and not problem.first_is_fixed:
        halves = refined_outlines(problem, singles=False, halves=True)
    search = partial(refined_outlines, problem, singles=False, halves=bool(halves) and not few)
    outlines = search()
    if not outlines:
        outlines = search(in_flight=0)
    elif _memory_binds(problem, outlines):
        outlines += search(deep=True)
        for in_flight in (0, 2, 4):  # 0: layers may run again
            outlines += search(in_flight=in_flight)
    if not problem.first_is_fixed:
        outlines += weighted_outlines(problem, 1)[:4]
    ranked = sorted(outlines, key=lambda o: o.price_s)
    plans = [at_both_depths(problem, "hpp", ranked, FINALISTS, halves=halves[:IN_HALVES], regroup="any")]
    if few:
        with suppress(InfeasibleError):
            plans.append(segmented(problem, halved(problem, [asteroid(problem)])))
    best = min(plans, key=lambda plan: timeline(problem, plan).step_time_s)
    return best.model_copy(update={"strategy": "hpp"})


def _memory_binds(problem: Problem, outlines: list[Outline]) -> bool:
    """Whether memory lowered the warm-up depth of a good plan."""
    for entry in priced(problem, "hpp", outlines[:8]):
        plan = entry.plan
        for number, stage in enumerate(plan.stages):
            if stage.warmup < warmup("deep", number, len(plan.stages), plan.micro_batches):
                return True
    return False
