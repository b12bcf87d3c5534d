"""The event loop against numbers worked out by hand: compute, messages, collectives, measured links."""

from __future__ import annotations

from itertools import pairwise

import pytest

from simulator_cases import FAST, B, F, chain, ends, in_halves, make, run, sites, switch, times, two
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InputError
from spanwise.core.faults import Fault
from spanwise.core.order import parse_order
from spanwise.core.plan import ScheduleName
from spanwise.core.profile import LayerTimes, LinkTimes, TimeTable
from spanwise.core.program import Action, Program
from spanwise.cost.training import ring_s
from spanwise.lowering import lower
from spanwise.schedules import Hop, StageSeconds, zero_bubble
from spanwise.simulator import simulate

# Compute


@pytest.mark.parametrize("stages", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_bubble_of_a_uniform_pipeline(stages: int, extra: int, schedule: ScheduleName) -> None:
    """(M + P - 1)(F + B): a bubble of (P - 1)(F + B). Narayanan et al., SC 2021, section 2.2."""
    m = 2 * stages + extra
    graph, cluster = chain(stages), switch(stages)
    layout = [(f"{cluster.ids[p]}:1", stages - p) for p in range(stages)]
    plan = make(graph, layout, sources="a:1", m=m, schedule=schedule)
    timeline = run(plan, graph, times(graph, cluster), cluster)
    assert timeline.step_time_s == pytest.approx((m + stages - 1) * (F + B))
    for device in cluster.ids:
        assert timeline.device(device).busy_s == pytest.approx(m * (F + B))
        assert timeline.device(device).utilization == pytest.approx(m / (m + stages - 1))


@pytest.mark.parametrize("stages", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("extra", [0, 3])
def test_bubble_of_a_uniform_zero_bubble_pipeline(stages: int, extra: int) -> None:
    """(P - 1) F with equal halves of F each and K2 = 2P - 1: only the filling of the pipeline is left."""
    m = 2 * stages + extra
    graph, cluster = chain(stages), switch(stages)
    deep = [2 * (stages - p) - 1 for p in range(stages)]
    layout = [(f"{cluster.ids[p]}:1", deep[p]) for p in range(stages)]
    links = [Hop(0.0, 0.0)] * (stages - 1)
    orders = zero_bubble(
        m, [StageSeconds(F, F, F)] * stages, links, links, ahead=deep, kept=[2 * stages - 1] * stages
    )
    plan = in_halves(make(graph, layout, sources="a:1", m=m), orders)
    layer = LayerTimes(forward_s=(F,), backward_s=(2 * F,), backward_input_s=(F,), backward_weight_s=(F,))
    profile = times(graph, cluster)
    table = profile.tables[0].model_copy(update={"layers": (layer,) * stages})
    timeline = run(plan, graph, profile.model_copy(update={"tables": (table,)}), cluster)
    assert timeline.step_time_s == pytest.approx((3 * m + stages - 1) * F)


def test_between_the_halves_a_micro_batch_keeps_what_the_weight_half_needs() -> None:
    """Saved until the input half, deferred from there until the weight half."""
    (layer,) = chain(1, saved=100).layers
    graph = chain(1).model_copy(update={"layers": (layer.model_copy(update={"deferred_bytes": 30}),)})
    cluster = switch(1)
    plan = make(graph, [("a:1", 2)], sources="a:1", m=2)
    plan = in_halves(plan, (parse_order("F0 F1 I0 I1 W0 W1"),))
    timeline = run(plan, graph, times(graph, cluster), cluster, steps=1)
    assert [point.bytes for point in timeline.memory] == [0, 100, 200, 130, 60, 0]


@pytest.mark.parametrize(("parameter_bytes", "at_once"), [(59, 1), (60, 2), (120, 4), (10_000, 4)])
def test_weight_halves_at_once_take_as_long_as_one_of_all_their_rows(
    parameter_bytes: int, at_once: int
) -> None:
    """F seconds whatever the rows: four micro-batches of a row take four times that, twice, or once.

    As many are copied together as have no more bytes than the parameters.
    """
    (layer,) = chain(1, saved=100, parameter_bytes=parameter_bytes).layers
    graph = chain(1).model_copy(update={"layers": (layer.model_copy(update={"deferred_bytes": 30}),)})
    cluster = switch(1)
    plan = make(graph, [("a:1", 4)], sources="a:1", m=4)
    plan = in_halves(plan, (parse_order("F0 F1 F2 F3 I0 I1 I2 I3 W0 W1 W2 W3"),))
    table = TimeTable(
        rows=(1, 2),
        layers=(LayerTimes(forward_s=(F,) * 2, backward_s=(2 * F,) * 2, backward_input_s=(B,) * 2,
                           backward_weight_s=(F,) * 2),),
    )  # fmt: skip
    profile = times(graph, cluster).model_copy(update={"tables": (table,)})
    timeline = run(plan, graph, profile, cluster, steps=1, copies=0)
    assert timeline.step_time_s == pytest.approx(4 * F + 4 * B + 4 // at_once * F)
    copied = 30 * at_once if at_once > 1 else 0
    assert 4 * 30 + copied + 2 * parameter_bytes in [point.bytes for point in timeline.memory]
    assert timeline.memory[-1].bytes == 2 * parameter_bytes


def test_too_shallow_a_warm_up_costs_time() -> None:
    """Negative control of the bubble: at depth 1 everywhere each micro-batch passes alone."""
    graph, cluster = chain(3), switch(3)
    plan = make(graph, [("a:1", 1), ("b:1", 1), ("c:1", 1)], sources="a:1", m=6)
    timeline = run(plan, graph, times(graph, cluster), cluster)
    assert timeline.step_time_s == pytest.approx(6 * 3 * (F + B))


def test_one_device_is_the_sum_of_its_layers_and_the_update() -> None:
    graph, cluster = chain(4, parameter_bytes=100), switch(1)
    plan = make(graph, [("a:2", 1)], sources="a:2", m=3)
    profile = times(graph, cluster, update_s_per_byte=0.01, a=2.0)
    timeline = run(plan, graph, profile, cluster, steps=2)
    # 3 micro-batches of 2 rows over 4 layers at twice the table's time, then 400 bytes of parameters.
    expected = 2.0 * (3 * 2 * 4 * (F + B) + 0.01 * 400)
    assert timeline.step_time_s == pytest.approx(expected)
    assert timeline.device("a").busy_s == pytest.approx(expected)
    assert timeline.device("a").sent_bytes == 0


def test_a_device_without_parameters_updates_nothing() -> None:
    graph, cluster = chain(2), switch(1)
    plan = make(graph, [("a:1", 1)], sources="a:1")
    timeline = run(plan, graph, times(graph, cluster, update_s_per_byte=1.0), cluster)
    assert timeline.step_time_s == pytest.approx(2 * (F + B))
    assert [span.seconds for span in timeline.spans if span.kind == "step"] == [0.0]


# Messages


def test_two_devices_and_one_link() -> None:
    graph, cluster = chain(2), two(bandwidth=100.0, latency=0.25, back=50.0)
    plan = make(graph, [("a:1", 2), ("b:1", 1)], sources="a:1")
    timeline = run(plan, graph, times(graph, cluster), cluster)
    # The label (8 bytes) goes first, while a computes; 100 bytes forth at 100/s, back at 50/s.
    forward_there = F + 1.0 + 0.25
    assert ends(timeline, "a>b", "label") == pytest.approx([0.08])
    assert ends(timeline, "a>b", "activation") == pytest.approx([F + 1.0])
    assert ends(timeline, "b", "forward") == pytest.approx([forward_there + F])
    assert ends(timeline, "b>a", "gradient") == pytest.approx([forward_there + F + B + 2.0])
    assert timeline.step_time_s == pytest.approx(forward_there + F + B + 2.0 + 0.25 + B)
    assert timeline.device("a").sent_bytes == 108
    assert timeline.device("b").sent_bytes == 100


def test_latency_is_pipelined_after_transmission() -> None:
    """Behind a slow link messages follow each other without a gap; only the last one's latency shows."""
    graph, cluster = chain(2, width=250), two(bandwidth=100.0, latency=7.0, back=FAST)
    plan = make(graph, [("a:1", 4), ("b:1", 4)], sources="a:1", m=4, schedule="gpipe")
    timeline = run(plan, graph, times(graph, cluster), cluster)
    begin = F  # the labels, 0.08 s each, have passed by then
    assert ends(timeline, "a>b", "activation") == pytest.approx([begin + 10.0 * i for i in (1, 2, 3, 4)])
    assert ends(timeline, "b", "forward") == pytest.approx([begin + 10.0 * i + 7 + F for i in (1, 2, 3, 4)])


def test_messages_of_a_pair_keep_their_order_and_do_not_overlap() -> None:
    graph, cluster = chain(2, width=250), two(bandwidth=10.0)
    plan = make(graph, [("a:1", 3), ("b:1", 3)], sources="a:1", m=3)
    timeline = run(plan, graph, times(graph, cluster), cluster)
    lane = [span for span in timeline.spans if span.lane == "a>b"]
    sent = [str(a) for a in lower(plan, graph).devices["a"] if a.kind == "send"]
    assert [span.action for span in lane] == sent
    for before, after in pairwise(lane):
        assert before.end_s <= after.start_s


def test_messages_that_share_a_site_link_halve_their_rates() -> None:
    graph, cluster = chain(2), sites(100.0)
    profile = times(graph, cluster)
    both = make(graph, [("a:1 b:1", 1), ("c:1 d:1", 1)], sources="c:1 d:1")
    one = make(graph, [("a:1", 1), ("c:1", 1)], sources="c:1")
    for plan, seconds in ((one, 1.0), (both, 2.0)):
        moved = [x for x in run(plan, graph, profile, cluster).spans if x.kind in ("activation", "gradient")]
        assert [span.seconds for span in moved] == pytest.approx([seconds] * len(moved))
        assert len(moved) == 2 * len(plan.stages[0].replicas)


def test_a_message_that_comes_later_takes_its_half() -> None:
    """100 bytes on a>c from F, 100 on b>d from 1.1 F: the first has the link to itself for a while."""
    graph, cluster = chain(2), sites(100.0)
    plan = make(graph, [("a:1 b:1", 1), ("c:1 d:1", 1)], sources="c:1 d:1")
    timeline = run(plan, graph, times(graph, cluster, b=1.1), cluster)
    lead = ends(timeline, "b", "forward")[0] - ends(timeline, "a", "forward")[0]
    first, second = ends(timeline, "a>c", "activation")[0], ends(timeline, "b>d", "activation")[0]
    begin = ends(timeline, "a", "forward")[0]
    assert lead == pytest.approx(0.1 * F)
    assert first == pytest.approx(begin + lead + 2 * (1.0 - lead))
    assert second == pytest.approx(begin + 2.0)


def test_input_rows_come_from_their_source() -> None:
    """40 bytes of input and 8 of label a row; the pure source takes no other part."""
    graph, cluster = chain(1), two(bandwidth=10.0, latency=0.5)
    plan = make(graph, [("b:2", 1)], sources="a:2")
    timeline = run(plan, graph, times(graph, cluster), cluster)
    assert ends(timeline, "a>b", "input") == pytest.approx([8.0])
    assert ends(timeline, "a>b", "label") == pytest.approx([9.6])
    assert ends(timeline, "b", "wait") == pytest.approx([8.5, 10.1])
    assert timeline.step_time_s == pytest.approx(9.6 + 0.5 + 2 * (F + B))
    assert timeline.device("a").sent_bytes == 96
    assert timeline.device("a").busy_s == 0


def test_messages_take_compute_from_both_ends() -> None:
    graph, cluster = chain(2), two()
    plan = make(graph, [("a:1", 1), ("b:1", 1)], sources="a:1")
    timeline = run(plan, graph, times(graph, cluster, message_s=0.5, b=2.0), cluster)
    # a: sends a label, forward, sends. b: has received the label by then, receives, computes at half speed.
    a_sent = 0.5 + F
    b_done = a_sent + 1.0 + 2 * (F + B)  # the label's 1 s on b fell into a's forward
    assert ends(timeline, "b", "backward") == pytest.approx([b_done + 1.0])
    assert timeline.device("a").busy_s == pytest.approx(F + B + 3 * 0.5)
    assert timeline.device("b").busy_s == pytest.approx(2 * (F + B) + 3 * 1.0)


def test_bytes_take_compute_too_and_a_ring_takes_that_of_all_its_rounds() -> None:
    graph, cluster = chain(1, parameter_bytes=40), two()
    plan = make(graph, [("a:1 b:1", 1)], sources="a:1 b:1")
    timeline = run(plan, graph, times(graph, cluster, message_s=0.5, message_s_per_byte=0.25), cluster)
    # Two devices: one round to sum, one to pass on; in each half of the buffer goes out and half comes in.
    ring_s = 2 * (2 * 0.5 + 40 * 0.25)
    assert timeline.device("a").busy_s == pytest.approx(F + B + ring_s)
    assert timeline.device("b").busy_s == pytest.approx(F + B + ring_s)


def test_an_empty_message_arrives_after_the_latency() -> None:
    graph, cluster = chain(1), two(bandwidth=10.0, latency=0.5)
    plan = make(graph, [("b:1", 1)], sources="a:1")
    program = lower(plan, graph)
    emptied = {d: tuple(_without_bytes(a) for a in actions) for d, actions in program.devices.items()}
    empty = Program(emptied, program.held)
    for faults in ((), (Fault.of("slow:a>b*3@5"),), (Fault.of("cut:a>b@5"),)):
        timeline = simulate(
            Program(emptied, program.held),
            plan,
            graph,
            times(graph, cluster),
            cluster,
            steps=1,
            faults=faults,
        )
        assert timeline.step_time_s == pytest.approx(0.5 + F + B)
    cut = simulate(
        empty, plan, graph, times(graph, cluster), cluster,
        faults=(Fault.of("cut:a>b@0"),),
    )  # fmt: skip
    assert ends(cut, "b", "forward") == []


def _without_bytes(action: Action) -> Action:
    if action.kind not in ("send", "recv"):
        return action
    return Action.parse(str(action).replace(f"{action.nbytes}B", "0B"))


# Measured links


def test_measured_links_replace_the_file() -> None:
    graph, cluster = chain(1), two(bandwidth=10.0, latency=0.5)
    plan = make(graph, [("b:2", 1)], sources="a:2")
    link = LinkTimes(source="a", target="b", bandwidth_bytes_per_s=40.0, latency_s=0.1)
    timeline = run(plan, graph, times(graph, cluster, links=(link,)), cluster)
    assert ends(timeline, "a>b", "label") == pytest.approx([2.4])
    assert timeline.step_time_s == pytest.approx(2.4 + 0.1 + 2 * (F + B))


@pytest.mark.parametrize("measured", [40.0, 400.0])
def test_measured_links_still_share_what_the_file_says_they_share(measured: float) -> None:
    """Each pair alone reached ``measured``; both at once have half of it each."""
    graph, cluster = chain(2), sites(100.0)
    links = tuple(
        LinkTimes(source=s, target=t, bandwidth_bytes_per_s=measured, latency_s=0.0)
        for s, t in (("a", "c"), ("b", "d"), ("c", "a"), ("d", "b"))
    )
    plan = make(graph, [("a:1 b:1", 1), ("c:1 d:1", 1)], sources="c:1 d:1")
    timeline = run(plan, graph, times(graph, cluster, links=links), cluster)
    moved = [span.seconds for span in timeline.spans if span.kind == "activation"]
    assert moved == pytest.approx([2 * 100 / measured] * 2)


def test_a_measured_pair_needs_no_link_in_the_file() -> None:
    graph = chain(1)
    cluster = Cluster.parse({"devices": [{"id": "a"}, {"id": "b"}]})
    plan = make(graph, [("b:1", 1)], sources="a:1")
    link = LinkTimes(source="a", target="b", bandwidth_bytes_per_s=48.0, latency_s=0.5)
    assert run(plan, graph, times(graph, cluster, links=(link,)), cluster).step_time_s == pytest.approx(
        1.5 + F + B
    )
    with pytest.raises(InputError, match="no link from 'a'"):
        run(plan, graph, times(graph, cluster), cluster)


# Collectives


@pytest.mark.parametrize("devices", [2, 3, 5])
@pytest.mark.parametrize("segments", [1, 2])
def test_a_ring_takes_what_the_formula_says(devices: int, segments: int) -> None:
    """Of two, the first begins beside the weight half of the last layer that is left."""
    graph, cluster = chain(2, parameter_bytes=3000), switch(devices, bandwidth=500.0, latency=0.25)
    layout = " ".join(f"{d}:1" for d in cluster.ids)
    plan = make(graph, [(layout, 1)], sources=layout, segments=segments)
    timeline = run(plan, graph, times(graph, cluster), cluster)
    ring = segments * ring_s(devices, 6000 / segments, 500.0, 0.25)
    beside = B / 2 if segments == 2 else 0.0
    assert timeline.step_time_s == pytest.approx(2 * (F + B) + ring - beside)
    assert timeline.device("a").sent_bytes == round(2 * (devices - 1) / devices * 6000)


def test_a_ring_starts_with_its_last_member_and_runs_beside_compute() -> None:
    """Stage 1's sum over b and c runs while a still computes backward."""
    graph = chain(2, parameter_bytes=1000)
    cluster = switch(3, bandwidth=1000.0)
    plan = make(graph, [("a:2", 2), ("b:1 c:1", 1)], sources="a:2")
    timeline = run(plan, graph, times(graph, cluster, c=2.0), cluster)
    last = max(ends(timeline, "b", "backward") + ends(timeline, "c", "backward"))
    sums = [span for span in timeline.spans if span.kind == "reduce"]
    assert [span.lane for span in sums] == ["b>c", "c>b"]
    assert [span.start_s for span in sums] == pytest.approx([last, last])
    backward = next(span for span in timeline.spans if (span.lane, span.kind) == ("a", "backward"))
    assert backward.start_s < sums[0].end_s


def test_clipping_costs_one_latency_after_the_last_device() -> None:
    graph = chain(2, parameter_bytes=1000)
    cluster = two(latency=0.75)
    plan = make(graph, [("a:1 b:1", 1)], sources="a:1 b:1")
    profile = times(graph, cluster, b=2.0)
    free, clipped = (run(plan, graph, profile, cluster, clip=clip) for clip in (False, True))
    assert clipped.step_time_s == pytest.approx(free.step_time_s + 0.75)
    assert free.step_time_s == pytest.approx(4 * (F + B) + 2 * 0.75)


def test_clipping_from_the_first_instant() -> None:
    """A wait that begins at time 0 has its length."""
    graph, cluster = chain(1), two(latency=0.5)
    plan = make(graph, [("a:1 b:1", 1)], sources="a:1 b:1")
    devices = {d: (Action("norm", members=("a", "b")), Action("step")) for d in "ab"}
    timeline = simulate(Program(devices), plan, graph, times(graph, cluster), cluster, steps=1)
    assert [(s.start_s, s.end_s) for s in timeline.spans if s.kind == "wait"] == [(0.0, 0.5)] * 2
