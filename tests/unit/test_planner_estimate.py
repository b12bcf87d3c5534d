"""What a run shows of its devices and links, on simulated runs whose truth is known."""

from __future__ import annotations

import pytest

from adapter_cases import shown, slower, thinner, timeline_of
from plan_cases import plan, stage
from planner_cases import make_graph, make_job, make_profile
from spanwise.core.cluster import Cluster
from spanwise.core.errors import PeerError
from spanwise.core.observed import MOST_LARGE, MOST_SMALL, Arrival, Departure, DeviceStep, noted
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.planner import Problem
from spanwise.planner.adapting.estimate import PROBE_LASTS, Estimator
from spanwise.planner.adapting.ratios import Expected
from spanwise.planner.adapting.tracker import Tracker, Usual

CLUSTER = Cluster.parse(
    {
        "devices": [
            {"id": "n1", "site": "north"}, {"id": "n2", "site": "north", "speed": 0.5},
            {"id": "s1", "site": "south"}, {"id": "s2", "site": "south", "speed": 0.5},
        ],
        "links": [
            {"between": ["north", "north"], "bandwidth": "1 Gbit/s", "latency": "0.2 ms"},
            {"between": ["south", "south"], "bandwidth": "1 Gbit/s", "latency": "0.2 ms"},
            {"between": ["north", "south"], "bandwidth": "100 Mbit/s", "latency": "5 ms"},
        ],
        "data": ["n1"],
    }
)  # fmt: skip
PIPE = [(a, b) for a in ("n1", "n2") for b in ("s1", "s2")]


def problem() -> Problem:
    graph = make_graph(8, 1, activation=60_000)
    return Problem(graph, make_profile(graph, CLUSTER, flops_per_s=5e9), CLUSTER, make_job(16))


def two_sites(task: Problem) -> Plan:
    return plan(task.graph, stage(0, 3, "n1:4 n2:4", 3), stage(3, 8, "s1:4 s2:4", 1), sources="n1:8")


def follow(task: Problem, worlds: list[Profile], noise: float = 0.0) -> Estimator:
    running = two_sites(task)
    expected = Expected.of(timeline_of(task, running, task.profile))
    estimator = Estimator(task.profile, task.cluster, expected)
    for number, world in enumerate(worlds):
        estimator.add(*shown(task, running, world, noise=noise, seed=number))
    return estimator


def rate(profile: Profile, source: str, target: str) -> float:
    found = {(x.source, x.target): x.bandwidth_bytes_per_s for x in profile.links}
    return found[source, target]


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_link_at_a_quarter_is_recovered_within_5_percent(noise: float) -> None:
    task = problem()
    thin = thinner(task.profile, CLUSTER, PIPE, 4.0)
    estimator = follow(task, [*[task.profile] * 4, *[thin] * 3], noise)
    drift = estimator.drift()
    assert drift is not None
    assert drift.big
    fitted = estimator.fitted()
    assert "n1>s1 has 0.2" in estimator.changes(fitted)
    assert rate(fitted, "n1", "s1") == pytest.approx(100e6 / 8 / 4, rel=0.3)
    # Messages meet on the slow pipe more often than on the fast one: a simulation on the estimate shows that.
    for _ in range(2):
        expected = Expected.of(timeline_of(task, two_sites(task), fitted))
        fitted = estimator.again(fitted, expected).fitted()
    assert rate(fitted, "n1", "s1") == pytest.approx(100e6 / 8 / 4, rel=0.05)
    assert rate(fitted, "s1", "n1") == pytest.approx(100e6 / 8, rel=0.1)


def test_a_device_at_40_percent_is_recovered_within_5_percent() -> None:
    task = problem()
    estimator = follow(task, [slower(task.profile, "s1", 2.5)] * 3, 0.03)
    fitted = {d.device: d.factor for d in estimator.fitted().devices}
    assert fitted["s1"] == pytest.approx(2.5, rel=0.05)
    assert fitted["n1"] == pytest.approx(1.0, rel=0.05)
    assert fitted["s2"] == pytest.approx(2.0, rel=0.05)


def test_pairs_that_carry_nothing_follow_their_pipe() -> None:
    """Only n1 > s1 is used by this plan; n2 > s2 shares the pipe and must be as slow."""
    task = problem()
    alone = plan(task.graph, stage(0, 3, "n1:8", 3), stage(3, 8, "s1:8", 1), sources="n1:8")
    expected = Expected.of(timeline_of(task, alone, task.profile))
    estimator = Estimator(task.profile, CLUSTER, expected)
    for _ in range(3):
        estimator.add(*shown(task, alone, thinner(task.profile, CLUSTER, PIPE, 4.0)))
    fitted = estimator.fitted()
    assert rate(fitted, "n2", "s2") == pytest.approx(100e6 / 8 / 4, rel=0.05)
    assert ("n1", "n2") not in {(x.source, x.target) for x in fitted.links}


@pytest.mark.parametrize("link", [("s1", "s2"), ("n1", "s1")], ids=["inside-a-site", "between-sites"])
def test_a_link_is_a_cause_by_a_probe_only_and_for_as_long_as_that_is_news(link: tuple[str, str]) -> None:
    task = problem()
    estimator = follow(task, [task.profile] * 4)
    rate = CLUSTER.route(*link).bandwidth_bytes_per_s
    odd = thinner(task.profile, CLUSTER, [link], 8.0)
    assert estimator.causes(odd) == []
    for factor, count in ((1.0, 0), (8.0, 1)):
        estimator.probed(link, [(n, 0.01 + factor * n / rate) for n in (1_000, 100_000)])
        assert len(estimator.causes(odd)) == count
    for _ in range(PROBE_LASTS + 1):
        estimator.add(*shown(task, two_sites(task), task.profile))
    assert estimator.causes(odd) == []


@pytest.mark.parametrize(("slower_by", "moved"), [(1.0, False), (8.0, True)])
def test_a_link_inside_a_site_may_be_back_but_is_no_faster_than_at_first(
    slower_by: float, moved: bool
) -> None:
    """A small message that waited for a processor takes as long as a large one: not a link without time."""
    task = problem()
    believed = thinner(task.profile, CLUSTER, [("s1", "s2")], slower_by)
    expected = Expected.of(timeline_of(task, two_sites(task), believed))
    estimator = Estimator(believed, CLUSTER, expected, first=task.profile)
    estimator.probed(("s1", "s2"), [(1_000, 0.02), (100_000, 0.02)])
    assert (estimator.drift() is not None) == moved


def test_links_that_are_surely_faster_take_none_along_that_look_otherwise() -> None:
    task = problem()
    fast = thinner(thinner(task.profile, CLUSTER, [("n1", "s1")], 0.6), CLUSTER, [("s1", "n1")], 0.4)
    odd = thinner(fast, CLUSTER, [("n2", "s2")], 5.0)
    estimator = follow(task, [*[task.profile] * 4, *[odd] * 30])
    fitted = estimator.fitted()
    found = {(x.source, x.target) for cause in estimator.causes(fitted) for x in cause.links}
    assert {("n1", "s1"), ("s1", "n1")} <= found
    assert ("n2", "s2") not in found


@pytest.mark.parametrize("late", [("n1", "s1"), ("n1", "s1", "n2", "s2")])
def test_one_pair_that_is_late_both_ways_is_not_the_pipe_that_others_share(late: tuple[str, ...]) -> None:
    task = problem()
    thin = thinner(task.profile, CLUSTER, [*PIPE, *((b, a) for a, b in PIPE)], 12.0)
    estimator = follow(task, [task.profile] * 4)
    _, calm = shown(task, two_sites(task), task.profile)
    step_s, slow = shown(task, two_sites(task), thin)
    pairs = zip(calm, slow, strict=True)
    estimator.add(step_s, tuple(b if b.device in late else a for a, b in pairs))
    drift = estimator.drift()
    assert (drift is not None and drift.leap) == (len(late) == 4)


def test_noise_and_one_odd_step_are_no_drift() -> None:
    task = problem()
    calm = [task.profile] * 12
    assert follow(task, calm, 0.06).drift() is None
    odd = slower(task.profile, "s1", 3.0)
    assert follow(task, [*calm[:4], odd, *calm[:4]]).drift() is None


def test_what_a_plan_shows_from_the_start_is_no_drift_and_what_comes_later_counts_in_full() -> None:
    """The simulation is off by 1.3 for one device; then that device takes 2.5 times as long."""
    task = problem()
    off = slower(task.profile, "s1", 1.3)
    assert follow(task, [off] * 12, 0.03).drift() is None
    estimator = follow(task, [off] * 6 + [slower(task.profile, "s1", 1.3 * 2.5)] * 3, 0.03)
    assert estimator.usual["s1"] == pytest.approx(1.3, rel=0.05)
    drift = estimator.drift()
    assert drift is not None
    assert drift.big
    assert {d.device: d.factor for d in estimator.fitted().devices}["s1"] == pytest.approx(2.5, rel=0.05)
    # What is far off from the start has moved before: it is not what the plan was made for.
    assert Usual(1.5).over(2.5, 2.0) == []
    assert Usual(1.5, 1.3).over(2.6, 1.0) == [(2.0, 1.0)]
    far = Usual(1.5)
    assert [far.over(2.5, 1.0) for _ in range(3)][-1] == [(2.5, 1.0)] * 3


def moved(*found: float, seconds: float = 1.0) -> tuple[bool, bool]:
    tracker = Tracker(1.15)
    for value in found:
        tracker.add(value, seconds)
    return tracker.moved, tracker.big


def test_small_moves_take_five_steps_and_big_ones_two() -> None:
    assert moved(1.0, 1.0, 1.3, 1.3, 1.3) == (False, False)
    assert moved(1.0, 1.3, 1.3, 1.3, 1.3) == (True, False)  # four of five are enough
    assert moved(1.3, 1.3, 1.3, 1.3, 1.3) == (True, False)
    assert moved(1.0, 1.6, 1.6) == (True, True)
    assert moved(1.3, 0.8, 1.3, 0.8, 1.3) == (False, False)
    assert moved(0.8, 0.8, 0.8, 0.8, 0.8) == (True, False)
    assert moved(1.1, 1.1, 1.1, 1.1, 1.1, 1.1) == (False, False)


def test_short_steps_must_agree_for_some_seconds_or_half_of_one() -> None:
    """Ten steps of 50 ms may all lie within one hiccup."""
    assert moved(*[1.0] * 20, *[1.6] * 7, seconds=0.05) == (False, False)
    assert moved(*[1.0] * 20, *[1.6] * 10, seconds=0.05) == (True, True)
    assert moved(*[1.0] * 20, *[1.3] * 30, seconds=0.05) == (False, False)
    assert moved(*[1.0] * 20, *[1.3] * 40, seconds=0.05) == (True, False)
    assert moved(*[1.3, 1.3, 1.3, 1.3, 1.0] * 13, seconds=0.05) == (True, False)  # four of five are enough


def test_the_time_of_a_link_is_known_only_where_somebody_waited() -> None:
    task = problem()
    running = two_sites(task)
    expected = Expected(1.0, {}, {("n1", "s1"): 1e6})
    nbytes = 100_000

    def ratio(*messages: tuple[float, float, bool]) -> float | None:
        sent = tuple(Departure("s1", i, nbytes, at) for i, (at, _, _) in enumerate(messages))
        came = tuple(Arrival("n1", i, at, waited) for i, (_, at, waited) in enumerate(messages))
        estimator = Estimator(task.profile, CLUSTER, expected)
        steps = (DeviceStep("n1", sent=sent), DeviceStep("s1", received=came))
        return estimator.add(1.0, steps).links.get(("n1", "s1"))

    latency = 0.005
    assert running.batch == 16
    assert ratio((0.0, 0.2 + latency, True)) == pytest.approx(2.0)
    # The second had to wait for the first on the link: 0.1 s each, not 0.2 s.
    assert ratio((0.0, 0.1 + latency, True), (0.0, 0.2 + latency, True)) == pytest.approx(1.0)
    # Nobody waited for the first, so that when the link was free is not known.
    assert ratio((0.0, 0.5, False), (0.0, 0.6, True)) is None
    assert ratio((0.0, 0.5, False)) is None


def test_what_is_hardly_at_work_decides_nothing() -> None:
    """A link that is busy for a hundredth of the step may look slow by the wake-up of a thread alone."""
    task = problem()
    sent = (Departure("s1", 0, 100_000, 0.0),)
    found: dict[float, bool] = {}
    for step_s in (0.5, 5.0):
        estimator = Estimator(task.profile, CLUSTER, Expected(step_s, {}, {("n1", "s1"): 1e7}))
        came = (Arrival("n1", 0, 0.04 + 0.005, True),)
        ratios = estimator.add(step_s, (DeviceStep("n1", sent=sent), DeviceStep("s1", received=came)))
        found[step_s] = ("n1", "s1") in ratios.links
    assert found == {0.5: True, 5.0: False}


def test_both_ends_choose_the_same_messages() -> None:
    sizes = [(tag, 1000 if tag % 2 else 10) for tag in range(200)]
    chosen = noted(sizes)
    assert noted(reversed(sizes)) == chosen
    assert len([tag for tag in chosen if tag % 2]) == MOST_LARGE
    assert len(chosen) == MOST_LARGE + MOST_SMALL


def test_small_messages_of_all_sizes_are_noted() -> None:
    """Many of 100 bytes come first; one of every other size is chosen all the same. Few are chosen all."""
    sizes = [*((tag, 100) for tag in range(50)), (50, 4000), (51, 40_000), (52, 1_000_000)]
    assert {50, 51, 52} <= noted(sizes)
    assert len(noted(sizes)) == 1 + MOST_SMALL
    assert noted(sizes[40:]) == set(range(40, 53))
    assert noted([]) == frozenset()


def test_small_messages_tell_no_rate() -> None:
    """They take far longer by the byte; a link is no slower for it."""
    task = problem()
    estimator = Estimator(task.profile, CLUSTER, Expected(1.0, {}, {("n1", "s1"): 1e6}))
    sent = (Departure("s1", 0, 5000, 0.0), Departure("s1", 1, 100_000, 0.5))
    came = (Arrival("n1", 0, 0.105, True), Arrival("n1", 1, 0.605, True))
    seen = (DeviceStep("n1", sent=sent), DeviceStep("s1", received=came))
    assert estimator.add(1.0, seen).links["n1", "s1"] == pytest.approx(1.0)


def test_what_travels_is_checked() -> None:
    step = DeviceStep("a", sent=(Departure("b", 1, 10, 5.0),), received=(Arrival("b", 2, 7.0, True),))
    assert DeviceStep.parse("a", step.to_data(), 1.0).sent[0].at_s == 4.0
    bad = [
        {"compute": [], "sent": []},
        {"compute": [["forward", 0, float("nan")]], "sent": [], "received": []},
        {"compute": [["forward", 0, 1.0]] * 5000, "sent": [], "received": []},
        {"compute": 3, "sent": [], "received": []},
        None,
    ]
    for data in bad:
        with pytest.raises(PeerError, match="device 'a': sent times of a step that cannot be read"):
            DeviceStep.parse("a", data)


@pytest.mark.parametrize("had_slowed", [True, False])
def test_a_device_that_is_as_fast_as_at_first_again_needs_no_step_time(*, had_slowed: bool) -> None:
    """One that seems faster than ever does."""
    task = problem()
    running = two_sites(task)
    believed = slower(task.profile, "n2", 3.0) if had_slowed else task.profile
    world = task.profile if had_slowed else slower(task.profile, "n2", 1 / 3)
    expected = Expected.of(timeline_of(task, running, believed))
    estimator = Estimator(believed, task.cluster, expected, first=task.profile)
    for step in range(20):
        seen = shown(task, running, believed if step < 4 else world, seed=step)[1]
        estimator.add(expected.step_s, seen)
    assert (estimator.drift() is not None) == had_slowed


def test_a_link_is_faster_once_both_its_ways_are_or_one_has_been_for_long() -> None:
    """It may come back between the probes of its two ways; that one alone does is rare."""
    task, link, back = problem(), ("n1", "s1"), ("s1", "n1")
    slow = thinner(task.profile, CLUSTER, [*PIPE, *((b, a) for a, b in PIPE)], 4.0)
    expected = Expected.of(timeline_of(task, two_sites(task), slow))
    estimator = Estimator(slow, task.cluster, expected, first=task.profile)
    full = CLUSTER.route(*link).bandwidth_bytes_per_s

    def probe(way: tuple[str, str], factor: float) -> None:
        estimator.probed(way, [(n, 0.01 + factor * n / full) for n in (1_000, 60_000)])

    probe(back, 4.0)
    probe(link, 1.0)
    assert estimator.drift() is None
    probe(back, 1.0)
    assert estimator.drift() is not None
    found = estimator.under(estimator.causes(estimator.fitted()))
    assert [rate(found, *way) for way in (link, back)] == pytest.approx([full, full], rel=0.05)

    estimator = Estimator(slow, task.cluster, expected, first=task.profile)
    for _ in range(6):
        probe(back, 4.0)
        probe(link, 1.0)
    assert estimator.drift() is not None
