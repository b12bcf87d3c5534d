"""Plans exactly as a published rule decides them: nothing is repaired, what does not hold is a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan, Stage
from spanwise.lowering import natural_syncs
from spanwise.planner.plans.feasible import broken_rule, closest, shortage
from spanwise.planner.plans.trial import timeline
from spanwise.planner.problem import Problem


@dataclass(frozen=True, slots=True)
class Decision:
    """What a rule decided for one micro-batch count: layers, devices, rows and warm-up depths."""

    micro_batches: int
    stages: tuple[Stage, ...]


def exactly(problem: Problem, strategy: str, decision: Decision) -> Plan:
    """The Plan of a decision under 1F1B with a flush.

    Raises:
        InfeasibleError: by formula it needs more memory than a device has, or it breaks a rule of links,
            privacy or batch statistics.
    """
    short = shortage(problem, decision.stages, "1f1b", decision.micro_batches)
    if short is not None:
        raise short.error()
    rows = problem.job.batch // decision.micro_batches
    plan = Plan(
        strategy=strategy,
        graph_digest=problem.graph.digest,
        micro_batches=decision.micro_batches,
        micro_batch_rows=rows,
        sources=problem.source_rows(rows) or decision.stages[0].replicas,
        stages=decision.stages,
        schedule="1f1b",
        syncs=natural_syncs(decision.stages, problem.graph),
    )
    broken = broken_rule(problem, plan)
    if broken:
        raise InfeasibleError(broken)
    return plan


def fastest_decision(problem: Problem, strategy: str, decisions: Sequence[Decision]) -> Plan:
    """The plan with the least simulated step time.

    The papers take the micro-batch as given. Here each count has its own plan by the rule, and the baseline
    gets the count that suits it best.

    Raises:
        InfeasibleError: none holds; tells why of the one that comes closest.
    """
    best: tuple[float, Plan] | None = None
    reasons: list[InfeasibleError] = []
    for decision in decisions:
        try:
            plan = exactly(problem, strategy, decision)
            seconds = timeline(problem, plan).step_time_s
        except InfeasibleError as error:
            reasons.append(error)
            continue
        if best is None or seconds < best[0]:
            best = (seconds, plan)
    if best is None:
        raise closest(reasons) if reasons else InfeasibleError("its rule gives no plan for these devices")
    return best[1]
