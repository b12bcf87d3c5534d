"""One small simulation as a table: 3 devices, 2 stages, uneven rows, 3 micro-batches, 2 steps."""

from __future__ import annotations

from collections.abc import Callable

from simulator_cases import chain, make, times
from spanwise.core.cluster import Cluster
from spanwise.core.timeline import Timeline
from spanwise.lowering import lower
from spanwise.simulator import simulate

CLUSTER = {
    "devices": [
        {"id": "cam", "site": "plant"},
        {"id": "box", "site": "plant"},
        {"id": "cloud", "site": "dc", "down": 150.0},
    ],
    "links": [
        {"between": ["plant", "plant"], "bandwidth": 400.0, "latency": 0.1},
        {"between": ["plant", "dc"], "up": 100.0, "down": 200.0, "latency": 0.5},
    ],
}


def small() -> Timeline:
    """Both plant devices hold stage 0, with 2 rows and 1; all rows start on one of them."""
    cluster = Cluster.parse(CLUSTER)
    graph = chain(4, parameter_bytes=200, saved=300)
    plan = make(graph, [("cam:1 box:2", 3), ("cloud:3", 1)], sources="cam:3", m=3)
    profile = times(graph, cluster, update_s_per_byte=1e-3, message_s=0.05, cam=1.5, cloud=0.25)
    program = lower(plan, graph, clip=True)
    return simulate(program, plan, graph, profile, cluster, optimizer_copies=1)


def table(timeline: Timeline) -> str:
    """Spans by lane, then memory and totals by device; seconds to the millisecond."""
    lines = [f"step time {timeline.step_time_s:.3f} s", ""]
    lines.append(f"{'lane':<10} {'step':>4} {'start':>9} {'end':>9}  action")
    for span in timeline.spans:
        text = f"wait for {span.action}" if span.kind == "wait" else span.action
        lines.append(f"{span.lane:<10} {span.step:>4} {span.start_s:>9.3f} {span.end_s:>9.3f}  {text}")
    lines += ["", f"{'device':<10} {'busy':>9} {'share':>6} {'peak':>7} {'sent':>6}"]
    for use in timeline.devices:
        lines.append(
            f"{use.device:<10} {use.busy_s:>9.3f} {use.utilization:>6.1%} {use.peak_memory_bytes:>7} "
            f"{use.sent_bytes:>6}"
        )
    lines += ["", f"{'device':<10} {'at':>9} {'bytes':>7}"]
    lines += [f"{point.device:<10} {point.at_s:>9.3f} {point.bytes:>7}" for point in timeline.memory]
    return "\n".join(lines) + "\n"


def test_timeline_is_as_written(golden: Callable[[str, str], None]) -> None:
    golden("timeline", table(small()))
