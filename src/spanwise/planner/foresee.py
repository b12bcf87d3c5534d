"""What may come: a link between two sites thin, a device slow. Plans for it are made ahead of it.

A search takes seconds, and while it lasts the run suffers. What a run is hurt by most is known before: the
links that it uses and the devices that work. So plans for these conditions are looked for while all is well;
when one of them comes, or one like it, its plan only has to be simulated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from spanwise.core.plan import Plan
from spanwise.core.profile import LinkTimes, Profile
from spanwise.planner.estimate import Cause, Estimator

THINNER, SLOWER = (4.0, 2.0), (3.0, 1.5)  # how much, of links and devices; what hurts more comes first
NEAR = 1.5  # numbers as much apart want much the same plan
MOST_FORESEEN = 24  # conditions of a run
MOST_KNOWN = 12  # plans kept, the newest of those that ran and those made ahead


class Foresight:
    """Knows which conditions have been thought of, each once in a run."""

    def __init__(self) -> None:
        self._thought: set[str] = set()
        self._answered: list[Profile] = []

    def next(self, estimator: Estimator, plan: Plan) -> tuple[str, Profile] | None:
        """What to think of now that this plan runs: in words, and the numbers that it brings."""
        if len(self._thought) >= MOST_FORESEEN:
            return None
        for name, profile in _conditions(estimator, plan):
            if name not in self._thought:
                self._thought.add(name)
                return name, profile
        return None

    def answered(self, profile: Profile) -> None:
        """For these numbers the best plan that there is was looked for."""
        self._answered.append(profile)

    def covers(self, estimator: Estimator, profile: Profile) -> bool:
        """Whether a plan for numbers like these was looked for, so that looking again would give little."""
        return any(estimator.near(profile, found, NEAR) for found in self._answered)


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
