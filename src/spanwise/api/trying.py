"""A run that tries plans in its first steps and goes on under the fastest; then it may adapt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from spanwise.api.adaptive import Adapting, OnChange, note
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.core.run_folder import RunFolder
from spanwise.planner import Problem
from spanwise.planner.adapting.adaptation import Adaptation
from spanwise.planner.adapting.replan import kind_of
from spanwise.planner.plans.trial import unbounded_timeline
from spanwise.planner.problem import Memo
from spanwise.planner.tryout import Tryout, affordable, finalists
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.session import Probe, StepReport, Switched
from spanwise.runtime.training import total_steps

GROUND_UP = "hpp"  # makes new plans for a run that ``auto`` has planned: it covers what the others find


def steering_of(
    problem: Problem, assignment: Assignment, folder: RunFolder, *, start: int, strategy: str, tries: int,
    adapt: bool, on_stage: Callable[[str], None], on_change: OnChange,
) -> Adapting | Trying | None:  # fmt: skip
    """Who may change the plan of a run; nobody if it neither tries nor adapts."""
    if tries < 2 and not adapt:
        return None
    last, then = total_steps(assignment), None
    step_s = unbounded_timeline(problem, assignment.plan).step_time_s
    plans = [(assignment.plan, step_s)]
    if tries > 1:
        on_stage("looking for plans to try")
        others = finalists(problem, assignment.plan, tries - 1)
        found = affordable(others, step_s, last - start)
        plans += [(change.plan, change.step_s) for change in found]
    if adapt:
        on_stage("planning for what may come")
        then = Adapting(  # the more conditions are thought of in a given time, the better
            replace(problem, memo=Memo(), thorough=False), assignment, folder, last_step=last,
            strategy=GROUND_UP if strategy == "auto" else strategy, on_change=on_change,
        )  # fmt: skip
        try:
            then.prepare(step_s * (last - start))
        except BaseException:
            then.close()
            raise
    if len(plans) < 2:
        return then
    return Trying(problem.profile, dict(plans), assignment, folder, then=then, on_change=on_change)


class Trying:
    """Steers a run (``runtime.training.Steering``) until a Tryout is over; ``then`` does afterwards."""

    def __init__(
        self, profile: Profile, predicted_s: Mapping[Plan, float], assignment: Assignment, folder: RunFolder,
        *, then: Adapting | None = None, on_change: OnChange = lambda _, __: None,
    ) -> None:  # fmt: skip
        """``predicted_s``: a step by simulation of each plan to try, the first of them that which runs."""
        self._profile, self._predicted_s = profile, predicted_s
        self._assignment, self._folder = assignment, folder
        self._tryout = Tryout(tuple(predicted_s))
        self._then, self._on_change = then, on_change
        self._own: list[Adaptation] = []
        self._change: Plan | None = None
        self._tried: dict[int, Plan] = {}  # by the step from which each was tried

    @property
    def records(self) -> tuple[Adaptation, ...]:
        """All changes of plan, in order."""
        return (*self._own, *(self._then.records if self._then is not None else ()))

    @property
    def profile(self) -> Profile:
        """The numbers believed now."""
        return self._profile if self._then is None else self._then.profile

    def observe(self, report: StepReport, step_time_s: float) -> None:
        """Takes a step in."""
        if self._change is not None:
            return
        if self._tryout.over:
            if self._then is not None:
                self._then.observe(report, step_time_s)
            return
        self._change = self._tryout.observe(step_time_s)
        if self._tryout.over:
            self._conclude()

    def wants_halt(self) -> bool:
        """Whether there is a plan to go over to."""
        return self._change is not None or (self._next is not None and self._next.wants_halt())

    def wanted_probes(self) -> tuple[Probe, ...]:
        """Links to measure, of the run that adapts."""
        return () if self._next is None else self._next.wanted_probes()

    def hesitates_s(self) -> float:
        """As the run that adapts does."""
        return 0.0 if self._next is None else self._next.hesitates_s()

    def probed(self, probe: Probe, samples: tuple[tuple[int, float], ...]) -> None:
        """Takes a probe in."""
        if self._then is not None:
            self._then.probed(probe, samples)

    def next_assignment(self) -> Assignment | None:
        """The run under the plan to go over to."""
        if self._change is None:
            return None if self._next is None else self._next.next_assignment()
        return self._assignment.under(self._change)

    def switched(self, assignment: Assignment, step: int, cost: Switched) -> None:
        """Notes what the change took."""
        if self._change is None:
            assert self._then is not None
            self._then.switched(assignment, step, cost)
            return
        before, plan = self._assignment.plan, self._change
        self._assignment, self._change = assignment, None
        gain = self._gain(plan, before)
        kind = kind_of(before, plan)
        record = Adaptation(step, self._reason(plan), kind, gain, cost.moved_bytes, cost.seconds)
        if self._tryout.over:
            record = replace(record, realised_gain=self._measured_gain(plan))
            if self._then is not None:
                self._then.begin(assignment)
        else:
            self._tried[step] = plan
        self._add(record)
        self._on_change(assignment, record)

    def close(self) -> None:
        """Ends what the run that adapts has under way."""
        if self._then is not None:
            self._then.close()

    @property
    def _next(self) -> Adapting | None:
        """Who steers now, if this no longer does."""
        return self._then if self._tryout.over and self._change is None else None

    def _add(self, record: Adaptation) -> None:
        self._own.append(record)
        note(self._folder, record)

    def _conclude(self) -> None:
        """What each plan gave goes into its records."""
        for place, record in enumerate(self._own):
            plan = self._tried[record.step]
            kept = plan is self._tryout.running
            self._own[place] = replace(record, realised_gain=self._measured_gain(plan), undone=not kept)
            note(self._folder, self._own[place])
        if self._change is None and self._then is not None:
            self._then.begin(self._assignment)

    def _reason(self, plan: Plan) -> str:
        if not self._tryout.over:
            return "to try it: simulations may be some per cent off"
        tried, first = self._tryout, self._tryout.plans[0]
        words = f"the fastest of {len(tried.plans)} that were tried, {tried.seconds(plan):.3g} s a step"
        return words if plan is first else f"{words} against {tried.seconds(first):.3g} s"

    def _gain(self, plan: Plan, before: Plan) -> float:
        """By simulation."""
        was_s = self._predicted_s[before]
        return 1 - self._predicted_s[plan] / was_s if was_s else 0.0

    def _measured_gain(self, plan: Plan) -> float:
        """Over the plan that the run began with."""
        first_s = self._tryout.seconds(self._tryout.plans[0])
        return 1 - self._tryout.seconds(plan) / first_s if first_s else 0.0
