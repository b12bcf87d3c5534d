from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner_cases import fastest_of_all, make_graph, make_job, make_problem, make_profile
from spanwise.core.cluster import Cluster, Link
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan, Stage
from spanwise.planner import Problem, make_plan
from spanwise.planner.facts.kinds import by_kind, mix_of
from spanwise.planner.facts.rows import min_max_rows, rows_of_kinds
from spanwise.planner.outline import Outline, Span
from spanwise.planner.plans.build import build
from spanwise.planner.plans.pace import pace_s
from spanwise.planner.plans.price import price
from spanwise.planner.plans.trial import timeline
from spanwise.planner.search import outlines
from spanwise.planner.search.extensions import END, all_subsets, along, subset_pairs
from spanwise.planner.search.groups import INFEASIBLE_S, Groups
from spanwise.planner.search.orders import _few_counts
from spanwise.planner.search.outlines import refined_outlines
from spanwise.planner.search.sequences import Sequences, chains
from spanwise.planner.search.sets import Search


def twins(devices: int, *, memory: str = "1 GiB", layers: int = 6, sites: str = "ab") -> Problem:
    """Two kinds in every site, dealt in turn, and a data device of its own kind."""
    entries = [
        {
            "id": f"d{i}",
            "site": sites[i % len(sites)],
            "speed": (0.1, 0.4)[i // len(sites) % 2],
            "memory": memory,
        }
        for i in range(devices)
    ]
    links = [
        {"between": [x, y], "bandwidth": "200 Mbit/s" if x == y else "40 Mbit/s", "latency": "2 ms"}
        for i, x in enumerate(sites)
        for y in sites[i:]
    ]
    cluster = Cluster.parse({"devices": entries, "links": links, "data": ["d0"]})
    graph = make_graph(layers)
    return Problem(graph, make_profile(graph, cluster), cluster, make_job(16))


def test_kinds_are_equal_in_everything_that_counts() -> None:
    problem = twins(9)
    assert by_kind(problem.kinds, range(9)) == [(0,), (1, 5), (2, 6), (3, 7), (4, 8)]
    own = Link(source="d1", target="d5", bandwidth_bytes_per_s=1e5)
    named = problem.cluster.model_copy(update={"links": (*problem.cluster.links, own)})
    apart = Problem(problem.graph, problem.profile, named, problem.job)
    assert apart.kinds[1] != apart.kinds[5]
    assert apart.kinds[3] == apart.kinds[7]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_equal_devices_change_places_for_nothing(data: st.DataObject) -> None:
    """Any permutation of equal devices leaves the simulated step time as it was."""
    problem = twins(9)
    devices = data.draw(st.permutations(range(9)))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    edges = [0, *sorted(data.draw(st.permutations(range(1, 6)))[: len(sizes) - 1]), 6]
    groups = [tuple(sorted(devices[sum(sizes[:i]) : sum(sizes[: i + 1])])) for i in range(len(sizes))]
    spans = tuple(Span(a, b, g) for a, b, g in zip(edges, edges[1:], groups, strict=False))
    plan = build(problem, "any", Outline(4, spans))
    swaps = {
        a: b for own in by_kind(problem.kinds, range(9)) for a, b in zip(own, reversed(own), strict=True)
    }
    names = {f"d{a}": f"d{b}" for a, b in swaps.items()}

    def renamed(stage: Stage) -> Stage:
        return stage.model_copy(
            update={
                "replicas": tuple(r.model_copy(update={"device": names[r.device]}) for r in stage.replicas)
            }
        )

    syncs = tuple(s.model_copy(update={"devices": tuple(names[d] for d in s.devices)}) for s in plan.syncs)
    other = plan.model_copy(update={"stages": tuple(map(renamed, plan.stages)), "syncs": syncs})
    assert timeline(problem, other).step_time_s == pytest.approx(
        timeline(problem, plan).step_time_s, rel=1e-9
    )


def test_counting_kinds_loses_nothing() -> None:
    """Sets told apart by kinds only: fewer, and the same best price for every number of micro-batches."""
    problem = twins(7)
    devices, apart = tuple(range(7)), tuple(range(7))
    groups = Groups(problem, tuple(range(7)), problem.micro_batch_choices())
    few = list(all_subsets(devices, problem.kinds))
    every = list(all_subsets(devices, apart))
    assert len(every) == 3**7 - 2**7  # a device is in the group, behind it or left out
    assert len(few) < len(every) / 2
    assert subset_pairs(devices, apart) == 3**7
    one, other = Search(groups, few).found(), Search(groups, every).found()
    for m in range(len(groups.micro_batches)):
        best = min(f.price_s for f in other if f.micro_batches == m)
        assert min(f.price_s for f in one if f.micro_batches == m) == pytest.approx(best, rel=1e-9)


def test_long_orders_are_thinned_and_all_that_they_use_comes_first() -> None:
    for order, kinds in ((tuple(range(12)), (0,) * 5 + (1,) * 7), (tuple(range(90)), (0,) * 40 + (1,) * 50)):
        known = {END}
        for extension in along(order, kinds, 64):
            assert extension.rest in known
            known.add(extension.key)
        assert len(order) in known
    assert len(list(along(tuple(range(900)), (0,) * 450 + (1,) * 450, 64))) < 900


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_rows_of_kinds_are_those_of_their_devices(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    total = data.draw(st.integers(1, 40))
    steps = st.lists(st.floats(0.01, 1.0), min_size=total, max_size=total)
    seconds = np.stack([np.cumsum(data.draw(steps)) for _ in counts])[None]
    least = np.array([data.draw(st.sampled_from((1, 2)))])
    most, fewest, feasible = rows_of_kinds(seconds, counts, total, least)
    single, alone = min_max_rows(np.repeat(seconds, counts, axis=1), total, least)
    assert feasible[0] == alone[0]
    assert (fewest <= most).all()
    if least[0] == 1:
        of = np.repeat(np.arange(len(counts)), counts)

        def longest(rows: np.ndarray, kinds: np.ndarray) -> float:
            return max(
                (float(seconds[0, k, y - 1]) for k, y in zip(kinds, rows, strict=True) if y), default=0.0
            )

        assert longest(most[0], np.arange(len(counts))) == longest(single[0], of)


def test_prices_of_sequences_are_those_of_a_search() -> None:
    problem = twins(6)
    groups = Groups(problem, tuple(range(7)), problem.micro_batch_choices())
    sequences = Sequences(groups)
    chosen = [((0,), (1, 5)), ((2,), (1, 5)), ((3, 4), (0,), (1,))]
    for sequence in chosen:
        alone = Search(groups, chains(problem, [sequence]))
        assert sequences.price_s(sequence) == pytest.approx(alone.best_s(len(sequence)), rel=1e-12)
    better = sequences.improve(chosen[2], 200, singles=False)
    assert sequences.price_s(better) <= sequences.price_s(chosen[2])
    assert sequences.best(1)[0] == min(sequences.priced.values(), key=lambda entry: entry[0])[1]


@pytest.mark.parametrize("seed", range(3))
def test_the_search_for_many_devices_comes_near_the_exact_one(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = refined_outlines(make_problem(5, 8, seed), singles=False)[0].price_s
    monkeypatch.setattr(outlines, "EXACT_WORK", 0.0)
    found = refined_outlines(make_problem(5, 8, seed), singles=False)[0].price_s
    assert exact * (1 - 1e-9) <= found <= 1.05 * exact


@pytest.mark.parametrize("seed", range(12))
def test_there_is_a_plan_whenever_exhaustive_search_has_one(seed: int) -> None:
    """Memory so short that few plans fit."""
    problem = make_problem(3, 4, seed, batch=4)
    whole = sum(3 * x.parameter_bytes + x.saved_bytes + x.cut_bytes for x in problem.graph.layers)
    shares = ((0.3, 0.5, 0.4), (0.2, 0.6, 0.3), (0.5, 0.5, 0.2))[seed % 3]
    devices = tuple(
        d.model_copy(update={"memory_bytes": int(whole * share * (0.7 + 0.1 * (seed // 3)))})
        for d, share in zip(problem.cluster.devices, shares, strict=True)
    )
    tight = Problem(
        problem.graph, problem.profile, problem.cluster.model_copy(update={"devices": devices}), problem.job
    )
    try:
        best, _ = fastest_of_all(tight)
    except AssertionError:
        with pytest.raises(InfeasibleError):
            make_plan(tight, "hpp")
        return
    assert timeline(tight, make_plan(tight, "hpp")).step_time_s <= 1.05 * best


@pytest.mark.parametrize(
    ("devices", "seed", "best_s"),
    [(4, 1, 1.449975), (4, 2, 1.93973), (4, 3, 0.692588), (5, 2, 1.561312), (5, 4, 0.50296)],
)
def test_plans_of_small_clusters_stay_the_best_known(devices: int, seed: int, best_s: float) -> None:
    """``best_s`` is what exhaustive search found (``benchmarks/planner/oracle.py``); 8 layers, batch 16."""
    problem = make_problem(devices, 8, seed)
    assert timeline(problem, make_plan(problem, "hpp")).step_time_s <= 1.01 * best_s


def test_pace_is_nearer_to_the_simulation_than_the_price() -> None:
    """Pipelines of single devices on a LAN, warm-up P-p, where the price is far off."""
    off_pace: list[float] = []
    off_price: list[float] = []
    for seed in range(4):
        problem = make_problem(4, 8, 3 * seed)
        for m in (4, 8):
            spans = tuple(Span(2 * i, 2 * i + 2, (d,)) for i, d in enumerate((0, 2, 1, 3)))
            plan = build(problem, "any", Outline(m, spans), depth="shallow")
            seconds = timeline(problem, plan).step_time_s
            off_pace.append(abs(pace_s(problem, plan) / seconds - 1))
            off_price.append(abs(price(problem, plan).step_time_s / seconds - 1))
    assert np.mean(off_pace) < 0.02
    assert np.mean(off_price) > 2 * np.mean(off_pace)


def test_hundreds_of_devices_by_links_between_sites() -> None:
    """Found in a moment, and no slower than the plan of a few of them."""
    problem = twins(240, sites="abcd")
    plan = make_plan(problem, "hpp")
    assert isinstance(plan, Plan)
    few = make_plan(twins(8, sites="abcd"), "hpp")
    seconds = timeline(twins(8, sites="abcd"), few).step_time_s
    assert timeline(problem, plan).step_time_s <= 1.02 * seconds
    assert len(problem.links) == 240
    assert mix_of(problem.kinds, tuple(range(240)))[0] == (0, 1)  # the data device is like no other


def test_large_groups_share_rows_in_lots_and_stay_feasible() -> None:
    problem = twins(9, layers=24)
    groups = Groups(problem, tuple(range(25)), (1, 2))
    times = groups.times((1, 5, 3))
    assert float(times.both[0, 0, 24]) < INFEASIBLE_S
    assert float(times.whole[1, 0, 24]) == pytest.approx(2 * float(times.both[1, 0, 24]))


def test_orders_of_many_devices_are_compared_with_few_micro_batches_too() -> None:
    """Without two of them, 16 devices in large groups came to a slower plan than 12 of the same."""
    counts = _few_counts(twins(20))
    assert 2 in counts
    assert counts[-1] == max(twins(20).micro_batch_choices())
