"""Plan only: which strategy is fastest, whether distributing pays, and what a faster link would change.

Layer times are measured once on this machine and kept in a cache; planning and simulating need no torch.
"""

import tempfile
from pathlib import Path

import spanwise
from spanwise.api.advice import advice_data
from spanwise.core.units import format_bytes, format_seconds

CLUSTER = """
data = ["gate-1", "gate-2"]
devices = [
    {{ id = "server", site = "office", tier = "cloud", speed = 1.0, memory = "2 GiB" }},
    {{ id = "gate-1", site = "plant", tier = "end", speed = 0.10, memory = "256 MiB" }},
    {{ id = "gate-2", site = "plant", tier = "end", speed = 0.06, memory = "256 MiB" }},
]
links = [
    {{ between = ["office", "plant"], bandwidth = "{uplink} Mbit/s", latency = "5 ms" }},
    {{ between = ["plant", "plant"], bandwidth = "1 Gbit/s", latency = "1 ms" }},
]
emulation = {{ core_share = 0.5 }}
"""

data = {"name": "spanwise.zoo.data:digits", "size": 32, "channels": 1}
job = spanwise.Job.parse({"model": "spanwise.zoo:lenet5", "data": data, "batch": 64})

with tempfile.TemporaryDirectory() as cache:
    for uplink in (12, 24):
        cluster = spanwise.Cluster.from_toml(CLUSTER.format(uplink=uplink))
        graph, times = spanwise.profile(job, cluster, cache=Path(cache))
        answer = advice_data(job, cluster, graph, times, "auto")
        print(f"\nUplink of {uplink} Mbit/s")
        for entry in answer.evaluations:
            if entry.plan is None or entry.timeline is None:
                print(f"  {entry.strategy:24s} {entry.reason}")
                continue
            stages = " > ".join("+".join(stage.devices) for stage in entry.plan.stages)
            peak = max(use.peak_memory_bytes for use in entry.timeline.devices)
            step = format_seconds(entry.timeline.step_time_s)
            print(f"  {entry.strategy:24s} {step:>8s}  {format_bytes(peak):>9s} at most  {stages}")
        print(f"  {answer.advice.sentence}")
