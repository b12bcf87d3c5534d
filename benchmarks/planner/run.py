"""Planning: seconds of commands and of comparing all strategies, from 3 devices to 2,000."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import large, unlike
from harness import keep, options, summary

from spanwise.planner import Problem, compare
from spanwise.planner.strategies.hpp import hpp

JOB = Path(__file__).resolve().parents[2] / "examples" / "digits.toml"
LAYERS = 60
SIZES = ((3, 20), (4, 50), (6, 50), (8, 60), (16, 60))  # unlike devices on two sites
LARGE = (200, 2000)  # devices of six kinds in ten sites, 60 layers


def command_s(command: list[str], repeats: int) -> dict[str, float]:
    """Wall seconds of a command."""
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return summary(seconds)


def planning(problems: list[Problem], again: list[Problem]) -> dict[str, Any]:
    """Seconds of all strategies with their simulations, and of ``hpp`` alone: wall and of the processor."""
    wall: list[float] = []
    cpu: list[float] = []
    alone: list[float] = []
    best: list[str] = []
    for task, other in zip(problems, again, strict=True):
        start, used = time.perf_counter(), time.process_time()
        found = [e for e in compare(task) if e.timeline is not None]
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        best.append(min(found, key=lambda e: e.timeline.step_time_s if e.timeline else 0.0).strategy)
        used = time.process_time()
        hpp(other)
        alone.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": summary(wall), "cpu_seconds": summary(cpu), "hpp_cpu_seconds": summary(alone),
        "best": best, "peak_bytes_so_far": peak,
    }  # fmt: skip


def times(short: bool) -> dict[str, dict[str, Any]]:
    """By devices x layers, small ones first, as the peak of memory is that so far."""
    repeats = 2 if short else 5
    out: dict[str, dict[str, Any]] = {}
    for devices, layers in SIZES[:1] if short else SIZES:
        tasks = [[unlike(devices, layers, seed) for seed in range(repeats)] for _ in range(2)]
        out[f"{devices} x {layers}"] = {"devices": devices, "layers": layers, **planning(*tasks)}
    for devices in () if short else LARGE:
        tasks = [[large(devices, LAYERS, seed) for seed in range(3)] for _ in range(2)]
        out[f"{devices} x {LAYERS}"] = {"devices": devices, "layers": LAYERS, **planning(*tasks)}
    return out


def main() -> None:
    args = options(__doc__ or "")
    repeats = 2 if args.short else 7
    spanwise = str(Path(sys.executable).with_name("spanwise"))
    with tempfile.TemporaryDirectory() as cache:
        plan = [spanwise, "plan", str(JOB), "--cache", cache]
        subprocess.run(plan, check=True, capture_output=True)
        result = {
            "import_spanwise_s": command_s([sys.executable, "-c", "import spanwise"], repeats),
            "python_alone_s": command_s([sys.executable, "-c", "pass"], repeats),
            "plan_on_cached_profile_s": command_s(plan, repeats),
            "compare": times(args.short),
        }
    keep(args, Path(__file__).parent, "planner", result)


if __name__ == "__main__":
    main()
