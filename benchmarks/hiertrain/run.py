"""HierTrain in the lab, by the bandwidth to the cloud: against one machine, one cut, one helper.

A cell is one model and bandwidth. All strategies get the same profile and their plans run by turns in one
lab, so that only the plan differs; plans that come out the same run once. Lines of the picture are
simulations.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arena import CLUSTERS, Arena, Measurement, job_of, predicted_s, shape
from harness import Cells, cache_of, keep, need_lab, parser
from measured import middle
from speedups import CLOUD, NAMES, SUBJECT, tables
from speedups import main as show

from spanwise.api.prepare import Prepared, prepare
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.lab.layout import changed_cluster
from spanwise.planner import Problem, make_plan

HERE = Path(__file__).resolve().parent
SITES = ("local", "datacenter")
MBITS = (5.0, 10.0, 20.0, 50.0, 100.0)
SWEEP = (5.0, 7.0, 10.0, 14.0, 20.0, 30.0, 50.0, 70.0, 100.0)  # simulated only
LONG_S = 6.0  # longer steps are timed once, without a step of warm-up
ENOUGH_S = 3.0  # of steps in a turn, if they are not longer
MOST_STEPS = 20
SETUP_S, SETUP_BYTES_PER_S = 1.5, 25e6  # of a turn: weights go to the devices
PROFILE_S = 60.0  # of a model: layer times, its pace under the quotas, and the sweep


@dataclass(frozen=True)
class Setting:
    """A model and the batch with which a step takes a few seconds on the machines that matter.

    ``least_gib``: what every device must have for it; the file's memory is synthetic.
    """

    batch: int
    shape: tuple[int, int, int] = (3, 32, 32)
    least_gib: int = 0

    def prepared(self, model: str) -> Prepared:
        """The traced model with its data: four batches of images."""
        tables_of = {
            "model": {"name": f"spanwise.zoo:{model}", "num_classes": 10},
            "data": {
                "name": "spanwise.zoo.data:synthetic_images", "rows": 4 * self.batch, "test_rows": 10,
                "classes": 10, "shape": self.shape,
            },
            "loss": "cross_entropy",
        }  # fmt: skip
        return prepare(job_of(model, self.batch, tables=tables_of))


SETTINGS = {
    "lenet5": Setting(512, (1, 32, 32)),
    "alexnet": Setting(64),
    "mobilenet_v2": Setting(32),
    "alexnet_224": Setting(16, (3, 224, 224), least_gib=4),
}
MODELS = ("lenet5", "alexnet", "mobilenet_v2")  # unless told otherwise


@dataclass(frozen=True)
class Case:
    """The plans of all strategies at one bandwidth, with simulated steps, and why some have none."""

    mbit_per_s: float
    plans: dict[str, Plan]
    expected: dict[str, float]
    without: dict[str, str]

    @property
    def first(self) -> dict[str, str]:
        """Who stands for equal plans, by their shape."""
        return {shape(plan): name for name, plan in reversed(self.plans.items())}


def options() -> argparse.Namespace:
    found = parser(__doc__ or "")
    found.add_argument("--models", nargs="*", choices=list(SETTINGS), default=list(MODELS))
    found.add_argument("--mbits", nargs="*", type=float, default=list(MBITS), help="to the cloud, Mbit/s")
    found.add_argument("--strategies", nargs="*", choices=NAMES, default=list(NAMES))
    found.add_argument("--rounds", type=int, default=2)
    found.add_argument("--cache", type=Path, default=None, help="folder of profiles")
    args = found.parse_args()
    args.sweep = list(SWEEP)
    if args.short:
        args.models, args.mbits, args.rounds, args.sweep = ["lenet5"], [MBITS[0]], 1, [SWEEP[0], SWEEP[-1]]
        args.strategies = [SUBJECT, CLOUD, "two_tier"]
    return args


def cluster_for(models: Sequence[str]) -> Cluster:
    """The cluster, with as much memory as these models need."""
    cluster = Cluster.load(CLUSTERS / "hiertrain-3.toml")
    least = max((SETTINGS[model].least_gib for model in models), default=0) * 2**30
    devices = tuple(
        d.model_copy(update={"memory_bytes": max(d.memory_bytes, least)}) for d in cluster.devices
    )
    return cluster.model_copy(update={"devices": devices})


def at_rate(cluster: Cluster, mbit_per_s: float) -> Cluster:
    """The cluster with that link between the local site and the cloud, both ways; its latency stays."""
    return changed_cluster(
        cluster, *SITES, bandwidth_bytes_per_s=mbit_per_s * 1e6 / 8, latency_s=None
    )  # fmt: skip


def planned(
    prepared: Prepared, times: Profile, cluster: Cluster, mbit_per_s: float, strategies: Sequence[str]
) -> Case:
    """Strategies at one bandwidth."""
    there = at_rate(cluster, mbit_per_s)
    problem = Problem(graph=prepared.traced.graph, profile=times, cluster=there, job=prepared.job)
    plans: dict[str, Plan] = {}
    without: dict[str, str] = {}
    for name in strategies:
        try:
            plans[name] = make_plan(problem, name)
        except InfeasibleError as error:
            without[name] = str(error)
    expected = {name: predicted_s(prepared, plan, times, there) for name, plan in plans.items()}
    return Case(mbit_per_s, plans, expected, without)


def turn(expected_s: float) -> tuple[int, int]:
    """Timed steps of one turn, and steps of warm-up. One more runs, from whose end the first one counts."""
    if expected_s > LONG_S:
        return 1, 0
    return max(1, min(MOST_STEPS, round(ENOUGH_S / expected_s) - 2)), 1


def turns(case: Case, rounds: int) -> Iterator[tuple[str, int, int]]:
    """Whose plan runs how long, in order: name, timed steps, steps of warm-up."""
    for number in range(rounds):
        for name in case.first.values():
            steps, warmup = turn(case.expected[name])
            if number == 0 or warmup:  # what takes long is settled after the first round
                yield name, steps, warmup


def seconds_of(cases: Sequence[Case], rounds: int, parameter_bytes: int) -> float:
    """About how long the cells will take."""
    setup_s = SETUP_S + parameter_bytes / SETUP_BYTES_PER_S
    return sum(
        setup_s + (steps + warmup + 1) * case.expected[name]
        for case in cases
        for name, steps, warmup in turns(case, rounds)
    )


def cell(arena: Arena, model: str, prepared: Prepared, case: Case, rounds: int) -> dict[str, Any]:
    """Every strategy's plan, simulated and measured, at one bandwidth."""
    arena.lab.set_link(*SITES, bandwidth=case.mbit_per_s * 1e6 / 8)
    runs: dict[str, list[Measurement]] = {name: [] for name in case.first.values()}
    for name, steps, warmup in turns(case, rounds):
        runs[name].append(arena.attempt(prepared, case.plans[name], steps=steps, warmup=warmup))
        one = runs[name][-1]
        text = one.error[:160] or f"{middle(one.step_s):.3f} s, predicted {case.expected[name]:.3f} s"
        print(f"{model}, {case.mbit_per_s:g} Mbit/s: {name}: {text}", flush=True)
    return {
        "model": model, "batch": prepared.job.batch, "mbit_per_s": case.mbit_per_s, "without": case.without,
        "plans": {n: {"predicted_s": case.expected[n], "same_as": case.first[shape(p)], "plan": p.to_data()}
                  for n, p in case.plans.items()},
        "rounds": {name: [one.data() for one in found] for name, found in runs.items()},
    }  # fmt: skip


def measure(arena: Arena, model: str, mbits: Sequence[float], kept: Cells, args: argparse.Namespace) -> None:
    """The cells of a model that are still to be done, and its sweep, which is simulated only."""
    prepared = SETTINGS[model].prepared(model)
    arena.lab.set_link(*SITES, bandwidth=max(args.mbits) * 1e6 / 8)
    times = arena.profile(prepared, cache_of(args))
    began = time.monotonic()

    def cases(rates: Sequence[float]) -> list[Case]:
        return [planned(prepared, times, arena.cluster, rate, args.strategies) for rate in rates]

    todo = cases(mbits)
    left_s = seconds_of(todo, args.rounds, prepared.traced.graph.parameter_bytes)
    if not any(found.get("sweep_of") == model for found in kept.found):
        points = [
            {"model": model, "mbit_per_s": case.mbit_per_s, "predicted_s": case.expected}
            for case in cases(args.sweep)
        ]
        kept.add({"sweep_of": model, "points": points})
    print(
        f"{model}: planned and simulated in {time.monotonic() - began:.0f} s; cells left: {len(todo)}, about "
        f"{left_s / 60:.1f} min",
        flush=True,
    )
    for case in todo:
        kept.add(cell(arena, model, prepared, case, args.rounds))


def main() -> None:
    args = options()
    if args.redraw:
        show()
        return
    need_lab(args)
    kept = Cells(args)
    done = {(c["model"], c["mbit_per_s"]) for c in kept.found if "plans" in c}
    todo = {m: [x for x in args.mbits if (m, x) not in done] for m in args.models}
    todo = {model: mbits for model, mbits in todo.items() if mbits}
    left = sum(map(len, todo.values()))
    about_s = len(todo) * PROFILE_S + left * args.rounds * len(args.strategies) * (SETUP_S + ENOUGH_S)
    print(f"cells to measure: {left}; about {about_s / 60:.0f} min, more if steps are long", flush=True)
    if todo:
        with Arena(cluster_for(list(todo)), []) as arena:
            for model, mbits in todo.items():
                measure(arena, model, mbits, kept, args)
    data = {
        "cells": [c for c in kept.found if "plans" in c],
        "sweep": [point for c in kept.found if "sweep_of" in c for point in c["points"]],
    }
    if args.short or args.out is not None:
        print("\n".join(tables(data)))
    keep(args, HERE, "hiertrain", data, quiet=True)
    if not args.short and args.out is None:
        show()


if __name__ == "__main__":
    main()
