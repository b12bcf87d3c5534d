"""Data parallelism over a parameter server: who serves, who has which rows, in which segments all travels.

The rules are those of ``segments.rules`` and ``segments.duplex_search``. They cut by formulas where a message
has a link to itself and what it costs besides its bytes comes before it; the simulator knows how devices
share links, and that a latency is hidden by the messages behind it. So every rule may count latency as part
of a message's cost or not, and may cut for any of the devices; the simulator decides, for all rules alike.

Where a link is always busy many cuts are as good as each other, as long as compute takes what it should. It
does not: a step waits for whichever device is late, and what that has not sent by then travels while the
others wait. So every rule may also cut for devices that are late; of all its cuts whose simulated step is
about the shortest, those count that are best when devices are late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product

from spanwise.core.cluster import Route
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.core.syncs import ServerSync
from spanwise.planner.outline import Span
from spanwise.planner.plans.build import span_shares
from spanwise.planner.plans.feasible import broken_rule, closest
from spanwise.planner.plans.trial import Priced, timeline
from spanwise.planner.problem import Problem
from spanwise.planner.segments.chain import Chain, Cuts, Exchange, step_ns
from spanwise.planner.segments.duplex import DuplexCuts, duplex_step_ns
from spanwise.planner.segments.duplex_search import duplex
from spanwise.planner.segments.rules import SEGMENT_RULES

MOST_KINDS = 3  # unlike devices that segments are cut for, the slowest first
BY_LATENCY = (False, True)
ABOUT = 0.015  # so much longer than the shortest simulated step is about as short
LATE = 1.5  # times the compute of a device that is late, at least

Ways = tuple[Route, Route]  # from a server to a device, and back


@dataclass(frozen=True, slots=True)
class Star:
    """A server and the devices that compute, with their rows of the batch."""

    server: str
    replicas: tuple[Replica, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """Segments for all devices, and whether pulls go as soon as they are aggregated."""

    cuts: Cuts
    order: tuple[int, ...]
    as_aggregated: bool

    @property
    def messages(self) -> int:
        """Of each device in a step, both ways."""
        return len(self.cuts.pull) + len(self.cuts.push)


def after_pushes(cuts: Cuts) -> Choice:
    """Pulls from the first layers on, when all pushes have ended."""
    return Choice(cuts, tuple(range(len(cuts.pull))), as_aggregated=False)


def aggregated(planned: DuplexCuts) -> Choice:
    """Pulls as soon as their layers are aggregated, in the planned order."""
    return Choice(planned.cuts, planned.order, as_aggregated=True)


def over_server(problem: Problem, name: str) -> Plan:
    """The plan of one rule with the least simulated step time, or about that and best when devices are late.

    The server is the device with the fastest links to all others, and does nothing else where it can: only
    if the data is private and every device has some, it computes its own rows first. All others compute.

    Raises:
        InfeasibleError: there is one device only, a link is missing, or memory is short.
    """
    star = star_of(problem)
    late = _kinds([_late(worker) for worker in exchanges(problem, star, by_latency=False)])
    found: list[tuple[Priced, int]] = []
    reasons: list[InfeasibleError] = []
    for choice in dict.fromkeys(_choices(problem, star, name)):
        try:
            plan = plan_of(problem, name, star, choice)
            entry = Priced(plan, timeline(problem, plan).step_time_s)
        except InfeasibleError as error:
            reasons.append(error)
            continue
        found.append((entry, max(choice_ns([worker], choice) for worker in late)))
    if not found:
        raise closest(reasons)
    most = (1 + ABOUT) * min(entry.price_s * entry.handicap for entry, _ in found)
    short = [(late_ns, entry) for entry, late_ns in found if entry.price_s * entry.handicap <= most]
    return min(short, key=lambda pair: (pair[0], pair[1].price_s * pair[1].handicap))[1].plan


SERVER_STRATEGIES: dict[str, Callable[[Problem], Plan]] = {
    name: partial(over_server, name=name) for name in (*SEGMENT_RULES, "duplex")
}


def star_of(problem: Problem) -> Star:
    """The server, and the devices that compute: by speed and memory, or with the private data they have.

    Raises:
        InfeasibleError: no device is joined to one that could compute, or there are too few rows.
    """
    problem.micro_batch_choices()  # says what the batch is too small for
    ids = problem.cluster.ids
    fixed = problem.source_rows(problem.job.batch) if problem.first_is_fixed else ()
    held = {source.device for source in fixed or problem.shares}
    free = [d for d, device in enumerate(ids) if device not in held]
    reasons: list[InfeasibleError] = []
    for server in sorted(free or range(len(ids)), key=lambda d: _by_links(problem, d)):
        try:
            found = Star(ids[server], fixed or _by_speed(problem, server))
        except InfeasibleError as error:
            reasons.append(error)
            continue
        if any(replica.device != found.server for replica in found.replicas):
            return found
        reasons.append(InfeasibleError(f"{found.server} would be the server, and alone to compute"))
    raise closest(reasons)


def _by_links(problem: Problem, server: int) -> tuple[int, float, float, int]:
    """Most devices reached, then the fastest links with all of them at work, then the slowest to compute."""
    others = (d for d in range(len(problem.cluster.ids)) if d != server)
    found = [ways for other in others if (ways := _ways(problem, server, other)) is not None]
    slowest = min((rate for rates in _rates(found) for rate in rates), default=0.0)
    return -len(found), -slowest, -float(problem.tables.both[server, -1, -1]), server


def _ways(problem: Problem, server: int, other: int) -> Ways | None:
    """From the server to another device and back; None if one is missing."""
    down, up = problem.links.route(server, other), problem.links.route(other, server)
    return None if down is None or up is None else (down, up)


def _rates(found: Sequence[Ways]) -> list[tuple[float, float]]:
    """Bytes per second each way with all at work: of a capacity that they share each has an equal part."""
    users = Counter(name for ways in found for way in ways for name, _ in way.resources)

    def rate(way: Route) -> float:
        return min((rate / users[name] for name, rate in way.resources), default=way.bandwidth_bytes_per_s)

    return [(rate(down), rate(up)) for down, up in found]


def _by_speed(problem: Problem, server: int) -> tuple[Replica, ...]:
    """Rows of all other devices that are joined to the server, the slowest left out where rows are few."""
    ids, batch = problem.cluster.ids, problem.job.batch
    least = problem.least_rows(0, len(problem.graph))
    joined = [d for d in range(len(ids)) if d != server and _ways(problem, server, d) is not None]
    if not joined:
        others = "no other device is joined to it both ways" if len(ids) > 1 else "there is no other device"
        raise InfeasibleError(f"{ids[server]} would be the server, but {others}")
    joined.sort(key=lambda d: float(problem.tables.both[d, -1, -1]))
    group = tuple(sorted(joined[: batch // least]))
    shares = span_shares(problem, Span(0, len(problem.graph), group), batch, 1)
    return tuple(Replica(device=ids[d], rows=int(rows)) for d, rows in shares)


def plan_of(problem: Problem, strategy: str, star: Star, choice: Choice) -> Plan:
    """The plan: one micro-batch, in stages cut wherever a segment ends.

    Raises:
        InfeasibleError: it breaks a rule of links, privacy or batch statistics.
    """
    cuts, batch = choice.cuts, problem.job.batch
    ends = (0, *sorted({*cuts.pull, *cuts.push}))
    sync = ServerSync(
        server=star.server, devices=tuple(replica.device for replica in star.replicas),
        pushes=cuts.push, pulls=cuts.pull, order=choice.order, as_aggregated=choice.as_aggregated,
    )  # fmt: skip
    plan = Plan(
        strategy=strategy,
        graph_digest=problem.graph.digest,
        micro_batches=1,
        micro_batch_rows=batch,
        sources=problem.source_rows(batch) or star.replicas,
        stages=tuple(Stage(start=a, stop=b, replicas=star.replicas) for a, b in pairwise(ends)),
        syncs=(sync,),
    )
    broken = broken_rule(problem, plan)
    if broken:
        raise InfeasibleError(broken)
    return plan


def _choices(problem: Problem, star: Star, name: str) -> Iterator[Choice]:
    """What a rule makes of the numbers of each device, of latency in or out, of devices in time or late."""
    for by_latency, late in product(BY_LATENCY, (False, True)):
        workers = exchanges(problem, star, by_latency=by_latency)
        if late:
            workers = [_late(worker) for worker in workers]
        kinds = _kinds(workers)
        rule = SEGMENT_RULES.get(name)
        if rule is not None:
            yield from (after_pushes(rule(kind)) for kind in kinds)
            continue
        yield from (after_pushes(SEGMENT_RULES["dynacomm"](kind)) for kind in kinds)
        if problem.job.clip_norm is None:  # the norm of all gradients comes before any update
            alone = kinds if len(kinds) > 1 else ()
            found = [*duplex(workers).workers, *(duplex([kind]).workers[0] for kind in alone)]
            yield from map(aggregated, dict.fromkeys(found))


def _kinds(workers: Sequence[Exchange]) -> list[Exchange]:
    """Unlike ones, the slowest first, as many as segments are cut for."""
    return sorted(dict.fromkeys(workers), key=_alone_ns, reverse=True)[:MOST_KINDS]


def _late(exchange: Exchange) -> Exchange:
    """Of a device whose compute takes longer: as long as its messages, if they take most of the time."""
    chains = (exchange.pull, exchange.push)
    messages_ns, compute_ns = sum(sum(c.message_ns) for c in chains), sum(sum(c.compute_ns) for c in chains)
    factor = max(LATE, messages_ns / max(1, compute_ns))
    pull, push = (replace(c, compute_ns=tuple(round(factor * ns) for ns in c.compute_ns)) for c in chains)
    return replace(exchange, pull=pull, push=push)


def choice_ns(workers: Sequence[Exchange], choice: Choice) -> int:
    """Of a step of workers with the same segments, by formula."""
    if choice.as_aggregated:
        return duplex_step_ns(workers, (DuplexCuts(choice.cuts, choice.order),) * len(workers))
    return max(step_ns(worker, choice.cuts) for worker in workers)


def _alone_ns(exchange: Exchange) -> int:
    """Of a step without any overlap."""
    return step_ns(exchange, SEGMENT_RULES["sequential"](exchange))


def exchanges(problem: Problem, star: Star, *, by_latency: bool) -> list[Exchange]:
    """What every computing device but the server exchanges with it: its own compute, its share of links.

    A message costs what sending and receiving take from both processors; ``by_latency``: and the latency of
    the link.
    """
    graph, profile = problem.graph, problem.profile
    layer_bytes = _layer_bytes(problem)
    clients = [replica for replica in star.replicas if replica.device != star.server]
    found: list[Ways] = []
    for client in clients:
        ways = _ways(problem, problem.index[star.server], problem.index[client.device])
        if ways is None:
            raise InfeasibleError(f"no link both ways between {star.server} and {client.device}")
        found.append(ways)
    out: list[Exchange] = []
    for client, ways, rates in zip(clients, found, _rates(found), strict=True):
        cost_s = sum(_message_s(problem, end) for end in (client.device, star.server))
        pull, push = (
            Chain.of(
                layer_bytes,
                [seconds(client.device, i, i + 1, client.rows) for i in range(len(graph))],
                cost_s + (way.latency_s if by_latency else 0.0),
                rate,
            )
            for seconds, way, rate in zip((profile.forward_s, profile.backward_s), ways, rates, strict=True)
        )
        out.append(Exchange(pull, push, layer_bytes))
    return out


def _layer_bytes(problem: Problem) -> tuple[int, ...]:
    """Bytes that travel with each layer: those of the parameters that it is the first to use."""
    found = [0] * len(problem.graph)
    for parameter in problem.graph.parameters:
        found[problem.graph.users[parameter.name][0]] += parameter.bytes
    return tuple(found)


def _message_s(problem: Problem, device: str) -> float:
    table, factor = problem.profile.table(device)
    return table.message_s * factor
