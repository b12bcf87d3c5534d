"""What a run's own messages do not show: links that it no longer uses, and why steps get longer.

When a step is longer than usual, the links between sites that the plan uses are probed: messages of the run
tell of a link only if somebody waits for them, and a probe has no compute in it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from spanwise.core.cluster import Cluster
from spanwise.core.profile import Profile
from spanwise.core.routes import Routes
from spanwise.planner.adapting.estimate import DEVICE_BAND, LINK_BAND, Estimator
from spanwise.planner.adapting.ratios import Link

PROBE_EVERY_S = 1.5
PROBE_SOON_S = 0.2  # after the last, where a step was far longer: an earlier one knows nothing of why
PATIENCE_S = 5.0  # for which the answer of a probe is awaited before a step time counts as unexplained
PROBE_S = 0.01  # bytes of a probe: so long at a rate between what the link had at first and what it has
LEAST_PROBE_BYTES, MOST_PROBE_BYTES = 16_384, 262_144
SMALL_PROBE_BYTES = 1_000
FORGET_S = 30.0  # the first time; twice as long each time


@dataclass(frozen=True, slots=True)
class Look:
    """A link to measure, and the sizes of the messages to do it with."""

    link: Link
    sizes: tuple[int, ...]


class Explorer:
    """Knows what a run began with, and so what may come back.

    A link that slowed down and carries nothing is probed. A device that slowed down and has nothing to do
    cannot be: after a while it is taken for as fast as at first, and if it is not, the run finds out.
    """

    def __init__(self, first: Profile, cluster: Cluster) -> None:
        routes = Routes(cluster, first.links)
        self._rates = {
            (a, b): routes.route(a, b).bandwidth_bytes_per_s
            for a in cluster.ids
            for b in cluster.ids
            if a != b and cluster.connected(a, b)
        }
        self._factors = {entry.device: entry.factor for entry in first.devices}
        self._looked_s = -math.inf
        self._odd_since_s: float | None = None
        self._asked_s: dict[Link, deque[float]] = {}  # when probes were sent that have not come back
        self._urgent = set[Link]()  # of these, what the next steps wait for
        self._answered_s: dict[tuple[str, str], float] = {}  # by two sites: when the last that has was sent
        self._turn = 0
        self._idle_since_s: dict[str, float] = {}
        self._patience_s: dict[str, float] = {}

    def look(self, estimator: Estimator, now_s: float) -> tuple[Look, ...]:
        """What to probe now: a pair of devices, both ways or one; pipes between sites take turns."""
        newly = estimator.odd and self._odd_since_s is None
        if newly:
            self._odd_since_s = now_s
        elif not estimator.odd and estimator.drift() is None:
            self._odd_since_s = None
        everywhere = newly and estimator.late
        soon = newly or estimator.far or estimator.half_known
        if now_s - self._looked_s < (PROBE_SOON_S if soon else PROBE_EVERY_S):
            return ()
        suspected = self._suspected(estimator, everywhere) if estimator.odd else ()
        found = suspected or self._idle(estimator)
        if found:
            self._looked_s = now_s
        for look in found:
            self._asked_s.setdefault(look.link, deque()).append(now_s)
        if everywhere:
            self._urgent = {look.link for look in found}
        return found

    def looked(self, estimator: Estimator, link: Link) -> None:
        """A probe has come back."""
        asked, ends = self._asked_s.get(link), estimator.ends(link)
        if not asked:
            return
        sent_s = asked.popleft()
        self._urgent.discard(link)
        if ends is not None:
            self._answered_s[ends] = sent_s

    def awaits(self, estimator: Estimator, now_s: float) -> bool:
        """Whether some sites of the plan were not probed since steps take another time.

        What a link did not show may still be why. The answers come with later steps, or not at all.
        """
        since_s = now_s if self._odd_since_s is None else self._odd_since_s
        if now_s - since_s >= PATIENCE_S:
            return False
        return any(self._answered_s.get(ends, -math.inf) < since_s for ends in self._pairs(estimator))

    @property
    def asked_s(self) -> float | None:
        """When probes were sent for a step that was late, if some have not come back."""
        return max((self._asked_s[link][-1] for link in self._urgent), default=None)

    def _suspected(self, estimator: Estimator, everywhere: bool) -> tuple[Look, ...]:
        """Two sites that the plan has messages between, or all of them ``everywhere``, and two devices inside
        a site between which messages seem to have another speed.
        """
        inside = sorted({(min(link), max(link)) for link in estimator.suspects})
        between = tuple(self._pairs(estimator).values())
        self._turn += 1
        due = [found[self._turn % len(found)] for found in (between, inside) if found]
        due = [*between, *due] if everywhere else due
        ways = [way for a, b in dict.fromkeys(due) for way in ((a, b), (b, a)) if way in self._rates]
        return tuple(Look(way, self._sizes(estimator, way)) for way in ways)

    def _pairs(self, estimator: Estimator) -> dict[tuple[str, str], Link]:
        """All sites that the plan has messages between, with two fast devices there.

        Others for every two sites as far as there are some: then they are probed at the same time.
        """
        factors = {entry.device: entry.factor for entry in estimator.profile.devices}
        used = {estimator.ends(link) for link in estimator.expected.rates}
        between: dict[tuple[str, str], list[Link]] = {}
        for link in self._rates:
            ends = estimator.ends(link)
            if ends in used and ends is not None and (link[1], link[0]) in self._rates:
                between.setdefault(ends, []).append(link)
        pairs: dict[tuple[str, str], Link] = {}
        for ends, links in between.items():
            taken = {device for pair in pairs.values() for device in pair}
            pairs[ends] = min(
                links, key=lambda k: (len(taken.intersection(k)), factors[k[0]] + factors[k[1]])
            )
        return pairs

    def _idle(self, estimator: Estimator) -> tuple[Look, ...]:
        """A link that slowed down and carries nothing, and its way back if that is so of it too."""
        due: dict[str, Link] = {}
        shown = estimator.shown_pipes
        for link, first in self._rates.items():
            if estimator.rate(link) * LINK_BAND < first and estimator.pipe(link) not in shown:
                due.setdefault(estimator.pipe(link), link)
        if not due:
            return ()
        self._turn += 1
        link = tuple(due.values())[self._turn % len(due)]
        back = (link[1], link[0])
        ways = (link, back) if back in self._rates and estimator.pipe(back) in due else (link,)
        return tuple(Look(way, self._sizes(estimator, way)) for way in ways)

    def _sizes(self, estimator: Estimator, link: Link) -> tuple[int, ...]:
        rate = math.sqrt(self._rates[link] * min(self._rates[link], estimator.rate(link)))
        large = int(min(MOST_PROBE_BYTES, max(LEAST_PROBE_BYTES, PROBE_S * rate)))
        return (SMALL_PROBE_BYTES, large, SMALL_PROBE_BYTES, large)

    def forgotten(self, profile: Profile, used: Sequence[str], now_s: float) -> tuple[str, ...]:
        """Devices that have been slow and idle for long enough."""
        out: list[str] = []
        for entry in profile.devices:
            slow = entry.factor > DEVICE_BAND * self._factors[entry.device]
            if not slow or entry.device in used:
                self._idle_since_s.pop(entry.device, None)
                continue
            since_s = self._idle_since_s.setdefault(entry.device, now_s)
            if now_s - since_s >= self._patience_s.get(entry.device, FORGET_S):
                out.append(entry.device)
        return tuple(out)

    def forget(self, profile: Profile, devices: Sequence[str]) -> Profile:
        """The profile with these devices as fast as at first; the next time they wait twice as long."""
        for device in devices:
            self._patience_s[device] = 2 * self._patience_s.get(device, FORGET_S)
        entries = tuple(
            e.model_copy(update={"factor": self._factors[e.device]}) if e.device in devices else e
            for e in profile.devices
        )
        return profile.model_copy(update={"devices": entries})
