"""Which devices and links are no longer as believed, as far as the times of steps bear that out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spanwise.core.profile import Profile
from spanwise.planner.adapting.drift import Cause, Drift
from spanwise.planner.adapting.estimate import Estimator
from spanwise.planner.adapting.ratios import Expected

REFITS = 2  # times that estimates are held against a simulation on themselves
MOST_CAUSES, EXPLAINED = 3, 0.06  # of a changed step time; what may be left of it, as a logarithm
LEFT_OF_LEAP = 0.3  # of its logarithm: the step in which something changes is odd, as queues fill or empty


@dataclass(frozen=True)
class Explainer:
    """Holds what devices and links seem to have come to against how long steps take.

    ``expected`` simulates the plan that runs on some numbers; ``bias``: measured over predicted step time
    that no device or link accounts for.
    """

    estimator: Estimator
    expected: Callable[[Profile], Expected]
    bias: float

    def fitted(self, drift: Drift, pace_s: float, newest_s: float) -> Profile | None:
        """The numbers as the last steps show them, as far as step times bear them out.

        None if a single step has leapt, and what leapt in it does not explain that.

        Args:
            drift: what has moved.
            pace_s: how long a step takes now.
            newest_s: how long the newest took.
        """
        profile = self.estimator.fitted()
        for _ in range(REFITS):
            profile = self.estimator.again(profile, self.expected(profile)).fitted()
        causes = self.estimator.causes(profile)
        if not drift.leap:
            # What has moved when the steps did comes first: the rest may be so by chance, or slowly.
            turned = self._explained([cause for cause in causes if cause.sure or cause.turned], pace_s)
            if self._error(turned, pace_s) < EXPLAINED:
                return turned
            return self._explained(causes, pace_s)
        found = self._explained([cause for cause in causes if cause.leapt], newest_s)
        if self._error(found, newest_s) > LEFT_OF_LEAP * self._error(self.estimator.profile, newest_s):
            return None
        return found

    def _explained(self, causes: Sequence[Cause], pace_s: float) -> Profile:
        """With what is sure, and of the rest as little as explains how long steps take now."""
        taken = [cause for cause in causes if cause.sure]
        left = [cause for cause in causes if not cause.sure]
        error = self._error(self.estimator.under(taken), pace_s)
        for _ in range(MOST_CAUSES):
            if not left or error < EXPLAINED:
                break
            errors = [self._error(self.estimator.under([*taken, cause]), pace_s) for cause in left]
            if error - min(errors) < EXPLAINED / 2:
                break
            alike = [i for i, found in enumerate(errors) if found < min(errors) + EXPLAINED / 2]
            at = max(alike, key=lambda i: left[i].far)
            error = errors[at]
            taken.append(left.pop(at))
        return self.estimator.under(taken)

    def _error(self, profile: Profile, pace_s: float) -> float:
        """How far steps are from what these numbers make of them."""
        return off(pace_s, self.expected(profile).step_s * self.bias * self.estimator.usual_step)


def off(pace_s: float, expected_s: float) -> float:
    """How far apart two step times are: the logarithm of their ratio, unsigned."""
    return abs(math.log(pace_s / expected_s)) if expected_s else math.inf
