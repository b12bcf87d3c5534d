"""Machines one does not have: layer times from a roofline, a simulated plan, and the same plan in trouble.

Layer times come from FLOP/s and memory bandwidth alone (nothing is measured), so that one can ask before
buying. Then: where the time of a step goes, what a device at a third of its speed costs, and a link 20 times
as slow.
"""

import spanwise
from spanwise.api.planning import choose
from spanwise.api.prepare import prepare
from spanwise.core.faults import Fault
from spanwise.core.profile import DeviceTimes, Profile
from spanwise.core.units import format_seconds
from spanwise.profiler.scale import analytic_table

CLUSTER = """
data = ["camera"]
devices = [
    { id = "workstation", tier = "cloud", memory = "16 GiB" },
    { id = "jetson", tier = "edge", memory = "8 GiB" },
    { id = "camera", tier = "end", memory = "1 GiB" },
]
links = [{ between = ["site", "site"], bandwidth = "1 Gbit/s", latency = "0.5 ms" }]
"""
MACHINES = {"workstation": (2e11, 40e9), "jetson": (1e11, 30e9), "camera": (1e10, 5e9)}  # FLOP/s, bytes/s


def show(title, timeline):
    """Step time, and the parts of the last simulated step on each device."""
    print(f"\n{title}: {format_seconds(timeline.step_time_s)} a step")
    last = max(span.step for span in timeline.spans)
    for use in timeline.devices:
        spent = dict.fromkeys(("forward", "backward", "step", "wait"), 0.0)
        for span in timeline.spans:
            if span.lane == use.device and span.step == last and span.kind in spent:
                spent[span.kind] += span.seconds
        parts = ", ".join(f"{kind} {format_seconds(seconds)}" for kind, seconds in spent.items())
        print(f"  {use.device:12s} {use.utilization:4.0%} busy: {parts}")


data = {"name": "spanwise.zoo.data:synthetic_images", "rows": 64}
job = spanwise.Job.parse({"model": "spanwise.zoo:resnet18", "data": data, "batch": 64})
cluster = spanwise.Cluster.from_toml(CLUSTER)
graph = prepare(job).traced.graph
times = Profile(
    graph_digest=graph.digest,
    tables=tuple(analytic_table(graph, *MACHINES[device]) for device in cluster.ids),
    devices=tuple(DeviceTimes(device=device, table=i) for i, device in enumerate(cluster.ids)),
)
plan, evaluations = choose(job, cluster, graph, times, "auto")
for entry in evaluations:
    step = format_seconds(entry.timeline.step_time_s) if entry.timeline else entry.reason
    print(f"{entry.strategy:24s} {step}")
show(f"{plan.strategy}, as planned", spanwise.simulate(plan, graph, times, cluster, job=job))
for text in ("slow:jetson*3@0", "slow:jetson>workstation*20@0"):
    fault = Fault.of(text)
    show(f"with {text}", spanwise.simulate(plan, graph, times, cluster, job=job, faults=(fault,)))
