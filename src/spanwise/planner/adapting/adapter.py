"""Decides when a run changes its plan, and whether the change paid. Pure: no clock, no thread, no torch.

The caller feeds every step in, searches when asked to (``Search``), hands the result back, and carries out
the ``Change`` that comes of it at a step boundary. The thresholds are ours; the idea, micro-batches that
follow the bandwidth, is that of SpanTrain (Big Data Research 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from spanwise.core.observed import DeviceStep
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.core.program import Program
from spanwise.lowering import lower
from spanwise.planner.adapting.adaptation import Adaptation, Belief, Change, OnTrial, Search
from spanwise.planner.adapting.drift import Drift
from spanwise.planner.adapting.estimate import Estimator
from spanwise.planner.adapting.explain import EXPLAINED, Explainer, off
from spanwise.planner.adapting.explore import Explorer, Look
from spanwise.planner.adapting.foresee import MOST_KNOWN, Foresight, answers
from spanwise.planner.adapting.ratios import Expected, Link
from spanwise.planner.adapting.replan import Candidate, shape
from spanwise.planner.adapting.resegment import Resegmenter
from spanwise.planner.adapting.tracker import KEPT, newest
from spanwise.planner.problem import Memo, Problem
from spanwise.simulator import simulate

LEAST_GAIN = 0.05  # predicted, of the step time
LEAST_GAIN_OF_SEGMENTS = 0.02  # moves nothing, and its numbers are measured, so less is enough
LOSS = 0.03  # realised: a change that makes steps this much longer is undone
HOLD_STEPS, HOLD_S = 5, 2.0  # after a change, before the next
JUDGED_STEPS, JUDGED_S = 3, 0.5  # under a plan, without the first, say how fast it is
BAN_STEPS = 50  # an undone plan is not tried again for so long, twice as long the next time
SETTLE_STEPS = 2  # at the start and after a change: first passes grow heaps and connections
SETUP_S = 0.2  # of a change, until one was measured
HESITATION, HESITATION_S = 1.5, 1.0  # in steps, as a probe comes after the next one, and in seconds
SEARCH_SHARE = 0.5  # of the time may go to searching, unless something has moved far


class Adapter:
    """Follows one run. ``records`` has every change, in order."""

    def __init__(self, problem: Problem, plan: Plan, *, last_step: int, strategy: str) -> None:
        """Begins with the numbers that the plan was made by; ``last_step`` is the run's, not included."""
        self.plan, self.records = plan, list[Adaptation]()
        self._problem, self._strategy, self._last_step = problem, strategy, last_step
        self._known: dict[Plan, Plan] = {}  # by shape
        self._remember(plan)
        self._foresight = Foresight()
        self._lowered: tuple[Plan, Program] | None = None  # one plan is simulated on many numbers
        self._bias = 1.0  # measured over predicted step time that no device or link accounts for
        self._estimator = self._follow(problem.profile)
        self._times: list[float] = []  # of the steps under this plan, settled ones only
        self._rest = SETTLE_STEPS
        self._hold_until, self._hold_until_s, self._quiet_until_s = 0, 0.0, 0.0
        self._searching: tuple[Search, float] | None = None
        self._owed = ""  # reason of a search that was left out, as a known plan was taken
        self._trial: OnTrial | None = None
        self._given_up: Belief | None = None  # for the numbers of the newest search
        self._doubts = set[Plan]()  # shapes of plans whose numbers were doubted
        self._setup_s = SETUP_S
        self._explorer = Explorer(problem.profile, problem.cluster)
        self._now_s = 0.0
        self._bans: dict[Plan, tuple[int, int]] = {}  # shape of a plan: until which step, how often
        self._segments = Resegmenter.of(problem, plan)

    @property
    def profile(self) -> Profile:
        """The numbers believed now."""
        return self._estimator.profile

    def begin(self, plan: Plan) -> None:
        """Under another plan, before any step was observed; what was foreseen is kept."""
        self.plan, self._segments = plan, Resegmenter.of(self._problem, plan)
        self._remember(plan)
        self._estimator = self._follow(self.profile)

    def observe(
        self, step: int, step_s: float, observed: Sequence[DeviceStep], now_s: float
    ) -> Search | Change | None:
        """Takes a step in. A Search is to be carried out and given to ``consider``, a Change at once.

        Steps during a search say nothing: it may take from the devices what they need.
        """
        if self._rest > 0 or self._searching is not None:
            self._rest = max(0, self._rest - 1)
            return None
        self._estimator.add(step_s, observed)
        if self._segments is not None:
            self._segments.add(step_s, observed)
        self._times.append(step_s)
        self._now_s = now_s
        drift = self._estimator.drift()
        if self._trial is not None:
            back = self._judge(step, step_s)
            if back is not None:
                return back
        recut = self._recut(step, now_s)
        if recut is not None:
            return recut
        forgotten = self._explorer.forgotten(self.profile, self.plan.devices, now_s)
        if drift is None and forgotten:
            drift = Drift(big=False, conditions=True)
        if self._keeps(step, now_s):
            return None
        return self._search_owed() if drift is None else self._planned_anew(drift, forgotten)

    def reconsider(self, step: int) -> Search | None:
        """The newest step once more, after a probe has come back that may say why it has leapt."""
        if self._rest > 0 or self._searching is not None or self._keeps(step, self._now_s):
            return None
        drift = self._estimator.drift()
        return self._planned_anew(drift) if drift is not None and drift.leap else None

    def hesitates_s(self, step: int, now_s: float) -> float:
        """For how long no further steps should be begun, as a probe may soon say what to do instead."""
        asked_s = self._explorer.asked_s
        if asked_s is None or self._rest > 0 or self._searching is not None or self._keeps(step, now_s):
            return 0.0
        return max(0.0, asked_s + HESITATION * self._pace_s + HESITATION_S - now_s)

    def _planned_anew(self, drift: Drift, forgotten: Sequence[str] = ()) -> Search | None:
        """A search, if devices or links have become other than believed or may be as at first again."""
        now_s = self._now_s
        hurried = drift.big and drift.conditions  # then searching may take more than its share
        if not hurried and now_s < self._quiet_until_s:
            return None
        explainer = Explainer(self._estimator, self._expected, self._bias)
        fitted = explainer.fitted(drift, self._pace_s, self._times[-1])
        if fitted is None:
            return None
        if drift.leap:
            del self._times[:-1]  # those before it are of another world
        if fitted == self.profile and not forgotten:
            if not self._explorer.awaits(self._estimator, now_s):
                self._believe(fitted)  # steps take another time, and nothing that a plan could answer is why
            return None
        reasons = [self._estimator.changes(fitted)] if self._estimator.drift() is not None else []
        reasons += [f"{device} may be as fast as at first again" for device in forgotten]
        return self._begun(self._explorer.forget(fitted, forgotten), "; ".join(reasons))

    def _keeps(self, step: int, now_s: float) -> bool:
        """Whether the plan stays whatever comes: it is new, on trial, or nearly at its end."""
        return self._last_step - step < HOLD_STEPS or self._trial is not None or self._held(step, now_s)

    def _search_owed(self) -> Search | None:
        """After a known plan has shown its worth: there may be a better one for the same numbers."""
        reason, self._owed = self._owed, ""
        if not reason or self._foresight.covers(self._estimator, self.profile):
            return None
        return self._begun(self.profile, reason)

    def covered(self, search: Search) -> bool:
        """Whether known plans are enough, as one for such numbers was looked for ahead."""
        return self._foresight.covers(self._estimator, search.problem.profile)

    def _begun(self, profile: Profile, reason: str) -> Search:
        """The search that is under way from now on, in place of any that is owed."""
        search = self._search_on(profile, reason)
        self._searching, self._owed, self._given_up = (search, self._now_s), "", None
        return search

    def _search_on(self, profile: Profile, reason: str) -> Search:
        problem = replace(self._problem, profile=profile, memo=Memo())
        first = self._foresight.plans(self._estimator, profile)
        known = tuple(dict.fromkeys((*first, *reversed(self._known.values()))))
        return Search(problem, self.plan, self._strategy, reason, known)

    @property
    def searching(self) -> bool:
        """Whether a search is under way."""
        return self._searching is not None

    def foresee(self) -> Search | None:
        """The next condition to have a plan for before it comes; ``foreseen`` takes what was found."""
        found = self._foresight.next(self._estimator, self.plan, lambda p: self._expected(p).step_s)
        if found is None or found[0] * (1 - LEAST_GAIN) <= self._predicted_s:
            return None  # and what is left hurts less
        _, reason, profile = found
        return replace(self._search_on(profile, reason), known=(), ahead=True)

    def foreseen(self, search: Search, found: Sequence[Candidate]) -> None:
        """Keeps the best plans for a condition that may come, if they are better then than what runs."""
        most_s = (1 - LEAST_GAIN) * self._expected(search.problem.profile).step_s
        plans = answers(found, most_s)
        self._foresight.answered(search.problem.profile, plans)
        for plan in reversed(plans):
            self._remember(plan)

    def _remember(self, plan: Plan) -> None:
        self._known.pop(shape(plan), None)
        self._known[shape(plan)] = plan
        if len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]

    def look(self, now_s: float) -> tuple[Look, ...]:
        """Links to probe now; ``looked`` takes the results."""
        found = self._explorer.look(self._estimator, now_s)
        return found if found or self._segments is None else self._segments.look(now_s)

    def looked(self, link: Link, samples: Sequence[tuple[int, float]]) -> None:
        """(bytes, round-trip seconds) of a probe."""
        self._estimator.probed(link, samples)
        self._explorer.looked(self._estimator, link)
        if self._segments is not None:
            self._segments.looked(link, samples)

    def consider(self, found: Sequence[Candidate], step: int, now_s: float, *, last: bool) -> Change | None:
        """What a search has come to so far; ``step`` is the newest that was observed.

        Args:
            found: the next of ``found_in``.
            step: the newest that was observed.
            now_s: the caller's clock.
            last: whether nothing more comes of this search.
        """
        assert self._searching is not None
        search, since_s = self._searching
        if last:
            self._searching = None
            self._quiet_until_s = now_s + (now_s - since_s) / SEARCH_SHARE
        if self._estimator.profile is not search.problem.profile:
            self._given_up = Belief(self._estimator.profile, self._bias)
            self._believe(search.problem.profile)
        predicted_s = self._predicted_s
        measured_s, left = self._bias * predicted_s, self._last_step - step - 1
        best: Change | None = None
        most = 0.0
        for entry in found:
            gain = 1 - entry.step_s / predicted_s if predicted_s else 0.0
            # Measured over predicted stays what it is: both plans are as much slower as they are predicted.
            saved_s = gain * measured_s * left - entry.move_s - self._setup_s
            if gain > LEAST_GAIN and saved_s > most and not self._banned(entry.plan, step):
                best = Change(entry.plan, search.reason, entry.kind, gain, entry.move_s)
                most = saved_s
        return best

    def changed(self, change: Change, step: int, moved_bytes: int, seconds: float) -> Adaptation:
        """The change was carried out; ``step`` is the first under the new plan."""
        record = Adaptation(step, change.reason, change.kind, change.predicted_gain, moved_bytes, seconds)
        before, before_s = self.plan, self._pace_s
        self.plan = change.plan
        self._remember(change.plan)
        self._owed, self._searching = "" if self._searching is None else self._searching[0].reason, None
        if self._segments is not None:
            self._segments = self._segments.under(change.plan)
        else:
            self._segments = Resegmenter.of(self._problem, change.plan)
        if change.undoes:
            self._trial, self._owed = None, ""
        else:
            usual_s = self._estimator.expected.step_s * self._estimator.usual_step
            self._trial = OnTrial(record, before, before_s, self._estimator.usual, usual_s, self._given_up)
            self._setup_s = max(0.0, seconds - change.move_s)
        self._given_up = None
        self.records.append(record)
        self._estimator = self._follow(self._estimator.profile, change.usual, change.usual_s)
        self._times, self._rest = [before_s], SETTLE_STEPS - 1
        self._hold_until, self._hold_until_s = step + HOLD_STEPS, self._now_s + seconds + HOLD_S
        return record

    def _believe(self, profile: Profile) -> None:
        """From now on these numbers hold; what they leave unexplained is so for every plan."""
        predicted_s = self._expected(profile).step_s
        self._bias = self._pace_s / predicted_s if predicted_s else 1.0
        self._estimator = self._follow(profile, self._estimator.usual)

    @property
    def _predicted_s(self) -> float:
        """The simulated step time of the plan that runs, by the numbers that are believed."""
        return self._estimator.expected.step_s / self._bias

    @property
    def _pace_s(self) -> float:
        """How long a step takes now."""
        entries = [(seconds, seconds) for seconds in self._times[-KEPT:]]
        return median(newest(entries, JUDGED_STEPS, JUDGED_S) or self._times)

    def _held(self, step: int, now_s: float) -> bool:
        """Whether the last change is too fresh for another."""
        return step < self._hold_until or now_s < self._hold_until_s

    def _recut(self, step: int, now_s: float) -> Change | None:
        """Other segments at once, where messages show themselves other than believed and these pay."""
        left = self._last_step - step - 1
        busy = self._trial is not None or self._held(step, now_s)
        if self._segments is None or busy or left < HOLD_STEPS or len(self._times) < JUDGED_STEPS:
            return None
        found = self._segments.cut_anew()
        if found is None or self._banned(found.plan, step):
            return None
        gain = found.gain_s / self._pace_s
        if gain < LEAST_GAIN_OF_SEGMENTS or found.gain_s * left < self._setup_s:
            return None
        return Change(found.plan, found.reason, "segments", gain)

    def _judge(self, step: int, step_s: float) -> Search | Change | None:
        """Compares steps after a change with those before; a Change back if it does not pay.

        A Search with the numbers from before it if they explain these steps better.
        """
        trial = self._trial
        assert trial is not None
        trial.seen.append(step_s)
        if len(trial.seen) < JUDGED_STEPS or sum(trial.seen) < JUDGED_S:
            return None
        self._trial = None
        realised = 1 - median(trial.seen) / trial.before_s
        worse = realised < -LOSS
        record = replace(trial.record, realised_gain=realised, undone=worse)
        self.records[self.records.index(trial.record)] = record
        if not worse:
            return self._doubted(trial)
        times = self._bans.get(shape(self.plan), (0, 0))[1]
        self._bans[shape(self.plan)] = (step + BAN_STEPS * 2**times, times + 1)
        reason = f"the change at step {record.step} made steps {-100 * realised:.0f} % longer"
        gain = 1 - 1 / (1 - realised)
        # What slowed down meanwhile must not pass for what is usual of the plan gone back to.
        return Change(
            trial.before, reason, record.kind, gain, undoes=True, usual=trial.usual, usual_s=trial.usual_s
        )

    def _doubted(self, trial: OnTrial) -> Search | None:
        """A hiccup that passed for a slow device is over by the time that the plan for it runs.

        Then the numbers from before explain the steps under that plan. Doubted once only, as simulations of
        a plan may be off for good.
        """
        before, pace_s, doubted = trial.belief, median(trial.seen), shape(self.plan)
        if before is None or doubted in self._doubts:
            return None
        believed_s = self._predicted_s * before.bias
        before_s = self._expected(before.profile).step_s * before.bias
        if off(pace_s, before_s) + EXPLAINED > off(pace_s, believed_s):
            return None
        self._doubts.add(doubted)
        self._bias = before.bias
        self._estimator = self._follow(before.profile)
        reason = (
            f"since the change at step {trial.record.step} steps take {pace_s:.3g} s, as with the numbers "
            f"from before it ({before_s:.3g} s), and not {believed_s:.3g} s"
        )
        return self._begun(before.profile, reason)

    def _banned(self, plan: Plan, step: int) -> bool:
        return self._bans.get(shape(plan), (0, 0))[0] > step

    def _follow(
        self, profile: Profile, usual: Mapping[str | Link, float] | None = None, usual_s: float | None = None
    ) -> Estimator:
        """Follows the plan that runs, against these numbers and what it has shown to be usual, if it has."""
        expected = self._expected(profile)
        expected = replace(expected, step_s=expected.step_s * self._bias)
        usual_step = usual_s / expected.step_s if usual_s and expected.step_s else None
        first = self._problem.profile
        return Estimator(profile, self._problem.cluster, expected, usual, usual_step, first)

    def _expected(self, profile: Profile) -> Expected:
        problem = self._problem
        if self._lowered is None or self._lowered[0] is not self.plan:
            program = lower(self.plan, problem.graph, clip=problem.job.clip_norm is not None)
            self._lowered = (self.plan, program)
        timeline = simulate(
            self._lowered[1], self.plan, problem.graph, profile, problem.cluster,
            optimizer_copies=problem.copies,
        )  # fmt: skip
        return Expected.of(timeline)
