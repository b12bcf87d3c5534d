"""How fast devices and links are now, from what a run itself shows: measured over expected.

Expected is the simulated Timeline of the plan that runs, on the numbers believed so far. Both sides count the
same: compute from its start to its end, a message for as long as its link has it (latency comes after). So
what slows messages of one link in the simulation too, such as others on the same pipe, is not taken for a
slower link.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median

from spanwise.core.cluster import Cluster
from spanwise.core.observed import Arrival, Departure, DeviceStep
from spanwise.core.profile import DeviceTimes, LinkTimes, Profile
from spanwise.core.program import Action
from spanwise.core.routes import Routes
from spanwise.core.timeline import Timeline
from spanwise.cost import ring_edge_bytes

Link = tuple[str, str]

WINDOW = 3  # steps that must agree before something has moved
STEP_BAND = 1.15  # measured over predicted step time
DEVICE_BAND = 1.15
LINK_BAND = 1.2
BIG = 1.5  # beyond this two steps are enough
CALM_WEIGHT = 0.3  # of the newest step in the smoothed ratio
LEAST_COMPUTE_S = 1e-4  # below it a step says nothing about a device
LEAST_LINK_S = 2e-3  # the same for a link: wake-ups of threads take up to a millisecond
LEAST_MESSAGE_BYTES = 4096
_SHORTEST_S = 1e-5


@dataclass(frozen=True)
class Expected:
    """What a simulation says that devices will show.

    ``compute_s`` by device, kind of compute and stage; ``rates`` are bytes per second of each link while it
    carries a message, shared as it is with others.
    """

    step_s: float
    compute_s: Mapping[tuple[str, str, int], float]
    rates: Mapping[Link, float]

    @classmethod
    def of(cls, timeline: Timeline) -> Expected:
        """From a simulated Timeline with spans."""
        compute: dict[tuple[str, str, int], list[float]] = {}
        carried: dict[Link, tuple[float, float]] = {}
        for span in timeline.spans:
            source, arrow, target = span.lane.partition(">")
            if not arrow and span.kind not in ("wait", "step", "lost"):
                key = (source, span.kind, Action.parse(span.action).stage)
                compute.setdefault(key, []).append(span.seconds)
            elif arrow:
                action = Action.parse(span.action)
                edge = (
                    ring_edge_bytes(len(action.members), action.nbytes) if action.members else action.nbytes
                )
                nbytes, seconds = carried.get((source, target), (0.0, 0.0))
                carried[source, target] = (nbytes + edge, seconds + span.seconds)
        rates = {link: n / s for link, (n, s) in carried.items() if s > 0}
        return cls(timeline.step_time_s, {key: median(found) for key, found in compute.items()}, rates)


@dataclass(frozen=True)
class Ratios:
    """Measured over expected seconds, by what was seen in a step: 2.0 is twice as slow as believed."""

    step: float
    devices: Mapping[str, float] = field(default_factory=dict[str, float])
    links: Mapping[Link, float] = field(default_factory=dict[Link, float])


def ratios(
    expected: Expected, step_s: float, observed: Sequence[DeviceStep], latency_s: Mapping[Link, float]
) -> Ratios:
    """How one step compares with what was expected of it."""
    devices: dict[str, float] = {}
    for seen in observed:
        pairs = [
            (entry.seconds, expected.compute_s[seen.device, entry.kind, entry.stage])
            for entry in seen.compute
            if (seen.device, entry.kind, entry.stage) in expected.compute_s
        ]
        awaited = sum(s for _, s in pairs)
        if awaited >= LEAST_COMPUTE_S:
            devices[seen.device] = sum(s for s, _ in pairs) / awaited
    links: dict[Link, float] = {}
    for link, (nbytes, seconds) in _carried(observed, latency_s).items():
        if link in expected.rates:
            awaited = nbytes / expected.rates[link]
            if max(awaited, seconds) >= LEAST_LINK_S:
                links[link] = max(seconds, _SHORTEST_S) / awaited
    return Ratios(step_s / expected.step_s if expected.step_s else 1.0, devices, links)


def _carried(
    observed: Sequence[DeviceStep], latency_s: Mapping[Link, float]
) -> dict[Link, tuple[float, float]]:
    """Bytes of messages for which a link's time is known for sure, and that time."""
    came = {(a.peer, seen.device, a.tag): a for seen in observed for a in seen.received}
    out: dict[Link, tuple[float, float]] = {}
    for seen in observed:
        by_peer: dict[str, list[Departure]] = {}
        for departure in seen.sent:
            by_peer.setdefault(departure.peer, []).append(departure)
        for peer, departures in by_peer.items():
            arrivals = [came.get((seen.device, peer, d.tag)) for d in departures]
            found = _link_time(departures, arrivals, latency_s.get((seen.device, peer), 0.0))
            if found[0]:
                out[seen.device, peer] = found
    return out


def _link_time(
    sent: Sequence[Departure], came: Sequence[Arrival | None], latency_s: float
) -> tuple[float, float]:
    """(bytes, seconds) of the messages of one link.

    Messages of a link follow each other. One has the link from when it was handed over, or from when the one
    before had left it if that is later, until its arrival less the latency. Its arrival is known if somebody
    waited for it; that of the one before must be known too, or be over when this one was handed over.
    """
    pairs = sorted(((d, a) for d, a in zip(sent, came, strict=True)), key=lambda pair: pair[0].at_s)
    nbytes, seconds = 0.0, 0.0
    free_s, sure = -math.inf, True  # when the link is free, and whether that is exact
    for departure, arrival in pairs:
        if arrival is None:
            free_s, sure = math.inf, False
            continue
        left_s = arrival.at_s - latency_s
        known = arrival.waited and (sure or free_s <= departure.at_s)
        if known and departure.nbytes >= LEAST_MESSAGE_BYTES:
            nbytes += departure.nbytes
            seconds += max(0.0, left_s - max(departure.at_s, free_s))
        free_s, sure = left_s, arrival.waited
    return nbytes, seconds


@dataclass(frozen=True)
class Drift:
    """Something has moved for good: what, and whether so far that it should be acted on at once."""

    reason: str
    big: bool
    conditions: bool  # a device or link did, not only the step time


class Tracker:
    """Ratios of the last steps of one kind: smoothed while calm, their median once they have moved."""

    def __init__(self, band: float) -> None:
        self._band = band
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._smooth: float | None = None

    def add(self, ratio: float) -> None:
        """Takes the newest step in."""
        value = math.log(max(ratio, 1e-6))
        self._last.append(value)
        if self._smooth is None:
            self._smooth = value
        else:
            self._smooth += CALM_WEIGHT * (value - self._smooth)

    @property
    def big(self) -> bool:
        """Whether the last two steps are far out, both to the same side."""
        return self._beyond(BIG, 2)

    @property
    def moved(self) -> bool:
        """Whether the last steps are all out of the band, to the same side."""
        return self.big or self._beyond(self._band, WINDOW)

    @property
    def ratio(self) -> float:
        """The best estimate now."""
        if self._smooth is None:
            return 1.0
        if not self.moved:
            return math.exp(self._smooth)
        return math.exp(median(list(self._last)[-2:] if self.big else self._last))

    def _beyond(self, band: float, steps: int) -> bool:
        last = list(self._last)[-steps:]
        if len(last) < steps:
            return False
        return min(last) > math.log(band) or max(last) < -math.log(band)


class Estimator:
    """Follows a run against one expectation; ``fitted`` gives the numbers to plan with."""

    def __init__(self, profile: Profile, cluster: Cluster, expected: Expected) -> None:
        self.profile, self.expected = profile, expected
        self._cluster = cluster
        self._routes = Routes(cluster, profile.links)
        self._latency_s = {
            (a, b): self._routes.route(a, b).latency_s
            for a in cluster.ids
            for b in cluster.ids
            if a != b and cluster.connected(a, b)
        }
        self._recent: deque[tuple[float, Sequence[DeviceStep]]] = deque(maxlen=WINDOW)
        self._step = Tracker(STEP_BAND)
        self._devices: dict[str, Tracker] = {}
        self._links: dict[Link, Tracker] = {}

    def add(self, step_s: float, observed: Sequence[DeviceStep]) -> Ratios:
        """Takes a step in."""
        found = ratios(self.expected, step_s, observed, self._latency_s)
        self._recent.append((step_s, observed))
        self._step.add(found.step)
        for device, ratio in found.devices.items():
            self._devices.setdefault(device, Tracker(DEVICE_BAND)).add(ratio)
        for link, ratio in found.links.items():
            self._links.setdefault(link, Tracker(LINK_BAND)).add(ratio)
        return found

    @property
    def step_ratio(self) -> float:
        """Measured over expected step time."""
        return self._step.ratio

    def drift(self) -> Drift | None:
        """What has moved, if anything has."""
        moved = [f"{d} takes {t.ratio:.2f} times as long" for d, t in self._devices.items() if t.moved]
        moved += [
            f"{a}>{b} has {1 / t.ratio:.2f} of its rate" for (a, b), t in self._links.items() if t.moved
        ]
        trackers = [*self._devices.values(), *self._links.values()]
        if moved:
            return Drift("; ".join(moved), any(t.big for t in trackers), True)
        if self._step.moved:
            reason = f"steps take {self._step.ratio:.2f} times as long as predicted"
            return Drift(reason, self._step.big, False)
        return None

    def again(self, profile: Profile, expected: Expected) -> Estimator:
        """The last steps once more, against another expectation; those since it moved, if it has.

        A link that slows down changes how messages meet on others too. What was taken for a change of theirs
        goes away when the steps are held against a simulation that knows of the first.
        """
        drift = self.drift()
        steps = list(self._recent)[-2:] if drift is not None and drift.big else list(self._recent)
        estimator = Estimator(profile, self._cluster, expected)
        for step_s, observed in steps:
            estimator.add(step_s, observed)
        return estimator

    def fitted(self) -> Profile:
        """The profile with devices and links as they showed themselves.

        A pair that was not seen takes the ratio of the pairs that share its pipe between sites, of the least
        slowed one: that is how fast the pipe still is. Other pairs stay as they were.
        """
        devices = tuple(self._device(entry) for entry in self.profile.devices)
        ratios = {link: tracker.ratio for link, tracker in self._links.items()}
        pipes: dict[str, float] = {}
        for (a, b), ratio in ratios.items():
            for name in self._pipes(a, b):
                pipes[name] = min(pipes.get(name, math.inf), ratio)
        known = {(x.source, x.target): x for x in self.profile.links}
        links = dict(known)
        for a, b in chain(self._latency_s):
            ratio = ratios.get((a, b))
            if ratio is None:
                ratio = max((pipes[name] for name in self._pipes(a, b) if name in pipes), default=None)
            if ratio is not None:
                route = self._routes.route(a, b)
                links[a, b] = LinkTimes(
                    source=a, target=b, latency_s=route.latency_s,
                    bandwidth_bytes_per_s=route.bandwidth_bytes_per_s / ratio,
                )  # fmt: skip
        return self.profile.model_copy(update={"devices": devices, "links": tuple(links.values())})

    def _device(self, entry: DeviceTimes) -> DeviceTimes:
        tracker = self._devices.get(entry.device)
        if tracker is None:
            return entry
        return entry.model_copy(update={"factor": entry.factor * tracker.ratio})

    def _pipes(self, source: str, target: str) -> list[str]:
        """Names of the links between sites that a message passes; ports are each device's own."""
        resources = self._cluster.route(source, target).resources
        return [name for name, _ in resources if name.startswith("link:")]
