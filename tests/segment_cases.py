"""Random chains of layers, slow ways to cut them that are right for sure, and what happens event by event."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, permutations, product

from spanwise.planner.segments.chain import Chain, Cuts, Ends, Exchange
from spanwise.planner.segments.duplex import DuplexCuts

INFINITE = 10**18


def _even(r: random.Random, layers: int) -> tuple[list[int], list[int]]:
    return [r.randint(0, 1000) for _ in range(layers)], [r.randint(0, 1000) for _ in range(layers)]


def _ties(r: random.Random, layers: int) -> tuple[list[int], list[int]]:
    """Few values, many of them zero."""
    values = (0, 0, 300, 600, 900)
    return r.choices(values, k=layers), r.choices(values, k=layers)


def _skewed(r: random.Random, layers: int) -> tuple[list[int], list[int]]:
    """A few layers have almost everything."""
    found = [[round(300 * r.lognormvariate(0, 1.5)) for _ in range(layers)] for _ in range(2)]
    return found[0], found[1]


def _convolutional(r: random.Random, layers: int) -> tuple[list[int], list[int]]:
    """Parameters grow and compute shrinks towards the end."""
    depth = [(i + 1) / layers for i in range(layers)]
    messages = [round(1200 * x * x * r.uniform(0.5, 1.5)) for x in depth]
    return messages, [round(900 * (1.1 - x) * r.uniform(0.5, 1.5)) for x in depth]


FAMILIES: dict[str, Callable[[random.Random, int], tuple[list[int], list[int]]]] = {
    "even": _even, "ties": _ties, "skewed": _skewed, "convolutional": _convolutional,
}  # fmt: skip


def chain(r: random.Random, layers: int, family: str) -> Chain:
    """Times around 500; overhead from none to one and a half times that."""
    messages, compute = FAMILIES[family](r, layers)
    return Chain(tuple(messages), tuple(compute), r.choice((0, r.randint(0, 50), r.randint(0, 750))))


def chains(count: int, most_layers: int) -> Iterator[Chain]:
    """So many over all families and numbers of layers, always the same."""
    for number in range(count):
        r = random.Random(number)
        yield chain(r, 1 + number // len(FAMILIES) % most_layers, list(FAMILIES)[number % len(FAMILIES)])


def exchange(r: random.Random, layers: int, family: str, *, symmetric: bool = False) -> Exchange:
    """Both directions; symmetric: gradients travel as parameters do, and backward takes twice as long."""
    pull = chain(r, layers, family)
    if symmetric:
        push = Chain(pull.message_ns, tuple(2 * c for c in pull.compute_ns), pull.overhead_ns)
    else:
        push = chain(r, layers, family)
    return Exchange(pull, push, tuple(r.randrange(8 * 2**20) for _ in range(layers)))


def cut_sets(layers: int) -> Iterator[Ends]:
    """All 2^(L-1)."""
    for count in range(layers):
        for inner in combinations(range(1, layers), count):
            yield (*inner, layers)


# ------------------------------------------------------------------------------------------------ oracles


def brute_force(chain: Chain) -> int:
    """Least end of all segmentations, each played through message by message."""
    return min(_played(chain, ends) for ends in cut_sets(chain.layers))


def _played(chain: Chain, ends: Ends) -> int:
    arrived = done = start = 0
    for stop in ends:
        arrived += chain.overhead_ns + sum(chain.message_ns[start:stop])
        done = max(done, arrived) + sum(chain.compute_ns[start:stop])
        start = stop
    return done


def dynamic_programme(chain: Chain) -> int:
    """O(L^3): least end of the first layers with so many segments, as in DynaComm."""
    sent, worked = _sums(chain.message_ns), _sums(chain.compute_ns)
    layers, overhead = chain.layers, chain.overhead_ns
    before = [0] + [INFINITE] * layers
    best = INFINITE
    for count in range(1, layers + 1):
        now = [INFINITE] * (layers + 1)
        for stop in range(count, layers + 1):
            arrived = count * overhead + sent[stop]
            now[stop] = worked[stop] + min(
                (before[k] if before[k] > arrived else arrived) - worked[k] for k in range(count - 1, stop)
            )
        best = min(best, now[layers])
        before = now
    return best


def one_index_programme(chain: Chain) -> int:
    """The wrong one: the least end of each prefix, with the number of segments that it happens to have."""
    sent, worked = _sums(chain.message_ns), _sums(chain.compute_ns)
    least = [(0, 0)]
    for stop in range(1, chain.layers + 1):
        least.append(
            min(
                (max(end, (n + 1) * chain.overhead_ns + sent[stop]) + worked[stop] - worked[k], n + 1)
                for k, (end, n) in enumerate(least)
            )
        )
    return least[-1][0]


def _sums(values: Sequence[int]) -> list[int]:
    out = [0]
    for value in values:
        out.append(out[-1] + value)
    return out


def exhaustive_duplex(exchange: Exchange, *, all_orders: bool = False) -> int:
    """Least round of one worker over all cuts of both directions and all useful, or really all, orders."""
    layers = exchange.pull.layers
    aggregated = {_aggregated(exchange.push, ends) for ends in cut_sets(layers)}
    best = INFINITE
    for ends in cut_sets(layers):
        messages = [
            exchange.pull.overhead_ns + sum(exchange.pull.message_ns[a:b])
            for a, b in zip((0, *ends), ends, strict=False)
        ]
        tails = [sum(exchange.pull.compute_ns[a:]) for a in (0, *ends[:-1])]
        for order in permutations(range(len(ends))) if all_orders else _two_sided(len(ends)):
            for done in aggregated:
                free = end = 0
                for number in order:
                    free = max(free, done[ends[number - 1] if number else 0]) + messages[number]
                    end = max(end, free + tails[number])
                best = min(best, end)
    return best


def _two_sided(count: int) -> Iterator[tuple[int, ...]]:
    """Segments before the first one from the last down, those after it from the first up."""
    for sides in product((False, True), repeat=count - 1):
        before = [n for n in range(count - 1, 0, -1) if sides[n - 1]]
        yield (*before, 0, *(n for n in range(1, count) if not sides[n - 1]))


def _aggregated(push: Chain, ends: Ends) -> tuple[int, ...]:
    free, out = 0, [0] * push.layers
    for start, stop in reversed(list(zip((0, *ends), ends, strict=False))):
        free = max(free, sum(push.compute_ns[start:])) + push.overhead_ns + sum(push.message_ns[start:stop])
        out[start:stop] = [free] * (stop - start)
    return tuple(out)


# ------------------------------------------------------------------------------------- what really happens


class World:
    """An event loop: things that do one job at a time, and what happens when a job ends."""

    def __init__(self) -> None:
        self.now = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0

    def after(self, delay: int, then: Callable[[], None]) -> None:
        """Calls something later."""
        self._number += 1
        heapq.heappush(self._events, (self.now + delay, self._number, then))

    def run(self) -> int:
        """Until nothing is left; when the last thing happened."""
        while self._events:
            self.now, _, then = heapq.heappop(self._events)
            then()
        return self.now


class Server:
    """Takes jobs (duration, may it begin, what then) in the order of ``jobs``, one at a time."""

    def __init__(self, world: World, jobs: list[tuple[int, Callable[[], bool], Callable[[], None]]]) -> None:
        self.world, self.jobs, self.busy = world, jobs, False

    def wake(self) -> None:
        """Begins the next job if nothing is in its way."""
        if not self.busy and self.jobs and self.jobs[0][1]():
            duration, _, then = self.jobs.pop(0)
            self.busy = True
            self.world.after(duration, lambda: self._end(then))

    def _end(self, then: Callable[[], None]) -> None:
        self.busy = False
        then()
        self.wake()


def simulated_pull(chain: Chain, ends: Ends) -> int:
    """End of forward: the link sends segments, the processor runs layer by layer."""
    world, there = World(), set[int]()
    processor = Server(world, [])
    processor.jobs = [
        (seconds, lambda layer=layer: layer in there, lambda: None)
        for layer, seconds in enumerate(chain.compute_ns)
    ]

    def arrive(layers: range) -> None:
        there.update(layers)
        processor.wake()

    link = Server(world, [])
    for start, stop in zip((0, *ends), ends, strict=False):
        nanoseconds = chain.overhead_ns + sum(chain.message_ns[start:stop])
        link.jobs.append((nanoseconds, lambda: True, lambda a=start, b=stop: arrive(range(a, b))))
    link.wake()
    end = world.run()
    assert not link.jobs
    assert not processor.jobs
    return end


def simulated_push(chain: Chain, ends: Ends) -> int:
    """End of the last push: the processor goes back layer by layer, the link sends what is complete."""
    world, ready = World(), set[int]()
    link = Server(world, [])
    for start, stop in reversed(list(zip((0, *ends), ends, strict=False))):
        nanoseconds = chain.overhead_ns + sum(chain.message_ns[start:stop])
        whole = set(range(start, stop))
        link.jobs.append((nanoseconds, lambda whole=whole: whole <= ready, lambda: None))

    def computed(layer: int) -> None:
        ready.add(layer)
        link.wake()

    processor = Server(world, [])
    for layer in reversed(range(chain.layers)):
        processor.jobs.append((chain.compute_ns[layer], lambda: True, lambda layer=layer: computed(layer)))
    processor.wake()
    end = world.run()
    assert not link.jobs
    return end


def simulated_duplex(workers: Sequence[Exchange], plans: Sequence[DuplexCuts], steps: int) -> list[list[int]]:
    """``[step][worker]``: when forward of every step ends, over steps that follow each other."""
    world, servers = World(), list[Server]()
    layers = workers[0].pull.layers
    # How often each worker has computed the gradient of a layer, pushed it, and pulled the layer.
    ready, pushed, pulled = ([[0] * layers for _ in workers] for _ in range(3))
    ends = [[0] * len(workers) for _ in range(steps)]

    def count(table: list[int], first: int, last: int) -> None:
        for layer in range(first, last):
            table[layer] += 1
        for server in servers:
            server.wake()

    def reached(tables: list[list[int]], first: int, last: int, step: int) -> bool:
        return all(min(table[first:last]) > step for table in tables)

    def forward_ended(worker: int, step: int, layer: int) -> None:
        if layer == layers - 1:
            ends[step][worker] = world.now

    def prepared(worker: int, own: Exchange, plan: DuplexCuts) -> list[Server]:
        processor, uplink, downlink = (Server(world, []) for _ in range(3))
        out = list(zip((0, *plan.cuts.push), plan.cuts.push, strict=False))
        into = list(zip((0, *plan.cuts.pull), plan.cuts.pull, strict=False))
        for step in range(steps):
            for i in reversed(range(layers)):
                then = partial(count, ready[worker], i, i + 1)
                processor.jobs.append((own.push.compute_ns[i], partial(bool, 1), then))
            for i in range(layers):
                there = partial(reached, [pulled[worker]], i, i + 1, step)
                then = partial(forward_ended, worker, step, i)
                processor.jobs.append((own.pull.compute_ns[i], there, then))
            for a, b in reversed(out):
                whole = partial(reached, [ready[worker]], a, b, step)
                nanoseconds = own.push.overhead_ns + sum(own.push.message_ns[a:b])
                uplink.jobs.append((nanoseconds, whole, partial(count, pushed[worker], a, b)))
            for a, b in (into[number] for number in plan.order):
                aggregated = partial(reached, pushed, a, b, step)
                nanoseconds = own.pull.overhead_ns + sum(own.pull.message_ns[a:b])
                downlink.jobs.append((nanoseconds, aggregated, partial(count, pulled[worker], a, b)))
        return [processor, uplink, downlink]

    for worker, (own, plan) in enumerate(zip(workers, plans, strict=True)):
        servers += prepared(worker, own, plan)
    count([], 0, 0)
    world.run()
    assert not any(server.jobs for server in servers)
    return ends


def held(cuts: Cuts) -> DuplexCuts:
    """All pulls after all pushes."""
    return DuplexCuts(cuts, tuple(range(len(cuts.pull))))
