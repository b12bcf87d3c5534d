"""Links as the planner reads them agree with the simulator."""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from planner_cases import make_graph, make_job, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.profile import LinkTimes, Profile
from spanwise.lowering import lower
from spanwise.planner import Problem, make_plan
from spanwise.planner.bounds.bound import lower_bound
from spanwise.planner.facts.links import Links
from spanwise.planner.plans.trial import timeline
from spanwise.simulator.setup import Costs


def cluster() -> Cluster:
    """Two sites of two, one pipe between them, and a port that is narrower than its links."""
    return Cluster.parse(
        {"devices": [{"id": "a", "site": "s", "up": "30 Mbit/s"}, {"id": "b", "site": "s"},
                     {"id": "c", "site": "t"}, {"id": "d", "site": "t", "down": "400 Mbit/s"}],
         "data": ["a"],
         "links": [{"between": ["s", "s"], "bandwidth": "1 Gbit/s", "latency": "1 ms"},
                   {"between": ["t", "t"], "bandwidth": "100 Mbit/s", "latency": "1 ms"},
                   {"between": ["s", "t"], "bandwidth": "50 Mbit/s", "latency": "10 ms"}]}
    )  # fmt: skip


def measured(seed: int) -> tuple[LinkTimes, ...]:
    r = random.Random(seed)
    pairs = [pair for pair in permutations("abcd", 2) if r.random() < 0.6]
    return tuple(
        LinkTimes(source=a, target=b, bandwidth_bytes_per_s=r.uniform(1e6, 1e8), latency_s=r.uniform(0, 0.01))
        for a, b in pairs
    )


@pytest.mark.parametrize("seed", range(8))
def test_routes_are_those_of_the_simulator(seed: int) -> None:
    where = cluster()
    graph = make_graph(4)
    plain = make_profile(graph, where)
    links = measured(seed)
    profile = Profile.parse({**plain.to_data(), "links": [link.to_data() for link in links]})
    problem = Problem(graph, profile, where, make_job(16))
    plan = make_plan(problem, "single")
    costs = Costs(lower(plan, graph), plan, graph, profile, where, 0, ())
    same: dict[str, int] = {}
    for (i, a), (j, b) in permutations(enumerate(where.ids), 2):
        way, route = costs.way(a, b), problem.links.route(i, j)
        assert route is not None
        assert route.latency_s == way.latency_s
        assert [rate for _, rate in route.resources] == [costs.capacities[r] for r in way.resources]
        assert route.bandwidth_bytes_per_s == min(costs.capacities[r] for r in way.resources)
        for (name, _), index in zip(route.resources, way.resources, strict=True):
            assert same.setdefault(name, index) == index
    assert len(set(same.values())) == len(same)  # what is shared here is shared there


def test_measured_links_still_share_the_pipe_between_sites() -> None:
    """Two messages over one pipe take twice as long, whoever measured its rate."""
    where = cluster()
    rate = 5e6
    pairs = (("b", "c"), ("b", "d"))
    links = tuple(LinkTimes(source=a, target=b, bandwidth_bytes_per_s=rate, latency_s=0.0) for a, b in pairs)
    found = Links.of(where, links)
    one = found.lane(((1, 1.0),), ((2, 1.0),))
    two = found.lane(((1, 1.0),), ((2, 0.5), (3, 0.5)))
    assert one is not None
    assert two is not None
    assert one.s_per_byte == pytest.approx(1 / rate)
    assert two.s_per_byte == pytest.approx(1 / rate)  # all bytes pass the pipe
    apart = found.lane(((0, 0.5), (1, 0.5)), ((2, 0.5), (3, 0.5)))
    assert apart is not None
    assert apart.s_per_byte >= 1 / rate


def test_a_link_of_reduced_precision_is_cheaper_for_cuts_only_and_the_plan_says_so() -> None:
    def problem(precision: str) -> Problem:
        cluster = Cluster.parse(
            {
                "devices": [{"id": "a", "site": "x"}, {"id": "b", "site": "y"}],
                "links": [{"between": ["x", "y"], "bandwidth": "1 Mbit/s", "precision": precision}],
                "data": ["a"],
            }
        )
        graph = make_graph(6, 3)
        return Problem(graph, make_profile(graph, cluster, flops_per_s=1e8), cluster, make_job(8))

    full, int8 = problem("full"), problem("int8")
    ends = (((0, 1.0),), ((1, 1.0),))
    lanes = [p.links.lane(*ends, cut=cut) for p in (full, int8) for cut in (False, True)]
    seconds = [lane.s_per_byte for lane in lanes if lane is not None]
    assert seconds == [8e-6, 8e-6, 8e-6, 2e-6]
    plans = [make_plan(p, "pipeline") for p in (full, int8)]
    assert [plan.exact for plan in plans] == [True, False]
    steps = [timeline(p, plan).step_time_s for p, plan in zip((full, int8), plans, strict=True)]
    assert steps[1] < 0.95 * steps[0]
    for task, step_s in zip((full, int8), steps, strict=True):
        assert lower_bound(task).step_time_s <= step_s
