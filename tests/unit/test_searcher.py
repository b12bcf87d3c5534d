"""A process that searches says the same as a search here, and a run gets over its death."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from test_planner_adapter import BOTH_WAYS, planned
from test_planner_estimate import CLUSTER, problem

from adapter_cases import thinner
from spanwise.api.searcher import Found, Searcher
from spanwise.planner import Problem
from spanwise.planner.adapting.adaptation import Search, found_in

WAIT_S = 60.0


def wanted() -> Search:
    task = problem()
    slow = Problem(task.graph, thinner(task.profile, CLUSTER, BOTH_WAYS, 4.0), CLUSTER, task.job)
    return Search(slow, planned(), "hpp", "thin")


def answers(searcher: Searcher) -> list[Found]:
    out: list[Found] = []
    end_s = time.monotonic() + WAIT_S
    while searcher.busy:
        found = searcher.found()
        if found is not None:
            out.append(found)
        elif time.monotonic() > end_s:
            pytest.fail(f"no answer within {WAIT_S:.0f} s")
        else:
            time.sleep(0.005)
    return out


@pytest.fixture
def searcher() -> Iterator[Searcher]:
    it = Searcher(problem())
    yield it
    it.close()
    assert it._process is None
    assert not it._thread.is_alive()


def test_the_same_candidates_as_here_group_by_group(searcher: Searcher) -> None:
    for _ in range(2):  # the second search finds the process there
        searcher.begin(wanted())
        groups = answers(searcher)
        assert [found for found, last in groups if not last] == list(found_in(wanted()))
        assert groups[-1] == ([], True)


def test_a_search_for_which_there_is_no_plan_ends_empty(searcher: Searcher) -> None:
    task = wanted()
    searcher.begin(Search(task.problem, task.plan, "no_such_strategy", ""))
    assert answers(searcher)[-1] == ([], True)


def killed(searcher: Searcher, before: object = None) -> object:
    """The process that was killed as soon as it was there."""
    end_s = time.monotonic() + WAIT_S
    while (process := searcher._process) in (None, before) and time.monotonic() < end_s:
        time.sleep(0.001)
    assert process is not None
    process.kill()
    return process


def test_the_search_of_a_process_that_dies_is_done_again_once(searcher: Searcher) -> None:
    searcher.begin(wanted())
    first = killed(searcher)
    assert answers(searcher)[-2][0]
    assert searcher._process is not first
    searcher.begin(wanted())
    second = killed(searcher, before=first)
    killed(searcher, before=second)
    assert answers(searcher) == [([], True)]
    searcher.begin(wanted())
    assert answers(searcher)[-2][0]


def test_a_second_search_takes_the_place_of_the_first(searcher: Searcher) -> None:
    for _ in range(3):
        searcher.begin(wanted())
        time.sleep(0.2)
    groups = answers(searcher)
    assert [found for found, last in groups if not last] == list(found_in(wanted()))
    assert searcher.found() is None


def test_of_a_search_that_was_given_up_nothing_comes(searcher: Searcher) -> None:
    searcher.begin(wanted())
    killed(searcher)
    searcher.give_up()
    assert not searcher.busy
    searcher.begin(wanted())
    groups = answers(searcher)
    assert [found for found, last in groups if not last] == list(found_in(wanted()))


def test_closing_gives_a_search_up() -> None:
    searcher = Searcher(problem())
    searcher.begin(wanted())
    end_s = time.monotonic() + WAIT_S
    while searcher._process is None and time.monotonic() < end_s:
        time.sleep(0.001)
    process = searcher._process
    searcher.close()
    assert process is not None
    assert process.returncode is not None
