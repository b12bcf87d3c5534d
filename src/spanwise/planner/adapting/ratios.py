"""What a step shows of devices and links: measured over expected seconds.

Expected is the simulated Timeline of the plan that runs, on the numbers believed so far. Both sides count the
same: compute from its start to its end, a message for as long as its link has it (latency comes after). So
what slows messages of one link in the simulation too, such as others on the same pipe, is not taken for a
slower link.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import NamedTuple

from spanwise.core.observed import Arrival, Departure, DeviceStep, least_large
from spanwise.core.program import Action
from spanwise.core.timeline import Timeline
from spanwise.cost.training import ring_edge_bytes

Link = tuple[str, str]

LEAST_SHARE = 0.05  # of the step time: a device or link that is at work for less decides nothing
LEAST_COMPUTE_S = 1e-4  # below it a step says nothing about a device
EVEN = 1.6  # kinds of compute of a device, from the least ratio to the largest
LEAST_LINK_S = 2e-3  # the same for a link: wake-ups of threads take up to a millisecond
LEAST_MESSAGE_BYTES = 4096
SHORTEST_S = 1e-5


@dataclass(frozen=True)
class Expected:
    """What a simulation says that devices will show.

    ``compute_s`` by device, kind of compute and stage; ``rates`` are bytes per second of each link while it
    carries a message, shared as it is with others. Seconds are the mean over ``micro_batches``.
    """

    step_s: float
    compute_s: Mapping[tuple[str, str, int], float]
    rates: Mapping[Link, float]
    micro_batches: int = 1

    @classmethod
    def of(cls, timeline: Timeline) -> Expected:
        """From a simulated Timeline with spans: its last step, as the first begins with empty links.

        Of messages only large ones count, see ``core.observed.least_large``.
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
            least = least_large(size for size, _, _ in found)
            large = [(nbytes, seconds) for size, nbytes, seconds in found if size >= least]
            if (seconds := sum(s for _, s in large)) > 0:
                rates[link] = sum(n for n, _ in large) / seconds
        count = max((len(found) for found in compute.values()), default=1)
        return cls(timeline.step_time_s, {key: fmean(found) for key, found in compute.items()}, rates, count)


@dataclass(frozen=True)
class Ratios:
    """Measured over expected seconds, by what was seen in a step: 2.0 is twice as slow as believed.

    ``even``: devices that did all kinds of their compute as much slower or faster.
    """

    step: float
    devices: Mapping[str, float] = field(default_factory=dict[str, float])
    links: Mapping[Link, float] = field(default_factory=dict[Link, float])
    even: frozenset[str] = frozenset()


def ratios(
    expected: Expected, step_s: float, observed: Sequence[DeviceStep], latency_s: Mapping[Link, float]
) -> Ratios:
    """How one step compares with what was expected of it. Of messages only large ones count."""
    devices: dict[str, float] = {}
    even: set[str] = set()
    for seen in observed:
        pairs = [
            (entry.seconds, expected.compute_s[seen.device, entry.kind, entry.stage])
            for entry in seen.compute
            if (seen.device, entry.kind, entry.stage) in expected.compute_s
        ]
        awaited, seconds = sum(s for _, s in pairs), sum(s for s, _ in pairs)
        # What is compared is one micro-batch; at stake are all of the step. A device that is hardly at work
        # is calm in that step: else only steps in which something held it up would say anything of it.
        counted = max(awaited, seconds) * expected.micro_batches >= LEAST_SHARE * expected.step_s
        if awaited >= LEAST_COMPUTE_S:
            devices[seen.device] = seconds / awaited if counted else 1.0
            single = [s / a for s, a in pairs if a >= LEAST_COMPUTE_S]
            if len(single) > 1 and max(single) < EVEN * max(min(single), 1e-6):
                even.add(seen.device)
    links: dict[Link, float] = {}
    for link, messages in link_messages([_large_only(seen) for seen in observed], latency_s).items():
        if link in expected.rates:
            seconds = sum(message.seconds for message in messages)
            awaited = sum(message.nbytes for message in messages) / expected.rates[link]
            if max(awaited, seconds) >= max(LEAST_LINK_S, LEAST_SHARE * expected.step_s):
                links[link] = max(seconds, SHORTEST_S) / awaited
    step = step_s / expected.step_s if expected.step_s else 1.0
    return Ratios(step, devices, links, frozenset(even))


def _large_only(seen: DeviceStep) -> DeviceStep:
    """Without the small messages that it sent."""
    least = {d.peer: least_large(x.nbytes for x in seen.sent if x.peer == d.peer) for d in seen.sent}
    return replace(seen, sent=tuple(d for d in seen.sent if d.nbytes >= least[d.peer]))


class Message(NamedTuple):
    """Bytes of a message, and the seconds for which a link had it: without latency and waiting for others."""

    nbytes: int
    seconds: float


def link_messages(
    observed: Sequence[DeviceStep], latency_s: Mapping[Link, float]
) -> dict[Link, list[Message]]:
    """Messages of a step for which a link's time is known for sure; links without any are left out."""
    came = {(a.peer, seen.device, a.tag): a for seen in observed for a in seen.received}
    out: dict[Link, list[Message]] = {}
    for seen in observed:
        by_peer: dict[str, list[Departure]] = {}
        for departure in seen.sent:
            by_peer.setdefault(departure.peer, []).append(departure)
        for peer, departures in by_peer.items():
            arrivals = [came.get((seen.device, peer, d.tag)) for d in departures]
            found = _known(departures, arrivals, latency_s.get((seen.device, peer), 0.0))
            if found:
                out[seen.device, peer] = found
    return out


def _known(sent: Sequence[Departure], came: Sequence[Arrival | None], latency_s: float) -> list[Message]:
    """Those of one link.

    Messages of a link follow each other. One has the link from when it was handed over, or from when the one
    before had left it if that is later, until its arrival less the latency. Its arrival is known if somebody
    waited for it; that of the one before must be known too, or be over when this one was handed over.
    """
    pairs = sorted(((d, a) for d, a in zip(sent, came, strict=True)), key=lambda pair: pair[0].at_s)
    out: list[Message] = []
    free_s, sure = -math.inf, True  # when the link is free, and whether that is exact
    for departure, arrival in pairs:
        if arrival is None:
            free_s, sure = math.inf, False
            continue
        left_s = arrival.at_s - latency_s
        known = arrival.waited and (sure or free_s <= departure.at_s)
        if known and departure.nbytes >= LEAST_MESSAGE_BYTES:
            out.append(Message(departure.nbytes, max(0.0, left_s - max(departure.at_s, free_s))))
        free_s, sure = left_s, arrival.waited
    return out
