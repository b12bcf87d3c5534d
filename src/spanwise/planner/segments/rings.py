"""Where sums of gradients by a ring are cut: by the segmentation of ``chain.py``, as pushes are.

A sum that is cut begins while weight gradients of earlier layers are still computed: the last micro-batch
goes back in halves, and its weight half in parts. So a ring is the pushing half of an exchange: a segment is
ready when all members have its weight gradients, rings follow each other, and one takes an overhead
(latencies of its rounds, what its messages take of the processors) and its bytes over the rate of the slowest
edge. That is an overhead and a time a byte, for which the exact method holds. MG-WFBP (Shi, Chu and Li,
INFOCOM 2019) merges all-reduces by a rule for the same purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from spanwise.core.cluster import Route
from spanwise.core.order import joined
from spanwise.core.plan import Plan
from spanwise.core.syncs import Sync
from spanwise.cost.halves import weight_s
from spanwise.cost.training import ring_edge_bytes, ring_rounds
from spanwise.lowering import ring_parameters
from spanwise.planner.problem import Problem
from spanwise.planner.segments.chain import NS_PER_S, Chain, Ends, best_segments, makespan_ns


def cut_by_layers(problem: Problem, plan: Plan) -> Plan:
    """The plan with every ring cut where its sum is over first; the plan itself where one piece is best.

    What other messages take of the links, and that backwards of other stages may lie in between, is left to
    the simulator.
    """
    syncs = tuple(
        sync.model_copy(update={"segments": 1, "ends": ends_of(problem, plan, sync)})
        if isinstance(sync, Sync)
        else sync
        for sync in plan.syncs
    )
    return plan.model_copy(update={"syncs": syncs})


def ends_of(problem: Problem, plan: Plan, sync: Sync) -> Ends | None:
    """Of every segment the layer after its last; none where the sum is best in one piece."""
    chain = chain_of(problem, plan, sync)
    if chain is None:
        return None
    found, first = best_segments(chain).ends, sync.layers[0][0]
    return tuple(first + end for end in found) if len(found) > 1 else None


def hidden_s(problem: Problem, plan: Plan) -> float:
    """Seconds by which the sum that gains most ends earlier if it is cut, by the same formula."""
    most = 0
    for sync in plan.syncs:
        chain = chain_of(problem, plan, sync) if isinstance(sync, Sync) else None
        if chain is not None:
            most = max(most, makespan_ns(chain, (chain.layers,)) - best_segments(chain).makespan_ns)
    return most / NS_PER_S


def chain_of(problem: Problem, plan: Plan, sync: Sync) -> Chain | None:
    """The layers of a sync, from its first to its last, as the pushing half of an exchange.

    Those in between that it does not sum have no bytes. None where a link is missing.
    """
    edge = _edge(problem, sync.devices)
    if edge is None:
        return None
    start, stop = sync.layers[0][0], sync.layers[-1][1]
    nbytes = [0] * (stop - start)
    for parameter in ring_parameters(plan, problem.graph, sync):
        nbytes[problem.graph.users[parameter.name][0] - start] += parameter.bytes
    return Chain.of(nbytes, _compute_s(problem, plan, sync), edge.overhead_s, 1 / edge.byte_s)


@dataclass(frozen=True, slots=True)
class _Edge:
    """Seconds of a ring: whatever its bytes, and a byte of the parameters."""

    overhead_s: float
    byte_s: float


def _edge(problem: Problem, members: Sequence[str]) -> _Edge | None:
    """The slowest edge of a ring with all edges at work; of a capacity that several use each has a part."""
    pairs = pairwise((*members, members[0]))
    routes: list[Route] = []
    for a, b in pairs:
        route = problem.links.route(problem.index[a], problem.index[b])
        if route is None:
            return None
        routes.append(route)
    users = Counter(name for route in routes for name, _ in route.resources)
    slowest = min(route.bandwidth_bytes_per_s for route in routes)
    rate = min([slowest, *(r / users[name] for route in routes for name, r in route.resources)])
    rounds, share = ring_rounds(len(members)), ring_edge_bytes(len(members), 1.0)
    each_s = byte_s = 0.0
    for member in members:
        table, factor = problem.profile.table(member)
        each_s = max(each_s, 2 * rounds * table.message_s * factor)
        byte_s = max(byte_s, factor * (2 * share * table.message_s_per_byte + table.sum_s_per_byte))
    latency_s = rounds * max(route.latency_s for route in routes)
    return _Edge(latency_s + each_s, share / rate + byte_s)


def _compute_s(problem: Problem, plan: Plan, sync: Sync) -> list[float]:
    """``[layer]``: seconds from the weight gradients behind it to its own, on all members.

    Each member goes back through its stages of the sync from the last to the first: the input half of a
    stage, then the weight half layer by layer, with those of other micro-batches done at once with it.
    """
    start, stop = sync.layers[0][0], sync.layers[-1][1]
    done = [0.0] * (stop - start + 1)
    for member in sync.devices:
        now = 0.0
        for stage in reversed(plan.stages):
            rows = next((r.rows for r in stage.replicas if r.device == member), 0)
            if not rows or not stage.meets(start, stop):
                continue
            now += problem.profile.halves_s(member, stage.start, stage.stop, rows)[0]
            count = next((n for op, n in reversed([*joined(stage.ops)]) if op.kind == "backward_weight"), 1)
            done[stop - start] = max(done[stop - start], now if stage.stop >= stop else 0.0)
            for layer in range(stage.stop - 1, stage.start - 1, -1):
                now += weight_s(
                    problem.profile, problem.graph, member, layer, layer + 1, rows=rows, count=count
                )
                if start <= layer < stop:
                    done[layer - start] = max(done[layer - start], now)
    return [max(0.0, before - after) for before, after in pairwise(done)]
