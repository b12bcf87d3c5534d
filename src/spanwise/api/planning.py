"""Choosing a plan and predicting it. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError
from spanwise.core.faults import Fault
from spanwise.core.importance import Importance
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.core.timeline import Timeline
from spanwise.cost.training import optimizer_copies
from spanwise.lowering import lower
from spanwise.planner import Problem, compare, fastest_of, make_plan
from spanwise.simulator import simulate

if TYPE_CHECKING:
    from spanwise.planner import Evaluation


def choose(
    job: Job, cluster: Cluster, graph: ModelGraph, times: Profile, strategy: str,
    importance: Importance | None = None,
) -> tuple[Plan, tuple[Evaluation, ...]]:  # fmt: skip
    """The plan of a strategy; ``auto`` compares all and returns what each is predicted to give.

    ``importance``: for those that choose what each device trains.
    """
    return choose_for(
        Problem(graph=graph, profile=times, cluster=cluster, job=job, importance=importance), strategy
    )


def choose_for(problem: Problem, strategy: str) -> tuple[Plan, tuple[Evaluation, ...]]:
    """The same of a Problem, which then knows all plans that were simulated."""
    if strategy != "auto":
        return make_plan(problem, strategy), ()
    evaluations = compare(problem)
    return fastest_plan(problem, evaluations), evaluations


def fastest_plan(problem: Problem, evaluations: tuple[Evaluation, ...]) -> Plan:
    """The plan of the strategy with the least simulated step time.

    Raises:
        InfeasibleError: none has a plan; tells why of each.
    """
    best = fastest_of(evaluations)
    if best is None or best.plan is None:
        reasons = "; ".join(f"{e.strategy}: {e.reason}" for e in evaluations)
        raise InfeasibleError(f"no strategy has a plan for this job on '{problem.cluster.name}'. {reasons}")
    return best.plan


def predict(
    plan: Plan,
    graph: ModelGraph,
    times: Profile,
    cluster: Cluster,
    job: Job,
    *,
    steps: int = 3,
    faults: tuple[Fault, ...] = (),
) -> Timeline:
    """The simulated Timeline of a plan."""
    program = lower(plan, graph, clip=job.clip_norm is not None)
    copies = optimizer_copies(job.optimizer)
    return simulate(program, plan, graph, times, cluster, optimizer_copies=copies, steps=steps, faults=faults)
