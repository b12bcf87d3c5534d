"""Messages between groups at typical rows: what a search assumes before it knows the rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from spanwise.planner.facts.kinds import Group, Kinds, Mix, mix_of
from spanwise.planner.facts.links import Lane, Links, Shares
from spanwise.planner.facts.rows import min_max_rows
from spanwise.planner.facts.tables import Tables

Ways = tuple[Lane, Lane]


@dataclass(slots=True)
class Lanes:
    """Lanes between groups, worked out when first asked for, once for all groups of equal devices.

    Typical rows of a group are those that balance the time of the whole model over a whole batch.
    ``sources`` is empty where every device has the data: then rows start out where they are computed first.
    """

    tables: Tables
    links: Links
    sources: Shares
    kinds: Kinds
    _mixes: dict[Group, Mix] = field(default_factory=dict[Group, Mix])
    _shares: dict[Group, Shares] = field(default_factory=dict[Group, Shares])
    _between: dict[object, Ways | None] = field(default_factory=dict[object, "Ways | None"])
    _pairs: dict[tuple[Group, Group], Ways | None] = field(
        default_factory=dict[tuple[Group, Group], "Ways | None"]
    )
    _inputs: dict[Mix, Lane | None] = field(default_factory=dict[Mix, "Lane | None"])

    def mix(self, group: Group) -> Mix:
        """How many devices of each kind; of groups of one mix one is as good as the other."""
        if group not in self._mixes:
            self._mixes[group] = mix_of(self.kinds, group)
        return self._mixes[group]

    def shares(self, group: Group) -> Shares:
        """Fractions of a micro-batch."""
        if group not in self._shares:
            order = self.links.in_order(group)
            whole = self.tables.both[list(order), -1, 1:]
            total = whole.shape[1]
            rows, _ = min_max_rows(whole[None], total)
            counts = [max(int(y), 1) / total for y in rows[0]]
            self._shares[group] = tuple(zip(order, counts, strict=True))
        return self._shares[group]

    def between(self, before: Group, after: Group) -> Ways | None:
        """Forward and backward messages of two consecutive stages; None without links both ways."""
        pair = (before, after)
        if pair not in self._pairs:
            self._pairs[pair] = self._found(before, after)
        return self._pairs[pair]

    def _found(self, before: Group, after: Group) -> Ways | None:
        apart = set(before).isdisjoint(after)  # rows that stay on a device that both have cost nothing
        key = (self.mix(before), self.mix(after)) if apart else (before, after)
        if key not in self._between:
            self._between[key] = self._ways(before, after)
        return self._between[key]

    def inputs(self, first: Group) -> Lane | None:
        """Raw data to a first stage, in the replica order that moves least."""
        key = self.mix(first)
        if key not in self._inputs:
            shares = self.links.aligned(self.shares(first), self.sources)
            self._inputs[key] = self.links.lane(self.sources or shares, shares)
        return self._inputs[key]

    def gets_labels(self, last: Group) -> bool:
        """Whether the data devices reach every device of a last stage; true where they are not given."""
        return self.links.reach(tuple(d for d, _ in self.sources), last)

    @property
    def misses_labels(self) -> bool:
        """Whether a first stage, where it is the source, may have no link to the last."""
        everyone = tuple(range(len(self.links)))
        return not self.sources and not self.links.reach(everyone, everyone)

    def _ways(self, before: Group, after: Group) -> Ways | None:
        if not self.links.joined(before, after):
            return None
        a, b = self.shares(before), self.shares(after)
        forth, back = self.links.lane(a, b, cut=True), self.links.lane(b, a, cut=True)
        return None if forth is None or back is None else (forth, back)
