"""Which plan is best in halves: not the one that is fastest without.

Stages wait for the input half of a backward pass alone, so other borders and other numbers of micro-batches
are best. Of some plans and of what lies next to them the zero_bubble variants are compared by their pace, and
the best few simulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from spanwise.core.plan import Plan
from spanwise.planner.facts.kinds import Mix
from spanwise.planner.plans.bubble import FIRST, likely_variants, zero_bubble_variants
from spanwise.planner.plans.near import built, near_borders, near_groups, near_joins, recounted, spans_of
from spanwise.planner.plans.pace import pace_s
from spanwise.planner.plans.price import price
from spanwise.planner.plans.trial import HOPELESS, MOST_EFFORT, Priced, seconds_of
from spanwise.planner.plans.variants import paying, run_again
from spanwise.planner.problem import Problem
from spanwise.planner.segments.rings import hidden_s

MOST_HALVED = 16  # of all of these, so many are simulated, of large ones as many as have this effort together
FEW_HALVED = 6  # where planning must be quick
MOST_HALVED_EFFORT = 3 * MOST_EFFORT
MOST_SHARED = 2  # of those with a device in several stages
SMALL = 1_000  # effort of plans of which what lies next to them is looked at
LARGE = 2_000  # effort of plans of which fewer variants are looked at, and fewer simulated
# Large plans are simulated if by pace, times what plans with as many stages and micro-batches took of theirs,
# they take at most this part of the least time; before one of these is known the second stands in for it.
ENOUGH, UNLIKE = 1.005, 0.95
MOST_FURTHER_EFFORT = 10 * MOST_EFFORT
CLIMBS = 6  # sequences of groups from which on what lies next to a plan is looked at, the best in halves
MOST_CLIMB_EFFORT = 4 * MOST_EFFORT
REACH = 3  # layers that borders move at once

Regroup = Literal["no", "singles", "any"]


def halved(
    problem: Problem, plans: Sequence[Plan], further: Sequence[Plan] = (), regroup: Regroup = "no"
) -> list[Plan]:
    """The plans and the zero_bubble variants of some, fastest first; variants of the first only if they pay.

    Args:
        problem: what is planned.
        plans: simulated ones.
        further: more that may be good in halves, the likeliest first; with them, what lies next to the best.
            They count if planning is to be thorough.
        regroup: whether that may have other groups, or other groups of one device.
    """
    pool = _Pool(problem, regroup)
    for plan in plans:
        pool.take(plan)
    if further and problem.thorough:
        pool.add(further)
        pool.climb()
    order = pool.ranked()
    met = set(order)
    tried = _likeliest(problem, order, MOST_HALVED if problem.thorough else FEW_HALVED)
    best = paying(problem, plans[0], tried)
    if best in tried:
        hopeless = HOPELESS * pace_s(problem, best)
        more = [variant for variant in zero_bubble_variants(problem, best) if variant not in met]
        more = [variant for variant in more if pace_s(problem, variant) <= hopeless]
        best = paying(problem, best, more)
        tried += more
    timed = {plan: s for plan in (*plans, *tried) if (s := seconds_of(problem, plan)) is not None}
    return list(dict.fromkeys((best, *sorted(timed, key=lambda plan: timed[plan]))))


def _likeliest(problem: Problem, variants: Sequence[Plan], limit: int) -> list[Plan]:
    """Simulates the first variants in order of pace; of those with a device in several stages, whose pace is
    only a price, a few; of large ones those that may be faster, by what pace was of their like so far.
    """
    if not variants:
        return []
    most = min(limit, max(2, MOST_HALVED_EFFORT // Priced(variants[0], 0.0).effort))
    out: list[Plan] = []
    shared = 0
    least = float("inf")
    factor: dict[tuple[int, int], float] = {}
    for variant in variants:
        entry = Priced(variant, pace_s(problem, variant))
        shared += bool(entry.kind[1])
        if entry.kind[1] and shared > MOST_SHARED:
            continue
        like = len(variant.stages), variant.micro_batches
        may_be_s = entry.price_s * factor.get(like, UNLIKE)
        if entry.effort > LARGE and may_be_s > ENOUGH * least + hidden_s(problem, variant):
            continue
        out.append(variant)
        seconds = seconds_of(problem, variant)
        if seconds is not None:
            factor[like] = min(factor.get(like, float("inf")), seconds / max(entry.price_s, 1e-12))
            least = min(least, seconds)
        if len(out) == most:
            break
    return out


@dataclass
class _Pool:
    """Plans without halves, each with its likely variants, the one of the least pace first."""

    problem: Problem
    regroup: Regroup
    variants: dict[Plan, list[Plan]] = field(default_factory=dict[Plan, list[Plan]])

    def add(self, plans: Sequence[Plan]) -> None:
        """Takes plans in, as many as are no great effort; of large ones with one variant each."""
        effort = 0
        for plan in plans:
            if plan not in self.variants:
                own = Priced(plan, 0.0).effort
                effort += own
                if effort > MOST_FURTHER_EFFORT:
                    return
                self.take(plan, FIRST if own <= LARGE else 1)

    def climb(self) -> None:
        """Moves borders and changes numbers of micro-batches while variants get faster, from the best on."""
        effort = 0
        for plan in self._starts():
            first = Priced(plan, 0.0)
            current = None if first.kind[1] or first.effort > SMALL else plan
            while current is not None and effort <= MOST_CLIMB_EFFORT:
                near = [new for entry in self._near(current) for new in self.take(entry.plan)]
                effort += sum(Priced(entry, 0.0).effort for entry in near)
                best = min(near, key=self._pace_s, default=current)
                current = best if self._pace_s(best) < self._pace_s(current) else None

    def ranked(self) -> list[Plan]:
        """All variants, the one of the least pace first."""
        found = dict.fromkeys(v for variants in self.variants.values() for v in variants)
        return sorted(found, key=lambda variant: pace_s(self.problem, variant))

    def _starts(self) -> list[Plan]:
        """The best of every sequence of groups, equal devices not told apart."""
        best: dict[tuple[Mix, ...], Plan] = {}
        mix = self.problem.lanes.mix
        for plan in sorted((p for p, variants in self.variants.items() if variants), key=self._pace_s):
            best.setdefault(tuple(mix(span.group) for span in spans_of(self.problem, plan)), plan)
        return list(best.values())[:CLIMBS]

    def _near(self, plan: Plan) -> Iterator[Priced]:
        near = [*near_borders(self.problem, plan, REACH), *recounted(self.problem, plan)]
        near += near_joins(self.problem, plan)
        if self.regroup != "no":
            near += near_groups(self.problem, plan, singles=self.regroup == "singles")
        entries = [entry for o in near for entry in built(self.problem, plan.strategy, o, "deep")]
        hopeless = HOPELESS * price(self.problem, plan).step_time_s
        yield from (entry for entry in entries if entry.price_s <= hopeless)

    def take(self, plan: Plan, most: int = FIRST) -> list[Plan]:
        """The plan and itself with layers that run again, each with about ``most`` variants."""
        again = run_again(self.problem, plan)
        both = [plan] if again is None else [plan, again]
        for one in both:
            if one not in self.variants:
                found = likely_variants(self.problem, one, most)
                self.variants[one] = sorted(found, key=lambda v: pace_s(self.problem, v))
        return both

    def _pace_s(self, plan: Plan) -> float:
        variants = self.variants[plan]
        return pace_s(self.problem, variants[0]) if variants else float("inf")
