"""What holds of every segmentation, whatever the times."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from segment_cases import simulated_duplex, simulated_pull, simulated_push
from spanwise.planner.segments.chain import Chain, Exchange, best_segments, bound_ns, makespan_ns, step_ns
from spanwise.planner.segments.duplex import duplex_bound_ns
from spanwise.planner.segments.duplex_search import duplex
from spanwise.planner.segments.rules import SEGMENT_RULES

TIMES = st.one_of(st.just(0), st.integers(0, 20), st.integers(0, 10**10))


@st.composite
def chains(draw: st.DrawFn, layers: int | None = None) -> Chain:
    count = layers or draw(st.integers(1, 12))
    times = st.lists(TIMES, min_size=count, max_size=count).map(tuple)
    return Chain(draw(times), draw(times), draw(TIMES))


@st.composite
def exchanges(draw: st.DrawFn, layers: int | None = None) -> Exchange:
    count = layers or draw(st.integers(1, 8))
    sizes = st.lists(st.integers(0, 2**26), min_size=count, max_size=count).map(tuple)
    return Exchange(draw(chains(count)), draw(chains(count)), draw(sizes))


@settings(max_examples=200)
@given(chains())
def test_the_plan_is_what_happens_and_lies_between_bounds(task: Chain) -> None:
    found = best_segments(task)
    assert bound_ns(task) <= found.makespan_ns <= makespan_ns(task, (task.layers,))
    assert simulated_pull(task, found.ends) == simulated_push(task, found.ends) == found.makespan_ns
    # Two lanes of one job each cannot save more than half of what they take one after the other.
    assert 2 * found.makespan_ns >= makespan_ns(task, (task.layers,))


@settings(max_examples=100)
@given(chains(), st.integers(1, 1000))
def test_all_times_so_much_longer_make_the_plan_so_much_longer(task: Chain, factor: int) -> None:
    longer = Chain(
        tuple(factor * m for m in task.message_ns), tuple(factor * c for c in task.compute_ns),
        factor * task.overhead_ns,
    )  # fmt: skip
    assert best_segments(longer).makespan_ns == factor * best_segments(task).makespan_ns


@settings(max_examples=100)
@given(chains(), st.data())
def test_no_time_that_grows_makes_the_plan_shorter(task: Chain, data: st.DataObject) -> None:
    more, layer = data.draw(st.integers(1, 10**9)), data.draw(st.integers(0, task.layers - 1))

    def grown(times: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(t + more * (i == layer) for i, t in enumerate(times))

    best = best_segments(task).makespan_ns
    for other in (
        replace(task, message_ns=grown(task.message_ns)),
        replace(task, compute_ns=grown(task.compute_ns)),
        replace(task, overhead_ns=task.overhead_ns + more),
    ):
        assert best <= best_segments(other).makespan_ns <= best + more * task.layers


@settings(max_examples=100)
@given(exchanges())
def test_no_rule_is_faster_and_duplex_is_never_slower(task: Exchange) -> None:
    best = step_ns(task, SEGMENT_RULES["dynacomm"](task))
    assert all(step_ns(task, rule(task)) >= best for rule in SEGMENT_RULES.values())
    plan = duplex([task])
    assert duplex_bound_ns([task]) <= plan.step_ns <= best
    assert simulated_duplex([task], plan.workers, 2)[1][0] == 2 * plan.step_ns


@settings(max_examples=30)
@given(st.integers(1, 5).flatmap(lambda n: st.lists(exchanges(n), min_size=2, max_size=3)))
def test_workers_of_any_times_never_wait_longer_than_planned(workers: list[Exchange]) -> None:
    """From a common begin on, no step of any worker ends later than so many planned steps and one more."""
    plan = duplex(workers)
    ends = simulated_duplex(workers, plan.workers, 8)
    alone = max(ends[0])
    for step, now in enumerate(ends, start=1):
        assert max(now) <= (step - 1) * plan.step_ns + len(workers) * alone
