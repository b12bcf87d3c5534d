"""What goes to and fro between an Adapter and the run that it follows: searches, changes, records of them.

And what an Adapter keeps of a change while it is on trial.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.planner.adapting.ratios import Link
from spanwise.planner.adapting.replan import (
    Candidate,
    Kind,
    candidate,
    candidates,
    from_the_ground_up,
    same_rows,
    shape,
)
from spanwise.planner.problem import Problem


@dataclass(frozen=True)
class Adaptation:
    """One change of plan, as a record.

    ``step`` is the first under the new plan; gains are parts of the step time before. ``realised_gain`` is
    None until enough steps have shown it.
    """

    step: int
    reason: str
    kind: Kind
    predicted_gain: float
    moved_bytes: int = 0
    seconds: float = 0.0
    realised_gain: float | None = None
    undone: bool = False

    def to_data(self) -> dict[str, object]:
        """For ``metrics.jsonl`` and ``--json``."""
        return {
            "step": self.step, "reason": self.reason, "kind": self.kind, "moved_bytes": self.moved_bytes,
            "seconds": self.seconds, "predicted_gain": self.predicted_gain,
            "realised_gain": self.realised_gain, "undone": self.undone,
        }  # fmt: skip


@dataclass(frozen=True)
class Search:
    """What to look for a better plan on: the problem with its numbers as they are now.

    ``known``: plans that ran before, or were made ahead for what may come. ``ahead``: for what may come,
    so changes of the plan that runs are not looked for.
    """

    problem: Problem
    plan: Plan
    strategy: str
    reason: str
    known: tuple[Plan, ...] = ()
    ahead: bool = False


@dataclass(frozen=True)
class Change:
    """A plan to go over to at the next boundary, why, and how long moving should take.

    ``usual``: measured over expected of devices and links under that plan, where it ran before, and
    ``usual_s``: how long its steps took.
    """

    plan: Plan
    reason: str
    kind: Kind
    predicted_gain: float
    move_s: float = 0.0
    undoes: bool = False
    usual: Mapping[str | Link, float] = field(default_factory=dict[str | Link, float])
    usual_s: float | None = None


class Belief(NamedTuple):
    """Numbers, and measured over predicted step time that they leave unexplained."""

    profile: Profile
    bias: float


@dataclass
class OnTrial:
    """A change whose gain is not known yet; ``usual`` and ``usual_s`` are those of the plan before.

    ``belief``: what was held before the numbers that the change was made for, if these were new.
    """

    record: Adaptation
    before: Plan
    before_s: float
    usual: Mapping[str | Link, float]
    usual_s: float
    belief: Belief | None
    seen: list[float] = field(default_factory=list[float])


def known_in(search: Search) -> Iterator[Candidate]:
    """Of the plans that are known already, what each gives: a simulation each."""
    problem, plan = search.problem, search.plan
    for known in search.known:
        if shape(known) != shape(plan) and same_rows(problem, plan, known):
            try:
                found = candidate(problem, plan, known)
            except InfeasibleError:
                continue
            if found is not None:
                yield found


def found_in(search: Search) -> Iterator[list[Candidate]]:
    """Candidates of a search: changes of the plan that runs first, then plans from the ground up.

    Takes seconds in all: not for a training thread.
    """
    if search.ahead:
        yield [c for group in from_the_ground_up(search.problem, search.plan, search.strategy) for c in group]
        return
    groups = candidates(search.problem, search.plan, search.strategy)
    yield [c for group in islice(groups, 2) for c in group]
    yield [c for group in groups for c in group]
