"""What may come: a link between two sites thin, a device slow. Plans for it are made ahead of it.

A search takes seconds, and while it lasts the run suffers. What a run is hurt by most is known before: the
links that it uses and the devices that work. So plans for these conditions are looked for while all is well;
when one of them comes, or one like it, its plan only has to be simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from spanwise.core.plan import Plan
from spanwise.core.profile import LinkTimes, Profile
from spanwise.planner.adapting.drift import Cause
from spanwise.planner.adapting.estimate import Estimator
from spanwise.planner.adapting.replan import Candidate

THINNER, SLOWER = (4.0, 2.0), (3.0, 1.5)  # how much, of links and devices
NEAR = 1.5  # numbers as much apart want much the same plan
MOST_FORESEEN = 24  # conditions of a run
MOST_ANSWERS = 3  # plans for a condition
MOST_KNOWN = 64  # plans kept, the newest of those that ran and those made ahead


class Foresight:
    """Knows which conditions are to be thought of and which have been, each once in a run."""

    def __init__(self) -> None:
        self._left: list[tuple[float, str, Profile]] | None = None
        self._answered: list[tuple[Profile, tuple[Plan, ...]]] = []

    def next(
        self, estimator: Estimator, plan: Plan, step_s: Callable[[Profile], float]
    ) -> tuple[float, str, Profile] | None:
        """What to think of now that this plan runs: how long its steps are then, in words, and the numbers.

        ``step_s``: of the plan that runs, by simulation. What hurts most comes first, as time may not last.
        """
        if self._left is None:
            found = ((step_s(profile), name, profile) for name, profile in _conditions(estimator, plan))
            self._left = sorted(found, key=lambda entry: -entry[0])[:MOST_FORESEEN]
        return self._left.pop(0) if self._left else None

    def answered(self, profile: Profile, plans: Sequence[Plan]) -> None:
        """For these numbers the best plans were looked for; none if the one that runs is."""
        self._answered.append((profile, tuple(plans)))

    def plans(self, estimator: Estimator, profile: Profile) -> list[Plan]:
        """Those that were made for numbers like these."""
        near = (plans for seen, plans in self._answered if estimator.near(profile, seen, NEAR))
        return [plan for plans in near for plan in plans]

    def covers(self, estimator: Estimator, profile: Profile) -> bool:
        """Whether a plan for numbers like these was looked for, so that looking again would give little."""
        return any(estimator.near(profile, seen, NEAR) for seen, _ in self._answered)


def answers(found: Sequence[Candidate], most_s: float) -> list[Plan]:
    """The fastest that takes less than that and, as long as it is quicker to go over to, the next.

    How many steps will be left is not known.
    """
    plans: list[Plan] = []
    nearest_s = math.inf
    for entry in sorted(found, key=lambda entry: entry.step_s):
        if entry.step_s < most_s and entry.move_s < nearest_s and len(plans) < MOST_ANSWERS:
            plans.append(entry.plan)
            nearest_s = entry.move_s
    return plans


def _conditions(estimator: Estimator, plan: Plan) -> Iterator[tuple[str, Profile]]:
    ends = [estimator.ends(link) for link in estimator.expected.rates]
    used = dict.fromkeys(pair for pair in ends if pair is not None)
    working = {device for device, _, _ in estimator.expected.compute_s}
    times = {entry.device: entry for entry in estimator.profile.devices}
    for thinner, slower in zip(THINNER, SLOWER, strict=True):
        for a, b in used:
            links = _thin(estimator, (a, b), thinner)
            cause = Cause((), links, sure=False, far=math.log(thinner))
            yield f"{a}<>{b} has {1 / thinner:.2f} of its rate", estimator.under([cause])
        for device in plan.devices:
            if device in working:
                slow = times[device].model_copy(update={"factor": times[device].factor * slower})
                cause = Cause((slow,), (), sure=False, far=math.log(slower))
                yield f"{device} takes {slower:.2f} times as long", estimator.under([cause])


def _thin(estimator: Estimator, ends: tuple[str, str], factor: float) -> tuple[LinkTimes, ...]:
    return tuple(
        LinkTimes(
            source=a, target=b, latency_s=latency_s,
            bandwidth_bytes_per_s=estimator.rate((a, b)) / factor,
        )
        for (a, b), latency_s in estimator.latency_s.items()
        if estimator.ends((a, b)) == ends
    )  # fmt: skip
