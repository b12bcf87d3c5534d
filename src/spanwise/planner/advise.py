"""All strategies side by side, and whether distributing pays at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.core.timeline import Timeline
from spanwise.core.units import format_seconds
from spanwise.planner.plans.price import price
from spanwise.planner.problem import Problem

WORTH_IT = 1.05  # predictions are a few per cent off; a smaller gain may not exist


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One strategy, planned and simulated; ``reason`` tells why it is infeasible, empty if it is not."""

    strategy: str
    plan: Plan | None
    timeline: Timeline | None
    reason: str


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do.

    Attributes:
        winner: strategy with the least simulated step time.
        step_time_s: of the winner.
        single_device: best single device, none if no single device may or can do it.
        single_step_time_s: its simulated step time, moving the data included.
        speed_up: single over winner.
        bottleneck: what limits the winner.
        pays: whether distributing is worth it.
        sentence: all of it for people.
    """

    winner: str
    step_time_s: float
    single_device: str | None
    single_step_time_s: float | None
    speed_up: float | None
    bottleneck: str
    pays: bool
    sentence: str


def advise(problem: Problem, evaluations: Sequence[Evaluation]) -> Advice:
    """Judges evaluated strategies.

    Raises:
        InfeasibleError: none has a plan.
    """
    winner = fastest_of(evaluations)
    if winner is None or winner.plan is None or winner.timeline is None:
        raise InfeasibleError(no_plan(evaluations))
    seconds = winner.timeline.step_time_s
    limit = bottleneck(problem, winner.plan, winner.timeline)
    computing = winner.plan.computing
    single = next((e for e in evaluations if e.strategy == "single" and e.plan and e.timeline), None)
    if single is None or single.plan is None or single.timeline is None:
        reason = next((e.reason for e in evaluations if e.strategy == "single"), "single was not tried")
        sentence = (
            f"There is no single device to compare with ({reason}); {winner.strategy} on {_names(computing)} "
            f"takes {format_seconds(seconds)} a step, limited by {limit}."
        )
        return Advice(winner.strategy, seconds, None, None, None, limit, len(computing) > 1, sentence)
    alone, device = single.timeline.step_time_s, single.plan.stages[0].devices[0]
    speed_up = alone / seconds if seconds > 0 else 1.0
    pays = len(computing) > 1 and speed_up >= WORTH_IT
    compared = f"{format_seconds(seconds)} a step against {format_seconds(alone)} on {device} alone"
    if pays:
        sentence = (
            f"Distributing pays: {winner.strategy} on {_names(computing)} takes {compared}, "
            f"{speed_up:.2f} times as fast, limited by {limit}."
        )
    elif len(computing) > 1:
        sentence = (
            f"Distributing does not pay: {winner.strategy} on {_names(computing)} takes {compared}, "
            f"a gain of {100 * (speed_up - 1):.1f} % is within the error of the prediction."
        )
    else:
        alone_there = f"{_names(computing)} alone takes {format_seconds(seconds)} a step"
        sentence = f"Distributing does not pay: {alone_there}; {_rival(problem, evaluations)}."
    return Advice(winner.strategy, seconds, device, alone, speed_up, limit, pays, sentence)


def fastest_of(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The least simulated step time; the first listed of equals, as it is the simpler strategy."""
    feasible = [e for e in evaluations if e.timeline is not None]
    return min(feasible, key=lambda e: e.timeline.step_time_s if e.timeline else 0.0, default=None)


def no_plan(evaluations: Sequence[Evaluation]) -> str:
    """Why no strategy has a plan: the reason of the most general one, which is the last."""
    if not evaluations:
        return "no strategy was tried"
    return f"no strategy has a plan; {evaluations[-1].strategy}: {evaluations[-1].reason}"


def _rival(problem: Problem, evaluations: Sequence[Evaluation]) -> str:
    """The fastest plan on several computing devices of all that were simulated.

    A strategy may end on one device although it also tried several, so the plans it turned down count too.
    """
    tried = [(e.strategy, e.plan, e.timeline) for e in evaluations if e.plan and e.timeline]
    tried += [
        (strategy, plan, found)
        for plan, (strategy, found) in problem.memo.trials.items()
        if isinstance(found, Timeline)
    ]
    rivals = [entry for entry in tried if len(entry[1].computing) > 1]
    if not rivals:
        return "no distributed plan was found"
    strategy, plan, found = min(rivals, key=lambda entry: entry[2].step_time_s)
    return (
        f"the best distributed plan found, {strategy} on {_names(plan.computing)}, takes "
        f"{format_seconds(found.step_time_s)}, limited by {bottleneck(problem, plan, found)}"
    )


def bottleneck(problem: Problem, plan: Plan, timeline: Timeline) -> str:
    """The busiest device of a plan if busy nearly all the time, else the dominant step by formula."""
    busiest = max(timeline.devices, key=lambda use: use.utilization, default=None)
    if busiest is not None and busiest.utilization >= 0.9:
        return f"compute on {busiest.device} ({100 * min(busiest.utilization, 1.0):.0f} % busy)"
    if plan.servers:  # the formula knows gradient sums by rings only
        return f"messages to and from {', '.join(sync.server for sync in plan.servers)}"
    if plan.sparse:  # nor does it know what does not train
        return "gradients and values between the groups that train"
    return price(problem, plan).bottleneck


def _names(devices: tuple[str, ...]) -> str:
    return devices[0] if len(devices) == 1 else f"{', '.join(devices[:-1])} and {devices[-1]}"
