"""Consecutive steps, memory, what is refused, and faults."""

from __future__ import annotations

import pytest

from simulator_cases import FAST, B, F, chain, make, run, switch, times, two
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InputError, PlanError
from spanwise.core.program import Program
from spanwise.core.timeline import Span, Timeline
from spanwise.cost import stage_bytes, state_bytes
from spanwise.lowering import lower
from spanwise.simulator import simulate
from spanwise.simulator.engine import Engine
from spanwise.simulator.setup import Costs

# Steps, memory, limits


def test_steps_follow_each_other_without_a_barrier() -> None:
    """Both update at once, so the distance of two ends is the length of the first step."""
    graph = chain(2, parameter_bytes=1000)
    cluster = two()
    plan = make(graph, [("a:1", 2), ("b:1", 1)], sources="a:1", m=2)
    profile = times(graph, cluster, update_s_per_byte=2e-3)
    one, both, three = (run(plan, graph, profile, cluster, steps=n).step_time_s for n in (1, 2, 3))
    # (M + 1)(F + B), then a's update for 2 s; b's lies beside a's last backward.
    assert one == pytest.approx(3 * (F + B) + 2)
    assert both == pytest.approx(one)
    assert three == pytest.approx(one)


def test_a_slow_update_is_hidden_behind_the_next_forward() -> None:
    graph = chain(2, parameter_bytes=1000)
    cluster = two()
    plan = make(graph, [("a:1", 1), ("b:1", 1)], sources="a:1")
    profile = times(graph, cluster, update_s_per_byte=1e-3, b=4.0)
    # First step: F 4F 4B, then a: B and 1 s, b: 4 s. Next: a's forward begins at +B+1 = 6 > b's 4 s.
    first, later = (run(plan, graph, profile, cluster, steps=n).step_time_s for n in (1, 3))
    assert first == pytest.approx(5 * (F + B) + 1)
    assert later == pytest.approx(first)
    slow = times(graph, cluster, update_s_per_byte=1e-2, b=4.0)
    # a updates for 10 s after its B, b for 40 s: a's next forward has come when b is ready, so b never waits.
    assert run(plan, graph, slow, cluster, steps=3).step_time_s == pytest.approx(4 * (F + B) + 40)


def test_memory_of_a_pipeline() -> None:
    """State, saved bytes in flight, what has come and is not used, what leaves."""
    graph = chain(2, width=250, parameter_bytes=100, saved=5000)
    cluster = two(bandwidth=10.0, back=FAST)
    plan = make(graph, [("a:1", 3), ("b:1", 1)], sources="a:1", m=3)
    timeline = run(plan, graph, times(graph, cluster), cluster, copies=2)
    state = state_bytes(100, 0, 2, synced=False)
    assert state == 400
    # The link takes 100 s an activation: a keeps 3 times 5000 saved, and 3 activations and a label wait.
    assert timeline.device("a").peak_memory_bytes == state + 3 * 5000 + 3 * 1000
    # b's peak: at work on its first micro-batch, with the other two labels there.
    assert timeline.device("b").peak_memory_bytes == state + 5000 + 2 * 8
    assert timeline.memory[0].bytes == state


def test_a_source_ends_its_step_when_its_rows_have_arrived() -> None:
    """Else it would run ahead by whole steps, and its memory grow with the number of steps."""
    graph, cluster = chain(1), two(bandwidth=10.0, latency=0.5)
    plan = make(graph, [("b:1", 3)], sources="a:1", m=3)
    profile = times(graph, cluster)
    one, four = (run(plan, graph, profile, cluster, steps=n) for n in (1, 4))
    assert one.device("a").peak_memory_bytes == four.device("a").peak_memory_bytes == 3 * (40 + 8)
    moved = [s for s in four.spans if s.lane == "a>b"]
    assert len(moved) == 4 * 6
    # 144 bytes of a step pass in 14.4 s and arrive 0.5 s later: only then the next step's begin. They are a
    # step ahead and no more: those of the third wait until b, whose first rows come after 4.5 s and whose
    # labels follow, is done with the first.
    first = moved[12].start_s
    assert [s.start_s for s in moved[::6]] == pytest.approx([0.0, 14.9, first, first + 3 * (F + B)])
    ends = [s.end_s for s in four.spans if s.lane == "b" and s.kind == "backward" and s.step == 0]
    assert first == pytest.approx(max(ends))
    assert four.step_time_s == pytest.approx(3 * (F + B))


def test_a_step_is_as_long_however_many_are_simulated() -> None:
    """Rows of the next step are on the link while gradients are summed, in every step but the last.

    960 B of rows pass b's port at 40 B/s, 16 s of that beside compute; the other 320 B share the port with
    2000 B of gradients, which take 8 s longer. Control: a last step, with none behind it, does not.
    """
    graph = chain(2, parameter_bytes=1000)
    names = ("a", "b", "c")
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    cluster = Cluster.parse(
        {
            "devices": [{"id": d, "down": 40.0} for d in names],
            "links": [{"between": p, "bandwidth": 100.0, "latency": 0.0} for p in pairs], "data": ["a"],
        }
    )  # fmt: skip
    plan = make(graph, [("b:20 c:20", 1)], sources="a:40")
    profile = times(graph, cluster, rows=20)
    found = [run(plan, graph, profile, cluster, steps=n).step_time_s for n in (2, 3, 5, 8)]
    assert found == pytest.approx([2 * (F + B) + 58.0] * 4)
    costs = Costs(lower(plan, graph), plan, graph, profile, cluster, 0, ())
    ends = Engine(costs, steps=4, spans=False).run().ends
    assert ends[3] - ends[2] == pytest.approx(2 * (F + B) + 50.0)


def test_the_bound_covers_outputs_that_wait_for_a_slow_link() -> None:
    graph = chain(2, width=2500, saved=40)
    cluster = two(bandwidth=10.0)
    plan = make(graph, [("a:1", 8), ("b:1", 1)], sources="a:1", m=8)
    timeline = run(plan, graph, times(graph, cluster), cluster)
    peak = timeline.device("a").peak_memory_bytes
    assert peak >= 8 * (40 + 10_000)
    assert peak <= stage_bytes(graph, 0, 1, rows=1, in_flight=8, copies=1, synced=False)


def test_flat_gradients_count_where_they_travel() -> None:
    graph = chain(2, parameter_bytes=100)
    cluster = switch(2)
    plan = make(graph, [("a:1 b:1", 1)], sources="a:1 b:1")
    timeline = run(plan, graph, times(graph, cluster), cluster, copies=0)
    assert timeline.device("a").peak_memory_bytes == state_bytes(200, 0, 0, synced=True)


def test_no_steps_are_refused() -> None:
    graph, cluster = chain(1), switch(1)
    plan = make(graph, [("a:1", 1)], sources="a:1")
    with pytest.raises(InputError, match="0 steps"):
        run(plan, graph, times(graph, cluster), cluster, steps=0)


def test_a_program_that_never_ends_is_refused() -> None:
    graph, cluster = chain(1), two()
    plan = make(graph, [("b:1", 1)], sources="a:1")
    program = lower(plan, graph)
    broken = Program({**program.devices, "a": ()}, program.held)
    with pytest.raises(PlanError, match=r"b at 'recv input m0 \[0:1\) from a"):
        simulate(broken, plan, graph, times(graph, cluster), cluster)


# Faults


def pipeline(faults: tuple[str, ...], *, steps: int = 3, clip: bool = False) -> Timeline:
    """Two stages, the second replicated."""
    graph = chain(2, parameter_bytes=100)
    cluster = switch(3, bandwidth=100.0, latency=0.5)
    plan = make(graph, [("a:2", 2), ("b:1 c:1", 1)], sources="a:2", m=2)
    return run(plan, graph, times(graph, cluster), cluster, clip=clip, steps=steps, faults=faults)


def steps_done(timeline: Timeline, device: str) -> list[int]:
    return [s.step for s in timeline.spans if (s.lane, s.kind) == (device, "step")]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("device", ["a", "b"])
def test_a_lost_device_stops_the_rest(device: str, clip: bool) -> None:
    healthy, timeline = pipeline((), clip=clip, steps=2), pipeline((f"lose:{device}@2",), clip=clip)
    for each in "abc":
        assert steps_done(timeline, each) == [0, 1]
    assert timeline.step_time_s == pytest.approx(healthy.step_time_s)
    lost = [(s.lane, s.step, s.seconds) for s in timeline.spans if s.kind == "lost"]
    assert lost == [(device, 2, 0.0)]
    last = max(timeline.spans, key=lambda span: span.end_s)
    assert last.end_s < float("inf")


@pytest.mark.parametrize("link", ["a>b", "b>a", "b>c", "c>b"])
@pytest.mark.parametrize("clip", [False, True])
def test_a_cut_link_stops_the_rest(link: str, clip: bool) -> None:
    timeline = pipeline((f"cut:{link}@1",), clip=clip)
    assert not [s for s in timeline.spans if s.lane == link and s.step >= 1]
    assert min(steps_done(timeline, device) for device in "abc") == [0]
    assert timeline.step_time_s == pytest.approx(pipeline((), clip=clip, steps=1).step_time_s)
    assert not any(span.end_s == float("inf") for span in timeline.spans)


def test_a_cut_norm_stops_everybody() -> None:
    """No message of the step but the norm goes from c to a and back."""
    graph, cluster = chain(2, parameter_bytes=100), switch(3)
    plan = make(graph, [("a:1 b:1 c:1", 1)], sources="a:1 b:1 c:1")
    ring = ("a", "b", "c")
    assert plan.syncs[0].devices == ring
    timeline = run(plan, graph, times(graph, cluster), cluster, clip=True, faults=("cut:b>a@0",))
    assert [steps_done(timeline, d) for d in ring] == [[], [], []]
    assert len([s for s in timeline.spans if s.kind == "reduce"]) == 3


def test_faults_from_the_first_step_leave_no_step_time() -> None:
    for fault in ("lose:a@0", "cut:a>b@0"):
        timeline = pipeline((fault,))
        assert timeline.step_time_s == 0
        assert all(use.utilization == 0 for use in timeline.devices)


def test_a_device_that_waits_for_ever_is_seen_to_wait() -> None:
    timeline = pipeline(("lose:b@1",))
    waits: list[Span] = [s for s in timeline.spans if (s.lane, s.kind, s.step) == ("a", "wait", 1)]
    assert waits


def test_a_slow_device_computes_slower_from_its_step_on() -> None:
    graph, cluster = chain(1, parameter_bytes=100), switch(1)
    plan = make(graph, [("a:1", 1)], sources="a:1")
    profile = times(graph, cluster, update_s_per_byte=0.01)
    timeline = run(plan, graph, profile, cluster, steps=3, faults=("slow:a*3@2",))
    assert [s.seconds for s in timeline.spans if s.kind == "backward"] == pytest.approx([B, B, 3 * B])
    assert timeline.step_time_s == pytest.approx(3 * (F + B + 1.0))


def test_a_slow_link_stretches_transmission_and_latency() -> None:
    graph, cluster = chain(1), two(bandwidth=10.0, latency=0.5)
    plan = make(graph, [("b:1", 1)], sources="a:1")
    profile = times(graph, cluster)
    timeline = run(plan, graph, profile, cluster, faults=("slow:a>b*4@0",))
    assert timeline.step_time_s == pytest.approx(4 * (4.8 + 0.5) + F + B)
    other = run(plan, graph, profile, cluster, faults=("slow:b>a*4@0",))
    assert other.step_time_s == pytest.approx(4.8 + 0.5 + F + B)
