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

# By how much freed memory that stays makes tensors dearer, as holes between what is kept: measured 1.1 to 1.3
# times with MobileNetV2, and 1.7 where layers run again (benchmarks/dsparse).
HOLES, HOLES_RUN_AGAIN = 1.4, 1.9


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


def tight_devices(plan: Plan, cluster: Cluster, predicted: Timeline) -> tuple[str, ...]:
    """Devices whose budget has no room for the holes that freed memory leaves.

    They hand it back, which costs time; a budget that is passed costs the run. Under sparse plans all do.
    """
    holes = HOLES_RUN_AGAIN if any(stage.recompute for stage in plan.stages) else HOLES
    return tuple(
        use.device
        for use in predicted.devices
        if holes * use.peak_memory_bytes > cluster.device(use.device).memory_bytes
    )
