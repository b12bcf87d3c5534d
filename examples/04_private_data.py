"""Private data: raw rows, and unless told otherwise labels, never leave the devices that hold them.

Prints for three jobs where every stage is, and every kind of message that leaves the data devices in one
training step. Nothing is trained here: the Program is all that a device ever does.
"""

import tempfile
from collections import Counter
from pathlib import Path

import spanwise
from spanwise.core.units import format_bytes, format_seconds
from spanwise.lowering import lower

CLUSTER = """
data = ["ward-1", "ward-2"]
emulation = { core_share = 0.5 }
devices = [
    { id = "server", site = "datacenter", tier = "cloud" },
    { id = "ward-1", site = "hospital", tier = "end", speed = 0.2 },
    { id = "ward-2", site = "hospital", tier = "end", speed = 0.1 },
]
links = [
    { between = ["datacenter", "hospital"], bandwidth = "200 Mbit/s", latency = "2 ms" },
    { between = ["hospital", "hospital"], bandwidth = "100 Mbit/s", latency = "1 ms" },
]
"""
DATA = {"name": "spanwise.zoo.data:digits", "size": 32, "channels": 1}
JOB = {"model": "spanwise.zoo:lenet5", "data": DATA, "batch": 64}

cluster = spanwise.Cluster.from_toml(CLUSTER)
with tempfile.TemporaryDirectory() as folder:
    for changes in ({}, {"private": True}, {"private": True, "share_labels": True}):
        job = spanwise.Job.parse(JOB | changes)
        graph, times = spanwise.profile(job, cluster, cache=Path(folder))
        plan, _ = spanwise.plan(job, cluster, cache=Path(folder))
        predicted = spanwise.simulate(plan, graph, times, cluster, job=job)
        step = format_seconds(predicted.step_time_s)
        print(f"\n{changes or 'no constraint'}: {plan.strategy}, {step} a step")
        for number, stage in enumerate(plan.stages):
            rows = ", ".join(f"{replica.device} x {replica.rows} rows" for replica in stage.replicas)
            print(f"  stage {number}: layers {stage.start} to {stage.stop - 1} on {rows}")
        program = lower(plan, graph)
        for device in ("ward-1", "ward-2"):
            sent = Counter()
            for action in program.devices[device]:
                if action.kind in ("send", "reduce"):
                    sent[action.payload or "gradient sums"] += action.nbytes
            parts = ", ".join(f"{kind} {format_bytes(nbytes)}" for kind, nbytes in sent.items())
            print(f"  {device} sends {parts or 'nothing'}")
