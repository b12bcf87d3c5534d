"""Simulate a plan: where the time goes, what a slow device costs, and how machines one lacks would do.

The first cluster uses layer times measured here; the second one times from a roofline, by FLOP/s and memory
bandwidth alone, so that one can ask about a machine before buying it.
"""

import spanwise
from spanwise.api.planning import choose
from spanwise.core.faults import Fault
from spanwise.core.profile import DeviceTimes, Profile
from spanwise.core.units import format_seconds
from spanwise.profiler.scale import analytic_table

CLUSTER = """
data = ["camera"]
emulation = {}
devices = [
    { id = "server", tier = "cloud", speed = 1.0 },
    { id = "box", tier = "edge", speed = 0.6 },
    { id = "camera", tier = "end", speed = 0.2 },
]
links = [{ between = ["site", "site"], bandwidth = "1 Gbit/s", latency = "0.5 ms" }]
"""
MACHINES = {"server": (2e12, 300e9), "box": (4e11, 50e9), "camera": (2e10, 8e9)}  # FLOP/s, bytes/s


def show(title, timeline):
    """Step time, then per device the parts of the last step."""
    print(f"\n{title}: {format_seconds(timeline.step_time_s)} a step")
    last = max(span.step for span in timeline.spans)
    for use in timeline.devices:
        spent = {"forward": 0.0, "backward": 0.0, "step": 0.0, "wait": 0.0}
        for span in timeline.spans:
            if span.lane == use.device and span.step == last:
                spent[span.kind] += span.seconds
        parts = ", ".join(f"{kind} {format_seconds(seconds)}" for kind, seconds in spent.items())
        print(f"  {use.device:8s} {use.utilization:4.0%} busy: {parts}")


job = spanwise.Job.parse(
    {
        "model": {"name": "spanwise.zoo:resnet18", "num_classes": 10},
        "data": {"name": "spanwise.zoo.data:synthetic_images", "rows": 64},
        "batch": 64,
    }
)
cluster = spanwise.Cluster.from_toml(CLUSTER)
graph, times = spanwise.profile(job, cluster)
