"""Segments of a run under way, cut anew from what its own pushes and pulls took.

A plan is made with overheads and rates from a profile. Here they are fitted to the run's messages, those of
each device in each direction apart (``message_fit.py``), and where a fit moves the plan's rule cuts again, by
the formulas of ``segments/chain.py``: less than a millisecond for 152 layers, so it can be done at every
step. The rate of a link that several share is what one of them got of it with all at work. Times of compute
are those of the profile.

Pulls as they are aggregated have no rule that is exact. Their cuts are changed one at a time, a few hundred
times, for one worker that is in everything as slow as the slowest: 20 to 50 ms for 152 layers, where the
search behind a plan takes up to seconds.

Messages of one size tell an overhead and a rate only together. Where that is all that a run has, it sends a
few small ones besides now and then.

Latency is no part of an overhead here: it passes while the next message is on the link. What a sender waits
for its receiver is, as it keeps the link idle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from spanwise.core.errors import InfeasibleError
from spanwise.core.observed import DeviceStep
from spanwise.core.plan import Plan
from spanwise.planner.adapting.explore import SMALL_PROBE_BYTES, Look
from spanwise.planner.adapting.message_fit import LinkMessages, MessageFit
from spanwise.planner.adapting.ratios import SHORTEST_S, Link, Message, link_messages
from spanwise.planner.problem import Problem
from spanwise.planner.segments.chain import NS_PER_S, Chain, Cuts, Exchange
from spanwise.planner.segments.duplex_search import duplex_from
from spanwise.planner.segments.rules import SEGMENT_RULES, dynacomm
from spanwise.planner.strategies.parameter_server import (
    SERVER_STRATEGIES,
    Choice,
    Star,
    after_pushes,
    aggregated,
    choice_ns,
    exchanges,
    plan_of,
)

MOVED = 0.2  # a message takes so much longer or shorter than when segments were last cut
LOOK_EVERY_S = 5.0  # where sizes do not tell the overhead; all links in turn
SMALL_ONES = 6  # messages of a look


@dataclass(frozen=True, slots=True)
class Recut:
    """Other segments: the plan with them, what a step gains by formula, and which links moved."""

    plan: Plan
    gain_s: float
    reason: str


class Resegmenter:
    """Follows the messages of one run whose plan has a parameter server."""

    @classmethod
    def of(cls, problem: Problem, plan: Plan) -> Resegmenter | None:
        """For plans of ``parameter_server.py``: one server of all layers, the same devices everywhere."""
        if plan.strategy not in SERVER_STRATEGIES or len(plan.syncs) != 1 or len(plan.servers) != 1:
            return None
        (sync,), first = plan.servers, plan.stages[0].replicas
        whole = (sync.start, sync.stop) == (0, len(problem.graph))
        if not whole or any(stage.replicas != first for stage in plan.stages):
            return None
        return cls(problem, plan)

    def __init__(self, problem: Problem, plan: Plan) -> None:
        """Begins with the numbers that the plan was made by."""
        (sync,) = plan.servers
        self._problem, self._plan = problem, plan
        self._star = Star(sync.server, plan.stages[0].replicas)
        self._present = Choice(Cuts(sync.pulls, sync.pushes), sync.order, sync.as_aggregated)
        self._believed = exchanges(problem, self._star, by_latency=False)
        self._layer_bytes = np.array(self._believed[0].layer_bytes, dtype=np.float64)
        self._ends: list[tuple[Link, Link]] = [((sync.server, d), (d, sync.server)) for d in sync.clients]
        pairs = [link for ends in self._ends for link in ends]
        chains = [chain for own in self._believed for chain in (own.pull, own.push)]
        # By which the present segments were cut.
        self._cut_by = {
            link: _believed_fit(chain, float(self._layer_bytes.sum()))
            for link, chain in zip(pairs, chains, strict=True)
        }
        self._links = {link: LinkMessages(fit.overhead_s) for link, fit in self._cut_by.items()}
        self._latency_s = {
            (a, b): problem.cluster.route(a, b).latency_s for a, b in pairs
        }  # as the estimator counts it
        self._before: Sequence[DeviceStep] = ()
        self._looked_s: dict[Link, float] = {}

    @property
    def fits(self) -> dict[Link, MessageFit]:
        """What messages of each link take, where enough of them have been seen."""
        return {link: seen.fit for link, seen in self._links.items() if seen.fit is not None}

    def under(self, plan: Plan) -> Resegmenter | None:
        """Goes on under another plan; of the same server and devices with all that was seen."""
        new = Resegmenter.of(self._problem, plan)
        if new is not None and new._star == self._star:
            new._links, new._looked_s = self._links, self._looked_s
            new._cut_by |= self.fits
        return new

    def add(self, step_s: float, observed: Sequence[DeviceStep]) -> None:
        """Takes in what devices tell of a step, which took so long."""
        for link, messages in link_messages(over_border(self._before, observed), self._latency_s).items():
            if link in self._links:
                self._links[link].add(messages, step_s)
        self._before = observed

    def look(self, now_s: float) -> tuple[Look, ...]:
        """A link to probe now by small messages; ``looked`` takes the results."""
        for link, fit in self.fits.items():
            if not fit.trusted and now_s - self._looked_s.get(link, -LOOK_EVERY_S) >= LOOK_EVERY_S:
                self._looked_s[link] = now_s
                return (Look(link, (SMALL_PROBE_BYTES,) * SMALL_ONES),)
        return ()

    def looked(self, link: Link, samples: Sequence[tuple[int, float]]) -> None:
        """(bytes, round-trip seconds) of a probe: half of what is no latency is a small message's time."""
        if link not in self._links:
            return
        latency_s = self._latency_s[link] + self._latency_s[link[1], link[0]]
        small = [
            Message(nbytes, max(SHORTEST_S, (seconds - latency_s) / 2))
            for nbytes, seconds in samples
            if nbytes <= SMALL_PROBE_BYTES
        ]
        self._links[link].add_sizes(small)

    def cut_anew(self) -> Recut | None:
        """Other segments if a fit has moved and they end a step earlier by formula."""
        fits, moved = self.fits, self._moved()
        if not moved:
            return None
        self._cut_by |= fits
        workers = tuple(
            dict.fromkeys(
                Exchange(
                    self._fitted(own.pull, fits.get(down)),
                    self._fitted(own.push, fits.get(up)),
                    own.layer_bytes,
                )
                for own, (down, up) in zip(self._believed, self._ends, strict=True)
            )
        )
        found = dict.fromkeys((self._present, *self._choices(workers)))
        ends_ns = {choice: choice_ns(workers, choice) for choice in found}
        best = min(ends_ns, key=lambda choice: (ends_ns[choice], choice.messages))
        gain_s = (ends_ns[self._present] - ends_ns[best]) / NS_PER_S
        if gain_s <= 0:
            return None
        try:
            plan = plan_of(self._problem, self._plan.strategy, self._star, best)
        except InfeasibleError:
            return None
        return Recut(plan, gain_s, "; ".join(moved))

    def _choices(self, workers: Sequence[Exchange]) -> Iterator[Choice]:
        """What the plan's rule makes of the numbers of each worker."""
        rule = SEGMENT_RULES.get(self._plan.strategy, dynacomm)
        yield from (after_pushes(rule(worker)) for worker in workers)
        if self._plan.strategy not in SEGMENT_RULES and self._problem.job.clip_norm is None:
            yield aggregated(duplex_from(slowest(workers), self._present.cuts))

    def _fitted(self, chain: Chain, fit: MessageFit | None) -> Chain:
        """The chain with a fitted overhead and rate; as it was where nothing is known."""
        if fit is None:
            return chain
        messages: NDArray[np.int64] = np.rint(self._layer_bytes / fit.bytes_per_s * NS_PER_S).astype(np.int64)
        return Chain(tuple(messages.tolist()), chain.compute_ns, round(fit.overhead_s * NS_PER_S))

    def _moved(self) -> list[str]:
        """Links on which all layers, or one of middling size, take another time than when they were cut."""
        large = float(self._layer_bytes.sum())
        small = large / len(self._layer_bytes)
        out: list[str] = []
        for link, fit in self.fits.items():
            old = self._cut_by[link]
            changes = [fit.seconds(n) / max(old.seconds(n), 1e-9) for n in (small, large)]
            if any(change > 1 + MOVED or change < 1 / (1 + MOVED) for change in changes):
                text = f"{fit.overhead_s * 1e3:.2f} ms and {fit.bytes_per_s / 1e6:.3g} MB/s a message"
                out.append(f"{link[0]}>{link[1]} shows {text}")
        return out


def slowest(workers: Sequence[Exchange]) -> Exchange:
    """A worker that is in everything as slow as the slowest of these.

    Under the same segments no step of them all is longer than its own.
    """
    if len(workers) == 1:
        return workers[0]

    def merged(chains: Sequence[Chain]) -> Chain:
        return Chain(
            tuple(map(max, *(chain.message_ns for chain in chains))),
            tuple(map(max, *(chain.compute_ns for chain in chains))),
            max(chain.overhead_ns for chain in chains),
        )

    pull, push = merged([worker.pull for worker in workers]), merged([worker.push for worker in workers])
    return Exchange(pull, push, workers[0].layer_bytes)


def over_border(before: Sequence[DeviceStep], now: Sequence[DeviceStep]) -> list[DeviceStep]:
    """A step's messages by where they come: what a server sent in the step before came in this one."""
    came = {(a.peer, seen.device, a.tag) for seen in now for a in seen.received}
    late: Mapping[str, DeviceStep] = {seen.device: seen for seen in before}

    def arriving(seen: DeviceStep) -> DeviceStep:
        earlier = late[seen.device].sent if seen.device in late else ()
        sent = tuple(d for d in (*earlier, *seen.sent) if (seen.device, d.peer, d.tag) in came)
        return replace(seen, sent=sent)

    return [arriving(seen) for seen in now]


def _believed_fit(chain: Chain, nbytes: float) -> MessageFit:
    """What messages of a chain of so many bytes take."""
    rate = nbytes * NS_PER_S / max(chain.sent_ns[-1], 1)
    return MessageFit(chain.overhead_ns / NS_PER_S, rate, trusted=False)
