"""``gpipe``: equally many layers a device, all forwards before all backwards. Huang et al., NeurIPS 2019."""

from __future__ import annotations

from spanwise.core.plan import Plan
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.pace import pace_s
from spanwise.planner.plans.trial import Priced, fastest, priced
from spanwise.planner.problem import Problem
from spanwise.planner.strategies.pipeline import one_source

FINALISTS = 3


def gpipe(problem: Problem) -> Plan:
    """Equal layer counts, one device a stage in file order.

    With private data the data device comes first and, unless labels may leave, also last.

    Raises:
        InfeasibleError: private data lies on several devices, memory is short, or a link is missing.
    """
    one_source(problem)
    layers = len(problem.graph)
    order = list(range(len(problem.cluster.devices)))
    if problem.first_is_fixed:
        first = problem.index[problem.sources[0]]
        order = [first, *(d for d in order if d != first)]
        if problem.last_is_fixed and len(order) > 1 and layers > 2:
            order = [*order[: layers - 1], first]
    order = order[:layers]
    edges = [round(layers * i / len(order)) for i in range(len(order) + 1)]
    spans = tuple(Span(a, b, (d,)) for a, b, d in zip(edges, edges[1:], order, strict=False))
    if problem.last_is_fixed and spans[-1].group != spans[0].group:
        spans = (Span(0, layers, spans[0].group),)
    outlines = [Outline(m, spans) for m in reversed(problem.micro_batch_choices())]
    found = priced(problem, "gpipe", outlines, schedule="gpipe")
    return fastest(problem, [Priced(c.plan, pace_s(problem, c.plan)) for c in found], FINALISTS)
