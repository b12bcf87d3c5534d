"""Baselines of HierTrain: everything on a machine of one tier, one cut for all rows, one helper, rounding.

As far as they are known to us from reports of the paper (arXiv 2003.09876); rows are sent raw, and that takes
time. All but ``rounded_lp`` are searched and simulated as ``hiertrain`` is, over as many machines and
micro-batch counts, and are parts of what it looks at; but what they find is not changed any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spanwise.core.cluster import Tier
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner.hiertrain.instance import promising
from spanwise.planner.hiertrain.plan import Arena
from spanwise.planner.hiertrain.relaxed import rounded_rows
from spanwise.planner.hiertrain.search import Numbers, Search
from spanwise.planner.hiertrain.strategy import (
    ALONE,
    MACHINES,
    ONE_HELPER,
    SPLIT,
    THREE_MACHINES,
    Kind,
    fastest,
    of_families,
    refuse_many_sources,
    simulated,
)
from spanwise.planner.problem import Problem


def all_device(problem: Problem) -> Plan:
    """Everything on one of the devices with the data, or, where the data is everywhere, of tier ``end``.

    Raises:
        InfeasibleError: none of them may have or holds it all.
    """
    return _alone(problem, "all_device", problem.sources or _of_tier(problem, "end"))


def all_edge(problem: Problem) -> Plan:
    """Everything on one device of tier ``edge``.

    Raises:
        InfeasibleError: there is none, or none of them may have or holds it all.
    """
    return _alone(problem, "all_edge", _of_tier(problem, "edge"))


def all_cloud(problem: Problem) -> Plan:
    """Everything on one device of tier ``cloud``.

    Raises:
        InfeasibleError: there is none, or none of them may have or holds it all.
    """
    return _alone(problem, "all_cloud", _of_tier(problem, "cloud"))


def split_two(problem: Problem) -> Plan:
    """All rows through the first layers on one device and through the rest on another (as JointDNN divides).

    Raises:
        InfeasibleError: memory, links or data constraints allow none.
    """
    return _of(Arena.on(problem, promising(problem, MACHINES)), "split_two", SPLIT)


def two_tier(problem: Problem) -> Plan:
    """HierTrain with one helper.

    Raises:
        InfeasibleError: memory, links or data constraints allow none.
    """
    return _of(Arena.on(problem, promising(problem, MACHINES)), "two_tier", ONE_HELPER)


def rounded_lp(problem: Problem) -> Plan:
    """HierTrain as it is reported: the layout with the best linear programme, its rows rounded.

    One micro-batch; by formula everybody waits at every cut, every step begins with its raw rows, and the
    gradients of prefixes go to the finisher and back. Nothing is simulated to choose. What runs is a plan of
    ours, so its gradients are summed by rings, and nobody waits for more than its rows.

    Raises:
        InfeasibleError: memory, links or data constraints allow none.
    """
    refuse_many_sources(problem)
    problem.micro_batch_choices()  # raises where the batch has too few rows even in one piece
    arena = Arena.on(problem, promising(problem, MACHINES))
    instance = replace(arena.instance, sources=None, exchange="server")
    published = replace(arena, numbers=Numbers.of(instance))
    kinds = [kind for family in THREE_MACHINES for kind in family]
    bounds = [one for helpers, starts in kinds for one in published.families(helpers, starts=starts)]
    found = Search(instance, arena.room, "barrier", rounded_rows).best(bounds)
    if not found:  # a plan that does not fit tells what is short
        found = Search(instance, arena.roomy, "barrier", rounded_rows).best(bounds)
    return fastest(simulated(arena, "rounded_lp", found)).plan


def _of(arena: Arena, strategy: str, kind: Kind) -> Plan:
    return fastest(of_families(arena, strategy, ((kind,),))).plan


def _of_tier(problem: Problem, tier: Tier) -> tuple[str, ...]:
    """The devices of a tier.

    Raises:
        InfeasibleError: there are none.
    """
    found = tuple(device.id for device in problem.cluster.devices if device.tier == tier)
    if not found:
        tiers = ", ".join(f"{device.id}: {device.tier}" for device in problem.cluster.devices)
        raise InfeasibleError(f"no device is of tier '{tier}' ({tiers}); set tier = \"{tier}\" on one")
    return found


def _alone(problem: Problem, strategy: str, devices: Sequence[str]) -> Plan:
    if problem.first_is_fixed and problem.sources not in [(device,) for device in devices]:
        raise InfeasibleError(
            f"raw data on {' and '.join(problem.sources)} must not leave (private = true), but here "
            f"everything is on one of {', '.join(devices)}; use hiertrain_n"
        )
    arena = Arena.on(problem, tuple(problem.index[device] for device in devices))
    return _of(arena, strategy, ALONE)
