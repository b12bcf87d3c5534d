"""Write a cluster file and a job file, train, read the run folder, and go on on another cluster.

On the command line: ``spanwise train job.toml --cluster lab.toml --run first``, then
``spanwise train job.toml --cluster desk.toml --run second --resume first --set epochs=5``.
"""

import json
import tempfile
from pathlib import Path

import torch

import spanwise

LAB = """
name = "lab"
data = { left = 3.0, right = 1.0 } # three of four rows are on the left device
emulation = { core_share = 0.5 }   # speed 1.0 is half a core of this machine

devices = [{ id = "left" }, { id = "right", speed = 0.5, memory = "512 MiB" }]

[[links]]
between = ["left", "right"]
up = "40 Mbit/s"   # left to right
down = "80 Mbit/s" # right to left
latency = "2 ms"
"""
DESK = 'name = "desk"\nemulation = {}\ndevices = [{ id = "desk" }]\n'
JOB = """
name = "digits"
model = { name = "spanwise.zoo:lenet5" }
data = { name = "spanwise.zoo.data:digits", size = 32, channels = 1 }
batch = 64
epochs = 3
optimizer = { name = "AdamW", lr = 2e-3 }
clip_norm = 1.0
"""

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    here = Path(folder)
    for name, text in (("lab", LAB), ("desk", DESK), ("job", JOB)):
        (here / f"{name}.toml").write_text(text)
    lab, desk = (spanwise.load_cluster(here / f"{name}.toml") for name in ("lab", "desk"))
    job = spanwise.load_job(here / "job.toml")
    spanwise.train(job, lab, run=here / "first", strategy="data_parallel")
    longer = spanwise.load_job(here / "job.toml", ("epochs=5",))
    spanwise.train(longer, desk, run=here / "second", resume=here / "first")

    for name in ("first", "second"):
        summary = json.loads((here / name / "summary.json").read_text())
        print(f"{name}: {summary['strategy']} on {', '.join(summary['devices_used'])}, ", end="")
        print(f"{summary['steps']} steps, test accuracy {summary['accuracy']:.1%}")
    print("a run folder holds", ", ".join(sorted(path.name for path in (here / "second").iterdir())))
