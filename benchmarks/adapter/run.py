"""A run that adapts: links and a device drift under way; how fast it is again, and what the parameters are.

One job runs on one cluster: undisturbed, disturbed without adapting, and disturbed with adapting. The link
between two sites drops to a quarter, comes back, then a device drops to 40 %. For each new condition a plan
is made that knows of it, and runs under it from the start: what a run that adapts is held against. In the lab
by `set_link` and `set_speed`; `--short` does the same on the portable emulation with faults.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import safetensors.torch
import torch
from arena import CLUSTERS, job_of
from chart import draw
from harness import keep, need_lab, options, redrawn, summary

from spanwise.api.in_lab import meet_in_lab, profile_in_lab
from spanwise.api.planning import choose
from spanwise.api.prepare import Prepared, prepare
from spanwise.api.run import Outcome, Quiet, TrainOptions, run_job
from spanwise.api.times import profile_prepared
from spanwise.core.cluster import Cluster
from spanwise.core.faults import Fault
from spanwise.core.job import Job
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.lab import Lab
from spanwise.lab.layout import changed_cluster
from spanwise.runtime.session import StepReport

HERE = Path(__file__).resolve().parent
SLOW_LINK, SLOW_DEVICE = 4.0, 2.5
ALIKE_STEPS = 3  # that must reach the aim before a run counts as fast again
AIM = 0.9
STEPS = 120  # of a run in the lab


@dataclass(frozen=True)
class Scene:
    """Where it plays: the cluster, the job, two sites with their rate, the device, steps between events."""

    cluster: Cluster
    job: Job
    sites: tuple[str, str]
    rate_bytes_per_s: float
    device: str
    phase: int

    @property
    def events(self) -> tuple[tuple[int, str], ...]:
        """From which step on what holds."""
        return ((self.phase, "link slow"), (2 * self.phase, "link back"), (3 * self.phase, "device slow"))

    def condition(self, name: str) -> tuple[float, float]:
        """(factor of the link, factor of the device)."""
        return (SLOW_LINK if name == "link slow" else 1.0, SLOW_DEVICE if name == "device slow" else 1.0)

    def faults(self) -> tuple[Fault, ...]:
        """The events for the portable emulation: factors multiply, so a link comes back by its inverse."""
        a, b = ([d.id for d in self.cluster.devices if d.site == site] for site in self.sites)
        pairs = [(x, y) for x in a for y in b] + [(y, x) for x in a for y in b]
        steps = {name: step for step, name in self.events}
        slowed = [(SLOW_LINK, steps["link slow"]), (1 / SLOW_LINK, steps["link back"])]
        links = [
            Fault(kind="slow", device=x, peer=y, factor=factor, step=step)
            for factor, step in slowed
            for x, y in pairs
        ]
        device = Fault(kind="slow", device=self.device, factor=SLOW_DEVICE, step=steps["device slow"])
        return (*links, device)

    def world(self, name: str, times: Profile) -> tuple[Cluster, Profile]:
        """Cluster and profile under a condition."""
        link, device = self.condition(name)
        cluster = changed_cluster(
            self.cluster, *self.sites, bandwidth_bytes_per_s=self.rate_bytes_per_s / link, latency_s=None
        )
        entries = tuple(
            e.model_copy(update={"factor": e.factor * device}) if e.device == self.device else e
            for e in times.devices
        )
        return cluster, times.model_copy(update={"devices": entries})


class Disturbing(Quiet):
    """Notes when steps end; with a lab, lets the events happen."""

    def __init__(self, change: Callable[[str], None] | None, events: Sequence[tuple[int, str]]) -> None:
        self.ends: list[float] = []
        self._change, self._events = change, dict(events)

    def on_step(self, report: StepReport, step_time_s: float, total_steps: int) -> None:  # noqa: ARG002
        """An event holds from the step after the one that has just ended."""
        self.ends.append(report.end)
        name = self._events.get(report.step + 1)
        if name is not None and self._change is not None:
            self._change(name)


def scene(short: bool) -> Scene:
    if short:
        cluster = Cluster.load(HERE / "short.toml")
        job = Job.parse(
            {
                "model": {"name": "spanwise.zoo:mlp", "sizes": [512, 256, 256, 8]},
                "data": {
                    "name": "spanwise.zoo.data:synthetic_vectors", "rows": 512, "features": 512, "classes": 8,
                },
                "batch": 32, "steps": 80, "dtype": "float64", "checkpoint_every": 0,
                "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
            }
        )  # fmt: skip
        return Scene(cluster, job, ("north", "south"), 2.5e6, "south-1", 20)
    cluster = Cluster.load(CLUSTERS / "spantrain-7-env1.toml")
    job = job_of("gpt", 32, steps=STEPS)
    # No epoch ends under way: collecting all parameters takes a second whatever the plan.
    data = job.data.model_copy(update={"args": {**job.data.args, "rows": job.batch * STEPS}})
    job = job.model_copy(update={"dtype": "float64", "data": data})
    return Scene(cluster, job, ("cloud", "edge"), 12.5e6, "cloud-1", STEPS // 4)


class Stage:
    """Carries runs out, in a lab or on the portable emulation."""

    def __init__(self, where: Scene, prepared: Prepared, lab: Lab | None, folder: Path) -> None:
        self.scene, self.prepared, self.lab, self.folder = where, prepared, lab, folder
        self.times = self._profile()

    def _profile(self) -> Profile:
        if self.lab is None:
            return profile_prepared(self.prepared, self.scene.cluster, None)
        pool = meet_in_lab(self.lab, self.scene.cluster.ids, 120.0, lambda _: None)
        try:
            return profile_in_lab(self.prepared, self.scene.cluster, self.lab, pool, None)
        finally:
            pool.close()

    def put(self, name: str) -> None:
        """Puts a condition in force in the lab."""
        assert self.lab is not None
        link, device = self.scene.condition(name)
        self.lab.set_link(*self.scene.sites, bandwidth=self.scene.rate_bytes_per_s / link)
        speed = self.scene.cluster.device(self.scene.device).speed
        self.lab.set_speed(self.scene.device, speed / device)

    def run(
        self, name: str, plan: Plan, *, disturbed: bool, adapt: bool = False, steps: int | None = None,
        faults: tuple[Fault, ...] = (),
    ) -> tuple[Outcome, list[float]]:  # fmt: skip
        """One run; its outcome and when its steps ended."""
        events = self.scene.events if disturbed else ()
        watcher = Disturbing(None if self.lab is None else self.put, events)
        job = self.scene.job if steps is None else self.scene.job.model_copy(update={"steps": steps})
        if disturbed and self.lab is None:
            faults = self.scene.faults()
        outcome = run_job(
            job, self.scene.cluster,
            TrainOptions(
                run=self.folder / name, plan=plan, times=self.times, watcher=watcher, lab=self.lab,
                prepared=prepare(job), adapt=adapt, faults=faults,
            ),
        )  # fmt: skip
        return outcome, watcher.ends

    def ideal_s(self, name: str) -> float:
        """Median step of a plan that was made for a condition, under that condition from the start."""
        cluster, times = self.scene.world(name, self.times)
        graph = self.prepared.traced.graph
        plan, _ = choose(self.scene.job, cluster, graph, times, "auto")
        if self.lab is not None:
            self.put(name)
        at_once = {f"{f.device}>{f.peer}": f for f in reversed(self.scene.faults())}
        link, device = self.scene.condition(name)
        faults = tuple(
            f.model_copy(update={"step": 0, "factor": device if f.peer is None else link})
            for f in at_once.values()
        )
        _, ends = self.run(
            f"ideal {name}", plan, disturbed=False, steps=self.scene.phase // 2,
            faults=faults if self.lab is None else (),
        )  # fmt: skip
        if self.lab is not None:
            self.put("as at first")
        return summary([b - a for a, b in pairwise(ends[1:])])["median"]


def recovery(ends: Sequence[float], event: int, until: int, ideal_s: float) -> dict[str, Any]:
    """Steps and seconds after an event until steps are within the aim; pauses for changing plans count."""
    for first in range(event, min(until, len(ends)) - ALIKE_STEPS + 1):
        seconds = (ends[first + ALIKE_STEPS - 1] - ends[first - 1]) / ALIKE_STEPS
        if ideal_s / seconds >= AIM:
            return {"steps": first - event, "seconds": ends[first - 1] - ends[event - 1]}
    return {"steps": None, "seconds": None}


def difference(a: Path, b: Path) -> float:
    """Largest difference of final parameters, relative to those above one."""
    first, second = (safetensors.torch.load_file(p / "weights.safetensors") for p in (a, b))
    return max(float(((first[k] - v).abs() / v.abs().clamp(min=1.0)).max()) for k, v in second.items())


def measure(stage: Stage) -> dict[str, Any]:
    where = stage.scene
    graph = stage.prepared.traced.graph
    plan, _ = choose(where.job, where.cluster, graph, stage.times, "auto")
    runs: dict[str, tuple[Outcome, list[float]]] = {}
    for name, disturbed, adapt in (
        ("undisturbed", False, False), ("fixed", True, False), ("adapting", True, True),
        ("adapting undisturbed", False, True),
    ):  # fmt: skip
        runs[name] = stage.run(name, plan, disturbed=disturbed, adapt=adapt)
        if stage.lab is not None:
            stage.put("as at first")
        print(f"{name}: {runs[name][1][-1] - runs[name][1][0]:.1f} s", flush=True)
    ideal: Mapping[str, float] = {name: stage.ideal_s(name) for _, name in where.events}
    stops = [step for step, _ in where.events[1:]] + [where.job.steps or 0]
    recovered = {
        run: {
            name: recovery(runs[run][1], step, stop, ideal[name])
            for (step, name), stop in zip(where.events, stops, strict=True)
        }
        for run in ("fixed", "adapting")
    }
    return {
        "cluster": where.cluster.name, "model": graph.name, "batch": where.job.batch,
        "events": [{"step": step, "name": name} for step, name in where.events],
        "lab": stage.lab is not None,
        "ideal_step_s": ideal,
        "step_ends_s": {name: [e - ends[0] for e in ends] for name, (_, ends) in runs.items()},
        "adaptations": runs["adapting"][0].summary["adaptations"],
        "recovered": recovered,
        "largest_difference_of_parameters": difference(
            stage.folder / "adapting", stage.folder / "undisturbed"
        ),
        "overhead_when_nothing_drifts": {
            name: summary([b - a for a, b in pairwise(runs[name][1][1:])])
            for name in ("undisturbed", "adapting undisturbed")
        },
    }  # fmt: skip


def main() -> None:
    args = options(__doc__ or "")
    if redrawn(args, HERE, "adapter", draw):
        return
    torch.set_num_threads(1)
    if not args.short:
        need_lab(args)
    where = scene(args.short)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lab = None if args.short else stack.enter_context(Lab(where.cluster))
        result = measure(Stage(where, prepare(where.job), lab, folder))
    keep(args, HERE, "adapter", result, draw=draw)


if __name__ == "__main__":
    main()
