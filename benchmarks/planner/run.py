"""Planning: seconds of import and of `spanwise plan` on a cached profile, and of comparing all strategies."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import keep, options, summary

from spanwise.core.cluster import Cluster
from spanwise.core.job import Job
from spanwise.core.model import Layer, ModelGraph, Parameter, TensorSpec
from spanwise.core.profile import DeviceTimes, LayerTimes, Profile, TimeTable
from spanwise.planner import Problem, compare

JOB = Path(__file__).resolve().parents[2] / "examples" / "digits.toml"


def command_s(command: list[str], repeats: int) -> dict[str, float]:
    """Wall seconds of a command."""
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return summary(seconds)


def chain(layers: int, seed: int) -> ModelGraph:
    """A convolutional-network-like chain: cuts shrink, weights grow."""
    rng = random.Random(seed)
    built: list[Layer] = []
    for index in range(layers):
        cut = TensorSpec(
            name=f"a{index}", shape=(int(30_000 / (1 + index)) + 64,), dtype="float32", item_bytes=4
        )
        flops = rng.uniform(2e6, 1e7)
        weights = Parameter(name=f"w{index}", shape=(1,), bytes=int(4000 * (1 + index) ** 1.5))
        built.append(
            Layer(
                name=f"layer{index}", ops=(index, index + 1), forward_flops=flops, backward_flops=2 * flops,
                parameters=(weights,), outputs=(cut,) if index + 1 < layers else (),
                saved_bytes=cut.row_bytes,
            )
        )  # fmt: skip
    image = TensorSpec(name="x", shape=(3, 32, 32), dtype="float32", item_bytes=4, differentiable=False)
    label = TensorSpec(name="y", shape=(), dtype="int64", item_bytes=8, differentiable=False)
    return ModelGraph(
        name="chain", source_digest="chain", layers=tuple(built), inputs=(image,), labels=(label,)
    )


def problem(devices: int, layers: int, seed: int) -> Problem:
    """Unlike devices on two sites."""
    rng = random.Random(seed)
    graph = chain(layers, seed)
    rows = (1, 4, 16, 64)
    table = TimeTable(
        rows=rows,
        layers=tuple(
            LayerTimes(
                forward_s=tuple(1e-4 + r * x.forward_flops / 2e10 for r in rows),
                backward_s=tuple(2e-4 + r * x.backward_flops / 2e10 for r in rows),
            )
            for x in graph.layers
        ),
        provenance="analytic",
    )
    ids = [f"d{i}" for i in range(devices)]
    speeds = [rng.choice((1.0, 0.5, 0.25, 0.1)) for _ in ids]
    cluster = Cluster.parse(
        {
            "name": "planned",
            "devices": [
                {"id": d, "site": f"s{i % 2}", "speed": v, "memory": "4 GiB"}
                for i, (d, v) in enumerate(zip(ids, speeds, strict=True))
            ],
            "links": [
                {"between": ["s0", "s1"], "bandwidth": "50 Mbit/s", "latency": "10 ms"},
                {"between": ["s0", "s0"], "bandwidth": "500 Mbit/s", "latency": "1 ms"},
                {"between": ["s1", "s1"], "bandwidth": "500 Mbit/s", "latency": "1 ms"},
            ],
            "data": [ids[0]],
        }
    )
    times = Profile(
        graph_digest=graph.digest,
        tables=(table,),
        devices=tuple(DeviceTimes(device=d, factor=1 / v) for d, v in zip(ids, speeds, strict=True)),
    )
    job = Job.parse({"model": "live", "data": "live", "batch": 128})
    return Problem(graph=graph, profile=times, cluster=cluster, job=job)


def compare_s(devices: int, layers: int, repeats: int) -> dict[str, Any]:
    """Seconds of planning and simulating every strategy."""
    seconds: list[float] = []
    best: list[str] = []
    for seed in range(repeats):
        task = problem(devices, layers, seed)
        start = time.perf_counter()
        found = compare(task)
        seconds.append(time.perf_counter() - start)
        winner = min(
            (e for e in found if e.timeline), key=lambda e: e.timeline.step_time_s if e.timeline else 0
        )
        best.append(winner.strategy)
    return {"seconds": summary(seconds), "best": best}


def main() -> None:
    args = options(__doc__ or "")
    repeats = 3 if args.short else 7
    sizes = [(3, 20), (4, 50)] if args.short else [(3, 20), (4, 50), (6, 50), (8, 60), (16, 60)]
    spanwise = str(Path(sys.executable).with_name("spanwise"))
    with tempfile.TemporaryDirectory() as cache:
        plan = [spanwise, "plan", str(JOB), "--cache", cache]
        subprocess.run(plan, check=True, capture_output=True)
        result = {
            "import_spanwise_s": command_s([sys.executable, "-c", "import spanwise"], repeats),
            "python_alone_s": command_s([sys.executable, "-c", "pass"], repeats),
            "plan_on_cached_profile_s": command_s(plan, repeats),
            "compare": {f"{d} devices x {n} layers": compare_s(d, n, repeats) for d, n in sizes},
        }
    keep(args, Path(__file__).parent, "planner", result)


if __name__ == "__main__":
    main()
