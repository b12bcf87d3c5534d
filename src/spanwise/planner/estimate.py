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
from statistics import median
from typing import TypeVar

from spanwise.core.cluster import Cluster
from spanwise.core.observed import Arrival, Departure, DeviceStep
from spanwise.core.profile import DeviceTimes, LinkTimes, Profile
from spanwise.core.program import Action
from spanwise.core.routes import Routes
from spanwise.core.timeline import Timeline
from spanwise.cost import ring_edge_bytes

Link = tuple[str, str]
T = TypeVar("T")

# What must agree before something has moved: so many steps, and so many seconds of them, as steps of a few
# milliseconds all lie within one hiccup of a machine.
WINDOW, WINDOW_S = 3, 1.0
BIG_WINDOW, BIG_WINDOW_S = 2, 0.5
AGREE = 0.75  # of these steps must be out of the band
KEPT = 64  # steps
STEP_BAND = 1.15  # measured over predicted step time
DEVICE_BAND = 1.15
LINK_BAND = 1.2
BIG = 1.5  # beyond this the shorter time is enough
CALM_WEIGHT = 0.3  # of the newest step in the smoothed ratio
LEAST_SHARE = 0.05  # of the step time: a device or link that is at work for less decides nothing
LEAST_COMPUTE_S = 1e-4  # below it a step says nothing about a device
LEAST_LINK_S = 2e-3  # the same for a link: wake-ups of threads take up to a millisecond
LEAST_MESSAGE_BYTES = 4096
_SHORTEST_S = 1e-5


@dataclass(frozen=True)
class Expected:
    """What a simulation says that devices will show.

    ``compute_s`` by device, kind of compute and stage; ``rates`` are bytes per second of each link while it
    carries a message, shared as it is with others. Seconds are those of one of ``micro_batches``.
    """

    step_s: float
    compute_s: Mapping[tuple[str, str, int], float]
    rates: Mapping[Link, float]
    micro_batches: int = 1

    @classmethod
    def of(cls, timeline: Timeline) -> Expected:
        """From a simulated Timeline with spans: its last step, as the first begins with empty links.

        Of messages only those count that devices would report of a step, see ``core.observed.noted``.
        """
        last = max((span.step for span in timeline.spans), default=0)
        compute: dict[tuple[str, str, int], list[float]] = {}
        carried: dict[Link, list[tuple[float, float, float]]] = {}  # size, bytes in all, seconds
        for span in timeline.spans:
            source, arrow, target = span.lane.partition(">")
            if span.step != last or span.kind in ("wait", "step", "lost"):
                continue
            action = Action.parse(span.action)
            if not arrow:
                compute.setdefault((source, span.kind, action.stage), []).append(span.seconds)
                continue
            count, nbytes = len(action.members), float(action.nbytes)
            sizes = (nbytes / count, ring_edge_bytes(count, nbytes)) if count else (nbytes, nbytes)
            carried.setdefault((source, target), []).append((*sizes, span.seconds))
        rates: dict[Link, float] = {}
        for link, found in carried.items():
            least = max(size for size, _, _ in found) / 2
            large = [(nbytes, seconds) for size, nbytes, seconds in found if size >= least]
            if (seconds := sum(s for _, s in large)) > 0:
                rates[link] = sum(n for n, _ in large) / seconds
        count = max((len(found) for found in compute.values()), default=1)
        return cls(timeline.step_time_s, {key: median(found) for key, found in compute.items()}, rates, count)


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
        awaited, seconds = sum(s for _, s in pairs), sum(s for s, _ in pairs)
        # What is compared is one micro-batch; at stake are all of the step.
        counted = max(awaited, seconds) * expected.micro_batches
        if awaited >= LEAST_COMPUTE_S and counted >= LEAST_SHARE * expected.step_s:
            devices[seen.device] = seconds / awaited
    links: dict[Link, float] = {}
    for link, (nbytes, seconds) in _carried(observed, latency_s).items():
        if link in expected.rates:
            awaited = nbytes / expected.rates[link]
            if max(awaited, seconds) >= max(LEAST_LINK_S, LEAST_SHARE * expected.step_s):
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


def newest(entries: Sequence[tuple[float, T]], steps: int, seconds: float) -> list[T]:
    """Of (seconds, entry) the newest that span so many steps and seconds; empty if all are too few."""
    spanned, out = 0.0, list[T]()
    for length_s, entry in reversed(entries):
        out.append(entry)
        spanned += length_s
        if len(out) >= steps and spanned >= seconds:
            return out[::-1]
    return []


class Tracker:
    """Ratios of the last steps of one kind: smoothed while calm, their median once they have moved."""

    def __init__(self, band: float) -> None:
        self._band = band
        self._last: deque[tuple[float, float]] = deque(maxlen=KEPT)  # seconds and log ratio
        self._smooth: float | None = None

    def add(self, ratio: float, seconds: float) -> None:
        """Takes the newest step in, which took so long."""
        value = math.log(max(ratio, 1e-6))
        self._last.append((seconds, value))
        if self._smooth is None:
            self._smooth = value
        else:
            self._smooth += CALM_WEIGHT * (value - self._smooth)

    @property
    def big(self) -> bool:
        """Whether the newest steps are far out, all to the same side."""
        return self._beyond(BIG, self._short)

    @property
    def moved(self) -> bool:
        """Whether the newest steps are out of the band, all to the same side."""
        return self.big or self._beyond(self._band, self._long)

    @property
    def ratio(self) -> float:
        """The best estimate now."""
        if self._smooth is None:
            return 1.0
        if not self.moved:
            return math.exp(self._smooth)
        return math.exp(median(self._short if self.big else self._long))

    @property
    def _short(self) -> list[float]:
        return newest(self._last, BIG_WINDOW, BIG_WINDOW_S)

    @property
    def _long(self) -> list[float]:
        return newest(self._last, WINDOW, WINDOW_S)

    def _beyond(self, band: float, last: Sequence[float]) -> bool:
        above = sum(value > math.log(band) for value in last)
        below = sum(value < -math.log(band) for value in last)
        return bool(last) and max(above, below) >= AGREE * len(last)


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
        self._recent: deque[tuple[float, Sequence[DeviceStep]]] = deque(maxlen=KEPT)
        self._step = Tracker(STEP_BAND)
        self._devices: dict[str, Tracker] = {}
        self._links: dict[Link, Tracker] = {}
        self._shown: set[Link] = set()  # by messages of the run, not by probes

    def add(self, step_s: float, observed: Sequence[DeviceStep]) -> Ratios:
        """Takes a step in."""
        found = ratios(self.expected, step_s, observed, self._latency_s)
        self._recent.append((step_s, observed))
        self._step.add(found.step, step_s)
        for device, ratio in found.devices.items():
            self._devices.setdefault(device, Tracker(DEVICE_BAND)).add(ratio, step_s)
        self._shown.update(found.links)
        for link, ratio in found.links.items():
            self._links.setdefault(link, Tracker(LINK_BAND)).add(ratio, step_s)
        return found

    def probed(self, link: Link, samples: Sequence[tuple[int, float]]) -> None:
        """Takes in a probe of a link that carried nothing: (bytes, round-trip seconds).

        It counts as two steps, as it was alone on the link and has no compute in it.
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
        for _ in range(2):
            tracker.add(max(least[large] - least[small], _SHORTEST_S) / awaited_s, BIG_WINDOW_S)

    def rate(self, link: Link) -> float:
        """Bytes per second of a link as believed."""
        return self._routes.route(*link).bandwidth_bytes_per_s

    @property
    def shown_pipes(self) -> frozenset[str]:
        """What messages of the run have shown something of; see ``pipe``."""
        return frozenset(self.pipe(link) for link in self._shown)

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
        span = (BIG_WINDOW, BIG_WINDOW_S) if drift is not None and drift.big else (WINDOW, WINDOW_S)
        recent = [(step_s, (step_s, observed)) for step_s, observed in self._recent]
        estimator = Estimator(profile, self._cluster, expected)
        for step_s, observed in newest(recent, *span) or self._recent:
            estimator.add(step_s, observed)
        return estimator

    def fitted(self) -> Profile:
        """The profile with devices and links as they showed themselves.

        A pair that was not seen has the rate of the fastest one that shares its pipe between sites: so much
        the pipe carries. Other pairs stay as they were.
        """
        devices = tuple(self._device(entry) for entry in self.profile.devices)
        shown = {link: self.rate(link) / tracker.ratio for link, tracker in self._links.items()}
        pipes: dict[str, float] = {}
        for link, rate in shown.items():
            pipes[self.pipe(link)] = max(pipes.get(self.pipe(link), 0.0), rate)
        links = {(entry.source, entry.target): entry for entry in self.profile.links}
        for a, b in self._latency_s:
            rate = shown.get((a, b))
            if rate is None and self.pipe((a, b)) in pipes:
                rate = min(pipes[self.pipe((a, b))], self._beside_pipe((a, b)))
            if rate is not None:
                links[a, b] = LinkTimes(
                    source=a, target=b, latency_s=self._latency_s[a, b], bandwidth_bytes_per_s=rate
                )
        return self.profile.model_copy(update={"devices": devices, "links": tuple(links.values())})

    def _device(self, entry: DeviceTimes) -> DeviceTimes:
        tracker = self._devices.get(entry.device)
        if tracker is None:
            return entry
        return entry.model_copy(update={"factor": entry.factor * tracker.ratio})

    def pipe(self, link: Link) -> str:
        """What a link shares with the others between two sites; inside a site it is the link's own."""
        found = self._cluster.route(*link).resources
        own = f"pair:{link[0]}>{link[1]}"
        return next((name for name, _ in found if name.startswith("link:")), own)

    def _beside_pipe(self, link: Link) -> float:
        """The least capacity on the way that is not the pipe: ports of the two devices."""
        found = self._cluster.route(*link).resources
        return min((rate for name, rate in found if not name.startswith("link:")), default=math.inf)
