"""How fast devices and links are now: ratios over the last steps, and the profile that fits them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

from spanwise.core.cluster import Cluster
from spanwise.core.observed import DeviceStep
from spanwise.core.profile import LinkTimes, Profile
from spanwise.core.routes import Routes
from spanwise.planner.adapting.drift import Cause, Drift
from spanwise.planner.adapting.ratios import SHORTEST_S, Expected, Link, Ratios, ratios
from spanwise.planner.adapting.tracker import (
    BIG,
    BIG_WINDOW,
    BIG_WINDOW_S,
    KEPT,
    WINDOW,
    WINDOW_S,
    Tracker,
    Usual,
    alike,
    newest,
)

STEP_BAND = 1.1  # measured over predicted step time
DEVICE_BAND = 1.15
LINK_BAND = 1.2
# What a plan's first steps may be off a simulation by without anything having moved. Of links more, as two
# messages that meet on a pipe in one of both and not in the other are twice as slow.
OWN_DEVICE, OWN_LINK = 1.5, 2.2
PROBE_LASTS = 4  # steps for which a probe is news


class Estimator:
    """Follows a run against one expectation; ``fitted`` gives the numbers to plan with.

    ``usual`` is what another Estimator of the same plan has found to be usual, by device and link, and
    ``usual_step`` of step times; ``first`` the numbers that the run began with. ``latency_s`` has every pair
    of devices that is connected.
    """

    def __init__(
        self,
        profile: Profile,
        cluster: Cluster,
        expected: Expected,
        usual: Mapping[str | Link, float] | None = None,
        usual_step: float | None = None,
        first: Profile | None = None,
    ) -> None:
        self.profile, self.expected = profile, expected
        self._first = first or profile
        self._cluster = cluster
        self._routes = Routes(cluster, profile.links)
        self.latency_s = {
            (a, b): self._routes.route(a, b).latency_s
            for a in cluster.ids
            for b in cluster.ids
            if a != b and cluster.connected(a, b)
        }
        self._recent: deque[tuple[float, Sequence[DeviceStep]]] = deque(maxlen=KEPT)
        self._step = Tracker(STEP_BAND)
        self._devices: dict[str, Tracker] = {}
        self._links: dict[Link, Tracker] = {}
        self._shown: set[Link] = set()  # by messages of the run, not by probes
        self._probes: dict[Link, tuple[float, int]] = {}  # bytes per second, and steps since
        self._even: frozenset[str] = frozenset()  # devices of whose last step all compute has moved alike
        self._usual_step = Usual(OWN_DEVICE, usual_step)
        self._usual: dict[str | Link, Usual] = {
            key: Usual(OWN_LINK, found) for key, found in (usual or {}).items()
        }

    @property
    def usual(self) -> dict[str | Link, float]:
        """Measured over expected of devices and links in the first steps, as far as it is known."""
        return {key: found.ratio for key, found in self._usual.items() if found.ratio is not None}

    def add(self, step_s: float, observed: Sequence[DeviceStep]) -> Ratios:
        """Takes a step in."""
        found = ratios(self.expected, step_s, observed, self.latency_s)
        self._recent.append((step_s, observed))
        self._probes = {k: (r, age + 1) for k, (r, age) in self._probes.items() if age < PROBE_LASTS}
        self._even = found.even
        for ratio, seconds in self._usual_step.over(found.step, step_s):
            self._step.add(ratio, seconds)
        for device, measured in found.devices.items():
            for ratio, seconds in self._usual.setdefault(device, Usual(OWN_DEVICE)).over(measured, step_s):
                self._devices.setdefault(device, Tracker(DEVICE_BAND)).add(ratio, seconds)
        self._shown.update(found.links)
        for link, measured in found.links.items():
            for ratio, seconds in self._usual.setdefault(link, Usual(OWN_LINK)).over(measured, step_s):
                self._links.setdefault(link, Tracker(LINK_BAND)).add(ratio, seconds)
        return found

    def probed(self, link: Link, samples: Sequence[tuple[int, float]]) -> None:
        """Takes in a probe of a link: (bytes, round-trip seconds).

        It counts as two steps, as it has no compute in it.
        """
        small, large = min(n for n, _ in samples), max(n for n, _ in samples)
        if small == large:
            return
        least = {size: min(s for n, s in samples if n == size) for size in (small, large)}
        awaited_s = (large - small) / self.rate(link)
        for other in self._links.keys() - self._shown - {link}:
            if self.pipe(other) == self.pipe(link):
                del self._links[other]  # an earlier probe: this one is newer
        tracker = self._links.setdefault(link, Tracker(LINK_BAND))
        found_s = max(least[large] - least[small], SHORTEST_S)
        if not self._between_sites(link):  # what is found faster than at first is a small message that waited
            found_s = max(found_s, (large - small) / self._first_rate(link))
        self._probes[link] = ((large - small) / found_s, 0)
        for _ in range(2):
            tracker.add(found_s / awaited_s, BIG_WINDOW_S)

    def _first_rate(self, link: Link) -> float:
        return Routes(self._cluster, self._first.links).route(*link).bandwidth_bytes_per_s

    def rate(self, link: Link) -> float:
        """Bytes per second of a link as believed."""
        return self._routes.route(*link).bandwidth_bytes_per_s

    @property
    def shown_pipes(self) -> frozenset[str]:
        """What messages of the run have shown something of; see ``pipe``."""
        return frozenset(self.pipe(link) for link in self._shown)

    def drift(self) -> Drift | None:
        """Whether something has moved that matters: step times show it, or it is sure by itself.

        A processor that comes in portions does single messages and short computes now at once, now a portion
        later, so some device or link always seems to have moved. Steps take as long as before if it has not.
        """
        trackers = [*self._devices.values(), *self._links.values()]
        far = [*self._devices.values(), *(t for k, t in self._links.items() if self._between_sites(k))]
        sure = any(map(self._sure_device, self._devices)) or any(map(self._sure_link, self._links))
        soon = self._step.soon and any(tracker.big for tracker in far)
        if self._step.moved or soon or sure:
            big = self._step.big or any(tracker.big for tracker in trackers)
            return Drift(big, conditions=sure or any(tracker.moved for tracker in trackers))
        return Drift(big=True, conditions=True, leap=True) if self._leaps() else None

    @property
    def odd(self) -> bool:
        """Whether the newest step took another time than usual."""
        return _out(self._step.newest, STEP_BAND)

    @property
    def late(self) -> bool:
        """Whether it took longer."""
        return self._step.newest > STEP_BAND

    @property
    def far(self) -> bool:
        """Whether it took a far longer or shorter one."""
        return _out(self._step.newest, BIG)

    @property
    def half_known(self) -> bool:
        """Whether a probe found a link faster, and its way back not yet."""
        faster = (k for k, t in self._links.items() if k not in self._shown and t.moved and t.ratio < 1)
        return not all(map(self._both_ways_faster, faster))

    @property
    def suspects(self) -> list[Link]:
        """Links inside a site that seem to have moved, by messages."""
        return [k for k, t in self._links.items() if t.moved and not self._between_sites(k)]

    def _leaps(self) -> dict[str | Link, float]:
        """What has leapt in the newest step, which took far longer or shorter itself, with the ratio.

        A device counts if all of its compute has, a link if its way back has: of a hiccup that is not so.
        For both directions between two sites a step that is out of the band is enough, by messages or probes.
        """
        found: dict[str | Link, float] = {}
        for device, tracker in self._devices.items() if self._step.leap is not None else ():
            if tracker.leap is not None and device in self._even:
                found[device] = tracker.leap
        if not self.odd:
            return found
        probed = self._probed
        ways = {k: t.leap for k, t in self._links.items() if k in self._shown and self._between_sites(k)}
        ways |= probed
        for link, there in ways.items():
            back = ways.get((link[1], link[0]))
            if there is None or back is None or not alike(there, back) or not _out(there, BIG):
                continue
            if link in probed:
                found |= {other: there for other in self._links if self.pipe(other) == self.pipe(link)}
            elif all(alike(there, ways[k] or 1.0) for k in ways if self.pipe(k) == self.pipe(link)):
                found[link] = there  # with all that share its pipe, or it is not the pipe
        return found

    @property
    def _probed(self) -> dict[Link, float]:
        """Ratios by probes that are news: believed over found rate."""
        return {link: self.rate(link) / found for link, (found, _) in self._probes.items()}

    def _sure_device(self, device: str) -> bool:
        """It had slowed down and has been faster for long.

        What is slower and makes no step longer is of no concern. What seems faster than at first, by steps
        under another plan that were slow to begin with, is not so without steps that say it too.
        """
        tracker = self._devices.get(device)
        if tracker is None or not tracker.lasting or tracker.ratio >= 1:
            return False
        return self.profile.table(device)[1] > DEVICE_BAND * self._first.table(device)[1]

    def _sure_link(self, link: Link) -> bool:
        """A probe shows it, or messages of both directions between two sites have been faster for long."""
        tracker, back = self._links.get(link), self._links.get((link[1], link[0]))
        if tracker is None or not tracker.moved:
            return False
        if link not in self._shown:
            # Where messages of the run pass as well, a probe may have met them, and was the slower for it.
            used = self.shown_pipes.union(map(self.pipe, self.expected.rates))
            return self._both_ways_faster(link) if tracker.ratio < 1 else self.pipe(link) not in used
        if back is None or not self._between_sites(link) or not (tracker.lasting and back.lasting):
            return False
        return max(tracker.ratio, back.ratio) < 1 and alike(tracker.ratio, back.ratio)

    def _both_ways_faster(self, link: Link) -> bool:
        """Whether the way back is too, or it has been so for long, or there is no way back.

        Where a link is back as it was between the probes of its two ways, both are known with the next.
        """
        back, tracker = (link[1], link[0]), self._links[link]
        if back not in self.latency_s or not self._between_sites(link) or tracker.lasting:
            return True
        found = self._probes.get(back, (self.rate(back), 0))[0]
        return alike(found / self._first_rate(back), self.rate(link) / tracker.ratio / self._first_rate(link))

    def _between_sites(self, link: Link) -> bool:
        return self.pipe(link).startswith("link:")

    def causes(self, fitted: Profile) -> list[Cause]:
        """What is out of the band in a fitted profile, one device or pair of sites apart from the other.

        A link only if it is sure, has leapt, or a probe has just found it so: of single messages that a
        device takes in when its next portion of processor comes, a link looks 20 times slower or faster.
        """
        old = {entry.device: entry.factor for entry in self.profile.devices}
        leaps = self._leaps()
        found: list[Cause] = []
        for entry in fitted.devices:
            if _out(ratio := entry.factor / old[entry.device], DEVICE_BAND):
                tracker, name = self._devices.get(entry.device), entry.device
                turned, leapt = tracker is not None and tracker.turned, name in leaps
                found.append(
                    Cause((entry,), (), self._sure_device(name), abs(math.log(ratio)), turned, leapt)
                )
        pairs: dict[tuple[str, ...], list[tuple[LinkTimes, float]]] = {}  # with the ratio of its rate
        for entry in fitted.links:
            link = (entry.source, entry.target)
            if _out(ratio := entry.bandwidth_bytes_per_s / self.rate(link), LINK_BAND):
                ends = tuple(sorted(_names(self.pipe(link))))
                pairs.setdefault(ends, []).append((entry, ratio))
        probed = {self.pipe(link) for link, ratio in self._probed.items() if _out(ratio, LINK_BAND)}
        for links in pairs.values():
            ways = [(entry.source, entry.target) for entry, _ in links]
            known = {w for w in ways if w in leaps or self.pipe(w) in probed or self._sure_link(w)}
            if not known:
                continue
            pipes = set(map(self.pipe, known))
            sure, leapt = any(map(self._sure_link, known)), any(way in leaps for way in known)
            turned = bool(pipes & probed) or any(w in self._links and self._links[w].turned for w in known)
            # Of a pipe those that were not seen follow; what was seen otherwise is its own, late or early.
            known.update(way for way in ways if way not in self._links and self.pipe(way) in pipes)
            own = [pair for way, pair in zip(ways, links, strict=True) if way in known]
            far = max(abs(math.log(ratio)) for _, ratio in own)
            found.append(Cause((), tuple(entry for entry, _ in own), sure, far, turned, leapt))
        return found

    def under(self, causes: Sequence[Cause]) -> Profile:
        """The numbers believed so far, but for these."""
        devices = {entry.device: entry for cause in causes for entry in cause.devices}
        links = {(entry.source, entry.target): entry for entry in self.profile.links}
        links |= {(entry.source, entry.target): entry for cause in causes for entry in cause.links}
        return self.profile.model_copy(
            update={
                "devices": tuple(devices.get(entry.device, entry) for entry in self.profile.devices),
                "links": tuple(links.values()),
            }
        )

    def near(self, a: Profile, b: Profile, most: float) -> bool:
        """Whether all numbers of devices and links in two profiles are less than ``most`` times apart."""
        factors = {entry.device: entry.factor for entry in b.devices}
        if any(not 1 / most < e.factor / factors[e.device] < most for e in a.devices):
            return False
        one, other = Routes(self._cluster, a.links), Routes(self._cluster, b.links)
        return all(
            1 / most
            < one.route(*link).bandwidth_bytes_per_s / other.route(*link).bandwidth_bytes_per_s
            < most
            for link in self.latency_s
        )

    @property
    def usual_step(self) -> float:
        """Measured over expected step time in the first steps; 1 until it is known."""
        return self._usual_step.ratio or 1.0

    def changes(self, profile: Profile) -> str:
        """What of the devices and links that were seen is out of the band in a fitted profile, in words."""
        old = {entry.device: entry.factor for entry in self.profile.devices}
        seen = dict.fromkeys([*self._usual, *self._links])  # also those whose first steps are not over
        longer = {e.device: e.factor / old[e.device] for e in profile.devices if e.device in seen}
        routes = Routes(self._cluster, profile.links)
        rates = {
            link: routes.route(*link).bandwidth_bytes_per_s / self.rate(link)
            for link in seen
            if not isinstance(link, str)
        }
        found = [f"{d} takes {r:.2f} times as long" for d, r in longer.items() if _out(r, DEVICE_BAND)]
        found += [f"{a}>{b} has {r:.2f} of its rate" for (a, b), r in rates.items() if _out(r, LINK_BAND)]
        return "; ".join(found) or f"steps take {self._step.ratio:.2f} times as long as predicted"

    def again(self, profile: Profile, expected: Expected) -> Estimator:
        """The last steps once more, against another expectation; those since it moved, if it has.

        A link that slows down changes how messages meet on others too. What was taken for a change of theirs
        goes away when the steps are held against a simulation that knows of the first.
        """
        drift, span = self.drift(), (WINDOW, WINDOW_S)
        if drift is not None and drift.big:
            span = (1 if drift.leap else BIG_WINDOW, BIG_WINDOW_S)
        recent = [(step_s, (step_s, observed)) for step_s, observed in self._recent]
        usual = dict.fromkeys(self._usual, 1.0) | self.usual  # those unknown yet are not waited for again
        estimator = Estimator(profile, self._cluster, expected, usual, first=self._first)
        for step_s, observed in newest(recent, *span) or self._recent:
            estimator.add(step_s, observed)
        estimator._probes = self._probes
        return estimator

    def fitted(self) -> Profile:
        """The profile with devices and links as they showed themselves.

        A pair that was not seen has the rate of the fastest one that shares its pipe between sites: so much
        the pipe carries. Other pairs stay as they were. What has just been probed has the rate of the probe.
        """
        drift = self.drift()
        leaps = self._leaps() if drift is not None and drift.leap else {}
        factors = {d: leaps.get(d, tracker.ratio) for d, tracker in self._devices.items()}
        devices = tuple(
            entry.model_copy(update={"factor": entry.factor * factors.get(entry.device, 1.0)})
            for entry in self.profile.devices
        )
        shown = {
            link: self.rate(link) / leaps.get(link, tracker.ratio) for link, tracker in self._links.items()
        }
        pipes: dict[str, float] = {}
        for link, rate in shown.items():
            pipes[self.pipe(link)] = max(pipes.get(self.pipe(link), 0.0), rate)
        probed = {self.pipe(link): found for link, (found, _) in self._probes.items()}
        links = {(entry.source, entry.target): entry for entry in self.profile.links}
        for a, b in self.latency_s:
            rate, pipe = shown.get((a, b)), self.pipe((a, b))
            if pipe in probed or (rate is None and pipe in pipes):
                rate = min(probed.get(pipe, pipes.get(pipe, 0.0)), self._beside_pipe((a, b)))
            if rate is not None:
                links[a, b] = LinkTimes(
                    source=a, target=b, latency_s=self.latency_s[a, b], bandwidth_bytes_per_s=rate
                )
        return self.profile.model_copy(update={"devices": devices, "links": tuple(links.values())})

    def pipe(self, link: Link) -> str:
        """What a link shares with the others between two sites; inside a site it is the link's own."""
        found = self._cluster.route(*link).resources
        own = f"pair:{link[0]}>{link[1]}"
        return next((name for name, _ in found if name.startswith("link:")), own)

    def ends(self, link: Link) -> tuple[str, str] | None:
        """The two sites between which a link lies, in the order of their names; none inside a site."""
        pipe = self.pipe(link)
        if not pipe.startswith("link:"):
            return None
        a, b = sorted(_names(pipe))
        return a, b

    def _beside_pipe(self, link: Link) -> float:
        """The least capacity on the way that is not the pipe: ports of the two devices."""
        found = self._cluster.route(*link).resources
        return min((rate for name, rate in found if not name.startswith("link:")), default=math.inf)


def _out(ratio: float, band: float) -> bool:
    return ratio > band or ratio < 1 / band


def _names(pipe: str) -> list[str]:
    return pipe.partition(":")[2].split(">")
