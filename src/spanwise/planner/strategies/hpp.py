"""``hpp``: hybrid pipeline parallelism, stages held by groups of unlike devices with uneven rows.

After Asteroid (Ye et al., MobiCom 2024) and SpanTrain (Wang, Liu et al., Big Data Research 2025, arXiv
2505.15536). Asteroid's equations are known to us from unofficial re-implementations, of SpanTrain only the
abstracts; the search over sets of devices instead of one device order is our own (``search/sets.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
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
from spanwise.planner.strategies.pipeline import pipeline, pipeline_outlines

FINALISTS = 16
IN_HALVES = 48  # outlines that are the best in halves
MOST_WITH_RIVALS = 12  # devices: with more, narrower searches take as long as all the rest and rarely help


def hpp(problem: Problem) -> Plan:
    """Layers, groups, rows, micro-batches and warm-up depths with the least simulated step time found.

    Raises:
        InfeasibleError: memory, links or data constraints allow no plan.
    """
    outlines = refined_outlines(problem, singles=False)
    if not outlines:
        outlines = refined_outlines(problem, singles=False, in_flight=0)
    elif _memory_binds(problem, outlines):
        outlines += refined_outlines(problem, singles=False, deep=True)
        for in_flight in (0, 2, 4):  # 0: layers may run again
            outlines += refined_outlines(problem, singles=False, in_flight=in_flight)
    if not problem.first_is_fixed:
        outlines += weighted_outlines(problem, 1)[:4] + pipeline_outlines(problem)[:FINALISTS]
    halves = list[Outline]()
    if problem.thorough and len(problem.kinds) <= MOST_WITH_RIVALS and not problem.first_is_fixed:
        halves = refined_outlines(problem, singles=False, halves=True)[:IN_HALVES]
    ranked = sorted(outlines, key=lambda o: o.price_s)
    found = at_both_depths(problem, "hpp", ranked, FINALISTS, halves=halves, regroup="any")
    plans = [found, *_rivals(problem)]
    best = min(plans, key=lambda plan: timeline(problem, plan).step_time_s)
    return best.model_copy(update={"strategy": "hpp"})


def _rivals(problem: Problem) -> Iterator[Plan]:
    """What narrower searches come to, which are luckier at times: over single devices, and Asteroid's.

    Of 20 problems of 13 to 24 devices and 60 layers they won two, by 0.7 %, in a third of all planning time.
    """
    for planner in (pipeline, asteroid) if len(problem.kinds) <= MOST_WITH_RIVALS else ():
        try:
            found = planner(problem)
        except InfeasibleError:
            continue
        yield found if planner is pipeline else segmented(problem, halved(problem, [found]))


def _memory_binds(problem: Problem, outlines: list[Outline]) -> bool:
    """Whether memory lowered the warm-up depth of a good plan."""
    for entry in priced(problem, "hpp", outlines[:8]):
        plan = entry.plan
        for number, stage in enumerate(plan.stages):
            if stage.warmup < warmup("deep", number, len(plan.stages), plan.micro_batches):
                return True
    return False
