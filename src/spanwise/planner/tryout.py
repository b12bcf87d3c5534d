"""Plans that a run tries before it settles on one, and which of them it takes.

A simulation is some per cent off, and of many plans the one that is simulated fastest is likely one of which
too little was predicted. A few steps under each say it better; they are steps of the training, so that none
is lost. Pure: no clock, no thread, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner.adapting.replan import Candidate, candidate, same_rows
from spanwise.planner.plans.halved import halved
from spanwise.planner.plans.trial import timed, timeline
from spanwise.planner.plans.variants import segmented
from spanwise.planner.problem import Problem
from spanwise.planner.published.asteroid import asteroid
from spanwise.planner.published.dapple import dapple
from spanwise.planner.published.hetpipe import hetpipe
from spanwise.planner.published.pipedream import pipedream

NEAR = 0.12  # simulated longer than the best by more of it, a plan is hardly faster on the wire
SETTLE_STEPS = 2  # under a plan: first passes grow heaps and connections
TIMED_STEPS = 4
TURNS = 3  # each in the other order than the one before, so that what drifts hits all alike
WORSE = 0.08  # longer than the best by more, a plan has no second turn; by half of it, no third
SETUP_S = 0.3  # of a change of plan, besides what it moves
CHANGES_SHARE = 0.05  # most of a run's time that changing plans to try them may take
STEPS_SHARE = 0.2  # most of its steps that may be run under plans that turn out slower
MOST_DEVICES = 16  # with more, what the published planners do takes long
PUBLISHED = (asteroid, dapple, pipedream, hetpipe)  # weighed too: other searches, other plans


def finalists(problem: Problem, plan: Plan, most: int) -> tuple[Candidate, ...]:
    """The best of what was simulated for a problem, as changes of a plan that is to run.

    Args:
        problem: as it was planned for: it remembers every plan that was simulated.
        plan: what the run begins with.
        most: as many at most.

    Returns:
        Of plans with equal stages on equal devices, micro-batches and schedule only the fastest. The best of
        the published planners takes part as it is, and all with halves and segments of ours.
    """
    first: list[tuple[Plan, float]] = []
    if not plan.servers and len(problem.kinds) <= MOST_DEVICES:
        first = sorted(_published(problem), key=lambda entry: entry[1])[:1]
    ranked = sorted(timed(problem), key=lambda entry: entry[1])
    found: list[Candidate] = []
    taken = {_kind(problem, plan)}
    for other, seconds in (*first, *ranked):
        kind = _kind(problem, other)
        far = seconds > (1 + NEAR) * ranked[0][1]
        if len(found) >= most or far or kind in taken or not same_rows(problem, plan, other):
            continue
        taken.add(kind)
        change = candidate(problem, plan, other.model_copy(update={"strategy": plan.strategy}))
        if change is not None:
            found.append(change)
    return tuple(sorted(found, key=lambda change: change.step_s))


def affordable(changes: Sequence[Candidate], step_s: float, steps: int) -> tuple[Candidate, ...]:
    """The first of the changes that a run of so many steps has the time to try."""
    left_s, left_steps = CHANGES_SHARE * steps * step_s, STEPS_SHARE * steps
    out: list[Candidate] = []
    for change in changes:
        left_s -= TURNS * (2 * change.move_s + SETUP_S)
        left_steps -= TURNS * (SETTLE_STEPS + TIMED_STEPS)
        if left_s < 0 or left_steps < 0:
            break
        out.append(change)
    return tuple(out)


def _published(problem: Problem) -> Iterator[tuple[Plan, float]]:
    """Plans of others as they are; what they take with halves and segments of ours is remembered."""
    for planner in PUBLISHED:
        try:
            found = planner(problem)
            yield found, timeline(problem, found).step_time_s
            segmented(problem, halved(problem, [found]))
        except InfeasibleError:
            continue


def _kind(problem: Problem, plan: Plan) -> tuple[object, ...]:
    """What plans must differ in to be worth trying both: not one border, not which of two equal devices."""
    kinds, index = problem.kinds, problem.index
    stages = tuple(tuple(sorted(kinds[index[d]] for d in stage.devices)) for stage in plan.stages)
    return plan.schedule, plan.micro_batches, stages


class Tryout:
    """Which plan is to run next, from the steps under those that ran. ``plans[0]`` runs when it begins."""

    def __init__(self, plans: Sequence[Plan], *, turns: int = TURNS) -> None:
        self.plans, self.running = tuple(plans), plans[0]
        self.over = len(self.plans) < 2
        self._turns, self._turn = turns, 1
        self._queue = list(self.plans)  # of this turn, the one that runs first
        self._times: dict[Plan, list[float]] = {plan: [] for plan in self.plans}
        self.settling = SETTLE_STEPS  # steps that do not count yet
        self._now = list[float]()

    def observe(self, step_s: float) -> Plan | None:
        """Takes in a step under the plan that runs; the plan to go over to, if that has run long enough.

        Once ``over`` it has settled, on that plan or else on the one that runs.
        """
        if self.over:
            return None
        if self.settling > 0:
            self.settling -= 1
            return None
        self._now.append(step_s)
        if len(self._now) < TIMED_STEPS:
            return None
        self._times[self.running] += self._now
        self._now = []
        del self._queue[0]
        if not self._queue:
            self._queue = self._next_turn()
        self.over = not self._queue
        return self._go(self.best if self.over else self._queue[0])

    def _go(self, plan: Plan) -> Plan | None:
        if plan is self.running:
            return None
        self.running, self.settling = plan, SETTLE_STEPS
        return plan

    def _next_turn(self) -> list[Plan]:
        """Those that may still win, in the other order, if there are two."""
        most = (1 + WORSE / self._turn) * self.seconds(self.best)
        order = self.plans if self._turn % 2 == 0 else reversed(self.plans)
        left = [plan for plan in order if self.seconds(plan) <= most]
        self._turn += 1
        return left if self._turn <= self._turns and len(left) > 1 else []

    @property
    def best(self) -> Plan:
        """The fastest of those that have run; of equals the first."""
        return min((plan for plan in self.plans if self._times[plan]), key=self.seconds)

    def seconds(self, plan: Plan) -> float:
        """Median step under a plan."""
        return median(self._times[plan])
