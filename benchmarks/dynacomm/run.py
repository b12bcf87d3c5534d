"""A parameter server in the lab: the rules' segments, measured by turns, held against their prediction.

Cells are a model, a rate and a latency of the links between one server and four devices. Every rule is
planned and simulated; measured are ``sequential``, the simpler rules that the simulator holds to be the best,
``dynacomm`` and ``duplex``. These take turns in rounds, in another order each time, so slow drift of the
machine meets all of them; ratios are of medians of one round, and their median over the rounds counts.
Strategies that make the same plan are measured once and stand for each other. Then throughput over the number
of devices, and accuracy.

Models are narrow, so that a step over 10 Mbit/s takes seconds: bytes and compute both fall with the square of
the width, and the ratio of the two, which decides what overlaps, stays about that of the whole model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import accuracy
from arena import CLUSTERS, Arena, middle, predicted_s, shape
from harness import Cells, keep, need_lab, parser, redrawn
from pictures import GREY, OURS, PLAIN, canvas

from spanwise.api.planning import choose
from spanwise.api.prepare import Prepared, prepare
from spanwise.core.cluster import Cluster
from spanwise.core.job import Job
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.planner import SERVER_STRATEGIES

HERE = Path(__file__).resolve().parent
MODELS: dict[str, dict[str, Any]] = {
    "mobilenet_v2-half": {"name": "spanwise.zoo:mobilenet_v2", "num_classes": 10, "width": 0.5},
    "vgg11-quarter": {"name": "spanwise.zoo:vgg11", "num_classes": 10, "width": 0.25},
    "alexnet-half": {"name": "spanwise.zoo:alexnet", "num_classes": 10, "stem": 11, "width": 0.5},
    "mobilenet_v2": {"name": "spanwise.zoo:mobilenet_v2", "num_classes": 10},
    "vgg11": {"name": "spanwise.zoo:vgg11", "num_classes": 10},
    "alexnet": {"name": "spanwise.zoo:alexnet", "num_classes": 10, "stem": 11},
    "lenet5": {"name": "spanwise.zoo:lenet5", "channels": 3},
}
RATES_MBIT, LATENCIES_MS = (100.0, 50.0, 10.0), (10.0, 1.0)
DEVICES = 4
SCALING, SCALING_MBIT, SCALING_MS = (4, 1, 2, 8), 50.0, 10.0
SCALED = ("sequential", "layer_by_layer", "ibatch", "dynacomm", "duplex")
REFERENCE, SUBJECTS = "sequential", ("dynacomm", "duplex")
SIMPLE = tuple(name for name in SERVER_STRATEGIES if name not in SUBJECTS)
STEPS = 2  # measured in a turn; one runs before them, as parameters are everywhere when a turn begins
SLACK, CLEAR = 0.03, 0.05  # dynacomm against the best simple rule; a gain of duplex that must show
# For the estimate: unlike plans of a cell and their step over that of one message each way, seconds of a turn
# beside its steps, of planning a cell, until a lab stands, of a model's profile, speed of a device.
GUESSED, SHORTER, TURN_S, PLANNING_S, LAB_S, PROFILE_S, FLOPS_PER_S = 4.0, 0.85, 2.0, 6.0, 15.0, 25.0, 5e9


class Wanted(NamedTuple):
    """One cell to measure: of the ``grid`` of links, or of the ``scaling`` over devices."""

    part: str
    devices: int
    mbit: float
    latency_ms: float
    model: str


def options() -> argparse.Namespace:
    found = parser(__doc__ or "")
    found.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS)[:3])
    found.add_argument("--rates", nargs="*", type=float, default=list(RATES_MBIT), help="Mbit/s")
    found.add_argument("--latencies", nargs="*", type=float, default=list(LATENCIES_MS), help="ms")
    found.add_argument("--scaling", nargs="*", type=int, default=list(SCALING), help="numbers of devices")
    found.add_argument("--rows", type=int, default=8, help="of the batch on every device")
    found.add_argument("--rounds", type=int, default=3, help=f"turns of every strategy, of {STEPS} steps")
    found.add_argument("--simple", type=int, default=2, help="simpler rules measured, the best as simulated")
    found.add_argument("--epochs", type=int, default=3)
    found.add_argument("--cache", type=Path, default=None, help="folder of profiles")
    args = found.parse_args()
    if args.short:
        args.models, args.rates, args.latencies, args.scaling = ["lenet5"], [10.0], [10.0], []
        args.rounds, args.epochs = 1, 1
    return args


def wanted(args: argparse.Namespace) -> list[Wanted]:
    """All cells in order: every model and rate once, then the scaling, then the other latencies."""

    def grid(latencies: Sequence[float]) -> list[Wanted]:
        return [
            Wanted("grid", DEVICES, rate, latency, model)
            for latency in latencies
            for rate in args.rates
            for model in args.models
        ]

    scaling = [
        Wanted("scaling", count, SCALING_MBIT, SCALING_MS, model)
        for count in args.scaling
        for model in args.models[:1]
    ]
    return [*grid(args.latencies[:1]), *scaling, *grid(args.latencies[1:])]


def star(devices: int, mbit: float, latency_ms: float) -> Cluster:
    """``clusters/dynacomm-5.toml`` with so many devices and such links to the server."""
    data = Cluster.load(CLUSTERS / "dynacomm-5.toml").to_data()
    server, worker = data["devices"][:2]
    names = [f"worker-{i + 1}" for i in range(devices)]
    inside = next(link for link in data["links"] if link["source"] == link["target"])
    links = [
        {"between": ["server", name], "bandwidth": f"{mbit:g} Mbit/s", "latency": f"{latency_ms:g} ms"}
        for name in names
    ]
    return Cluster.parse(
        {
            **data, "name": f"star-{devices}-{mbit:g}-{latency_ms:g}", "data": names,
            "devices": [server, *({**worker, "id": name} for name in names)], "links": [*links, inside],
        }
    )  # fmt: skip


def prepared_job(model: str, batch: int) -> Prepared:
    """The traced model with generated images, which stay where they are, equally many on each device."""
    data = {"name": "spanwise.zoo.data:synthetic_images", "rows": 512, "shape": [3, 32, 32], "classes": 10}
    return prepare(
        Job.parse(
            {
                "name": model, "model": MODELS[model], "data": data, "batch": batch, "steps": 4,
                "checkpoint_every": 0, "optimizer": {"name": "SGD", "lr": 0.01, "momentum": 0.9},
                "transfer_timeout_s": 300.0, "private": True,
            }
        )
    )  # fmt: skip


def estimate_s(args: argparse.Namespace, todo: Sequence[Wanted]) -> float:
    """About how long these cells take: a step is all bytes there, all bytes back, and compute."""
    graphs = {model: prepared_job(model, 8).traced.graph for model in {cell.model for cell in todo}}
    total = LAB_S * len(list(groupby(todo, key=lambda cell: cell.devices)))
    total += PROFILE_S * len({(cell.devices, cell.model) for cell in todo})
    for cell in todo:
        graph = graphs[cell.model]
        flops = args.rows * sum(layer.forward_flops + layer.backward_flops for layer in graph.layers)
        rate = min(cell.mbit, 200.0 / cell.devices)
        step_s = 0.05 + flops / FLOPS_PER_S + 2 * graph.parameter_bytes * 8e-6 / rate
        turn_s = TURN_S + (STEPS + 1) * SHORTER * step_s
        total += PLANNING_S + GUESSED * args.rounds * turn_s
    return total


def contestants(part: str, expected: dict[str, float], simple: int) -> tuple[str, ...]:
    """Who is measured: the reference, the simpler rules with the shortest simulated steps, the subjects."""
    if part == "scaling":
        return tuple(expected)
    best = sorted((name for name in SIMPLE if name != REFERENCE), key=lambda name: expected[name])[:simple]
    return (REFERENCE, *(name for name in SIMPLE if name in best), *SUBJECTS)


def cell(
    arena: Arena, what: Wanted, prepared: Prepared, times: Profile, args: argparse.Namespace
) -> dict[str, Any]:
    """The strategies on one cluster and model, which the lab's links are set to."""
    cluster, graph = star(what.devices, what.mbit, what.latency_ms), prepared.traced.graph
    for device in cluster.ids[1:]:
        arena.lab.set_link("server", device, bandwidth=what.mbit * 1e6 / 8, latency=what.latency_ms * 1e-3)
    names = tuple(SERVER_STRATEGIES) if what.part == "grid" else SCALED
    plans = {name: choose(prepared.job, cluster, graph, times, name)[0] for name in names}
    expected = {name: predicted_s(prepared, plan, times, cluster) for name, plan in plans.items()}
    measured = contestants(what.part, expected, args.simple)
    alike: dict[str, list[str]] = {}
    for name in measured:
        alike.setdefault(shape(plans[name]), []).append(name)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in measured}
    for group in turns(list(alike.values()), args.rounds):
        one = arena.attempt(prepared, plans[group[0]], steps=STEPS, warmup=0)
        for name in group:
            found[name].append(one.data())
        text = one.error[:160] if one.error else f"{middle(one.step_s):.3f} s"
        print(f"{cluster.name} {what.model}: {', '.join(group)}: {text}, "
              f"predicted {expected[group[0]]:.3f} s", flush=True)  # fmt: skip
    return {
        "part": what.part, "cluster": cluster.name, "model": what.model, "devices": what.devices,
        "batch": prepared.job.batch, "predicted_s": expected,
        "plans": {name: _segments(plan) for name, plan in plans.items()}, "rounds": found,
    }  # fmt: skip


def turns(groups: list[list[str]], rounds: int) -> Iterator[list[str]]:
    """Every group once a round, each round begun by another."""
    for number in range(rounds):
        first = number % len(groups)
        yield from groups[first:] + groups[:first]


def _segments(plan: Plan) -> dict[str, Any]:
    (sync,) = plan.servers
    return {"pushes": sync.pushes, "pulls": sync.pulls, "order": sync.order,
            "as_aggregated": sync.as_aggregated}  # fmt: skip


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and the ratios that the benchmark is about: each of one round, then their median."""
    names = list(found["rounds"])
    rounds = [
        {n: middle(r[i]["step_s"]) for n, r in found["rounds"].items() if r[i]["step_s"]}
        for i in range(len(found["rounds"][names[0]]))
    ]
    expected = found["predicted_s"]
    simple = [name for name in SIMPLE if name in names]
    whole = [one for one in rounds if len(one) == len(names)]
    out: dict[str, Any] = {key: found[key] for key in ("cluster", "model", "devices", "batch")}
    out["predicted_s"] = expected
    if not whole:
        return {**out, "failed": sorted({n for one in rounds for n in names if n not in one})}
    out["step_s"] = {name: middle([one[name] for one in whole]) for name in names}
    out["of_predicted"] = {name: out["step_s"][name] / expected[name] for name in names}
    best = [min(one[name] for name in simple) for one in whole]
    out["dynacomm_over_best_simple"] = middle(
        [one["dynacomm"] / least for one, least in zip(whole, best, strict=True)]
    )
    out["duplex_over_dynacomm"] = middle([one["duplex"] / one["dynacomm"] for one in whole])
    out["duplex_over_dynacomm_predicted"] = expected["duplex"] / expected["dynacomm"]
    out["dynacomm_holds"] = out["dynacomm_over_best_simple"] <= 1 + SLACK
    promised = out["duplex_over_dynacomm_predicted"] < 1 - CLEAR
    out["duplex_holds"] = out["duplex_over_dynacomm"] < 1 if promised else None
    return out


def links_of(row: dict[str, Any]) -> str:
    """As its cluster is named."""
    return "{} Mbit/s, {} ms".format(*row["cluster"].split("-")[2:])


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Seconds of a step of every strategy, and the two ratios, the second one with what was predicted.

    In brackets: simulated, not measured.
    """
    names = list(SERVER_STRATEGIES)
    out = [f"| model | link | {' | '.join(names)} | dynacomm over best rule | duplex over dynacomm |"]
    out.append("|---" * (len(names) + 4) + "|")
    for row in rows:
        if "step_s" not in row:
            out.append(f"| {row['model']} | {links_of(row)} | failed: {', '.join(row['failed'])} |")
            continue
        seconds = " | ".join(
            f"{row['step_s'][name]:.3f}" if name in row["step_s"] else f"({row['predicted_s'][name]:.3f})"
            for name in names
        )
        broken = "".join(" **not held**" for key in ("dynacomm_holds", "duplex_holds") if row[key] is False)
        out.append(
            f"| {row['model']} | {links_of(row)} | {seconds} | {row['dynacomm_over_best_simple']:.3f} "
            f"| {row['duplex_over_dynacomm']:.3f} ({row['duplex_over_dynacomm_predicted']:.3f}){broken} |"
        )
    return out


def speed_ups(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples per second by number of devices, over those of the same strategy with one."""
    rows: list[dict[str, Any]] = []
    for found in sorted(cells, key=lambda c: c["devices"]):
        steps = {n: [s for one in r for s in one["step_s"]] for n, r in found["rounds"].items()}
        rates = {n: found["batch"] / middle(values) for n, values in steps.items() if values}
        first = rows[0]["samples_per_s"] if rows else rates
        over = {n: rate / first[n] for n, rate in rates.items() if n in first}
        rows.append({"devices": found["devices"], "samples_per_s": rates, "over_first": over})
    return rows


def draw(data: dict[str, Any], path: Path) -> None:
    """Measured steps over those of one message each way, by model; hollow: predicted."""
    cells = sorted((c for c in data["cells"] if "step_s" in c), key=links_of)
    models = list(dict.fromkeys(c["model"] for c in data["cells"] if "step_s" in c))
    looks = {"best simpler rule": (GREY, "s"), "dynacomm": (PLAIN, "o"), "duplex": (OURS, "o")}
    with canvas(path, (4.0 * len(models), 3.2), (1, len(models))) as axes:
        for axis, model in zip(axes, models, strict=True):
            mine = [c for c in cells if c["model"] == model]
            for label, (color, mark) in looks.items():
                names = (label,) if label in SUBJECTS else SIMPLE
                for key, fill in (("step_s", "full"), ("predicted_s", "none")):
                    values = [
                        min(c[key][name] for name in names if name in c["step_s"]) / c[key][REFERENCE]
                        for c in mine
                    ]
                    axis.plot(range(len(mine)), values, mark, color=color, fillstyle=fill,
                              label=label if fill == "full" else None)  # fmt: skip
            axis.axhline(1, color=GREY, zorder=0)
            axis.set_xticks(range(len(mine)), [links_of(c).replace(", ", "\n") for c in mine], fontsize=7)
            axis.set_ylim(bottom=0)
            axis.set_title(model, loc="left", fontsize=10)
        axes[0].set_ylabel("step over that of sequential")
        axes[0].legend(frameon=False, fontsize=8)


def measure(args: argparse.Namespace, todo: Sequence[Wanted], kept: Cells) -> None:
    """Cells in order, in one lab as long as the devices stay the same; a model is profiled once for them."""
    known: dict[tuple[int, str], Profile] = {}
    for devices, cells in groupby(todo, key=lambda cell: cell.devices):
        with Arena(star(devices, max(args.rates), min(args.latencies)), []) as arena:
            for what in cells:
                prepared = prepared_job(what.model, args.rows * devices)
                key = devices, what.model  # times do not depend on links
                if key not in known:
                    known[key] = arena.profile(prepared, args.cache)
                kept.add(cell(arena, what, prepared, known[key], args))


def main() -> None:
    args = options()
    if redrawn(args, HERE, "lab", draw):
        return
    need_lab(args)
    began, kept = time.monotonic(), Cells(args)
    done = {(c["part"], c["cluster"], c["model"]) for c in kept.found if "part" in c}
    todo = [w for w in wanted(args) if (w.part, star(*w[1:4]).name, w.model) not in done]
    curves_s = 0.0 if any("curves" in c for c in kept.found) else 12.0 * args.epochs
    print(f"about {(curves_s + estimate_s(args, todo)) / 60:.0f} minutes, {len(todo)} cells", flush=True)
    first = sum(w.part == "scaling" or w.latency_ms == args.latencies[0] for w in todo)
    measure(args, todo[:first], kept)
    if curves_s:
        kept.add(accuracy(star(DEVICES, 50.0, 10.0), args.epochs))
    measure(args, todo[first:], kept)
    curves = next(c for c in kept.found if "curves" in c)
    cells = [c for c in kept.found if "part" in c]
    summaries = [summary(c) for c in cells if c["part"] == "grid"]
    scaling = speed_ups([c for c in cells if c["part"] == "scaling"])
    print("\n".join(table(summaries)))
    for row in scaling:
        told = (f"{n} {rate:.1f} ({row['over_first'][n]:.2f}x)" for n, rate in row["samples_per_s"].items())
        print(f"{row['devices']} devices, samples/s: {', '.join(told)}")
    same = [name for name, found in curves["same_bits"].items() if found]
    print(f"accuracy and parameters as on one device, bit for bit: {', '.join(same)}")
    result = {
        "seconds": time.monotonic() - began, "cells": summaries, "scaling": scaling, "accuracy": curves,
        "raw": cells,
    }  # fmt: skip
    keep(args, HERE, "lab", result, quiet=True, draw=draw)


if __name__ == "__main__":
    main()
