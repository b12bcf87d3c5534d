"""A parameter server in the lab: every rule's segments, measured by turns, held against their prediction.

Cells are a model, a rate and a latency of the links between one server and four devices. The strategies of a
cell take turns in rounds, in another order each time, so slow drift of the machine meets all of them; ratios
are of medians of one round, and their median over the rounds counts. Strategies that make the same plan are
measured once and stand for each other. Then throughput over the number of devices, and accuracy.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    "mobilenet_v2": {"name": "spanwise.zoo:mobilenet_v2", "num_classes": 10},
    "vgg11": {"name": "spanwise.zoo:vgg11", "num_classes": 10},
    "alexnet": {"name": "spanwise.zoo:alexnet", "num_classes": 10, "stem": 11},
    "lenet5": {"name": "spanwise.zoo:lenet5", "channels": 3},
}
RATES_MBIT, LATENCIES_MS = (10.0, 50.0, 100.0), (1.0, 10.0)
DEVICES = 4
SCALING = (1, 2, 4, 8)
SCALED = ("sequential", "layer_by_layer", "ibatch", "dynacomm", "duplex")
SIMPLE = tuple(name for name in SERVER_STRATEGIES if name not in ("dynacomm", "duplex"))
ROUND_S = 40.0  # a strategy's turn: as many steps as fit, from one to three
SLACK, CLEAR = 0.03, 0.05  # dynacomm against the best simple rule; a gain of duplex that must show
# For the estimate: strategies of a cell with unlike plans, seconds until a cell steps, speed of a device.
GUESSED, SET_UP_S, FLOPS_PER_S = 6, 25.0, 5e9


def options() -> argparse.Namespace:
    found = parser(__doc__ or "")
    found.add_argument("--models", nargs="*", default=list(MODELS)[:3])
    found.add_argument("--rates", nargs="*", type=float, default=list(RATES_MBIT), help="Mbit/s")
    found.add_argument("--latencies", nargs="*", type=float, default=list(LATENCIES_MS), help="ms")
    found.add_argument("--scaling", nargs="*", type=int, default=list(SCALING), help="numbers of devices")
    found.add_argument("--rows", type=int, default=16, help="of the batch on every device")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--epochs", type=int, default=5)
    found.add_argument("--cache", type=Path, default=None, help="folder of profiles")
    args = found.parse_args()
    if args.short:
        args.models, args.rates, args.latencies, args.scaling = ["lenet5"], [10.0], [10.0], []
        args.rounds, args.epochs = 1, 1
    return args


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


def estimate_s(args: argparse.Namespace) -> float:
    """About how long all of it takes: a step is all bytes there, all bytes back, and compute."""
    total = 20.0 + 5.0 * args.epochs
    for model in args.models:
        graph = prepared_job(model, 8).traced.graph
        flops = args.rows * sum(layer.forward_flops + layer.backward_flops for layer in graph.layers)
        cells = [(DEVICES, rate, GUESSED) for rate in args.rates for _ in args.latencies]
        cells += [(count, 50.0, len(SCALED)) for count in args.scaling if model == args.models[0]]
        for devices, mbit, strategies in cells:
            step_s = (
                0.05 + flops / FLOPS_PER_S + 2 * graph.parameter_bytes * 8e-6 / min(mbit, 200.0 / devices)
            )
            total += SET_UP_S + strategies * args.rounds * (2 + _steps(step_s)) * step_s
    return total


def _steps(step_s: float) -> int:
    return max(1, min(3, int(ROUND_S / step_s) - 2))


def cell(
    arena: Arena, prepared: Prepared, times: Profile, strategies: Sequence[str], rounds: int
) -> dict[str, Any]:
    """All strategies on one cluster and model."""
    cluster, graph = arena.cluster, prepared.traced.graph
    plans = {name: choose(prepared.job, cluster, graph, times, name)[0] for name in strategies}
    expected = {name: predicted_s(prepared, plan, times, cluster) for name, plan in plans.items()}
    alike: dict[str, list[str]] = {}
    for name, plan in plans.items():
        alike.setdefault(shape(plan), []).append(name)
    groups = list(alike.values())
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in plans}
    for turn in range(rounds):
        for names in groups[turn % len(groups) :] + groups[: turn % len(groups)]:
            first = names[0]
            one = arena.attempt(prepared, plans[first], steps=_steps(expected[first]))
            for name in names:
                found[name].append(one.data())
            text = one.error[:160] if one.error else f"{middle(one.step_s):.3f} s"
            print(f"{cluster.name} {prepared.job.name}: {', '.join(names)}: {text}, "
                  f"predicted {expected[first]:.3f} s", flush=True)  # fmt: skip
    return {
        "cluster": cluster.name, "model": prepared.job.name, "devices": len(cluster.ids) - 1,
        "batch": prepared.job.batch, "predicted_s": expected,
        "plans": {name: _segments(plan) for name, plan in plans.items()}, "rounds": found,
    }  # fmt: skip


def _segments(plan: Plan) -> dict[str, Any]:
    (sync,) = plan.servers
    return {"pushes": sync.pushes, "pulls": sync.pulls, "order": sync.order,
            "as_aggregated": sync.as_aggregated}  # fmt: skip


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and the ratios that the benchmark is about: each of one round, then their median."""
    rounds = [
        {n: middle(r[i]["step_s"]) for n, r in found["rounds"].items() if r[i]["step_s"]}
        for i in range(len(next(iter(found["rounds"].values()))))
    ]
    expected = found["predicted_s"]
    simple = [name for name in SIMPLE if name in expected]
    whole = [one for one in rounds if one.keys() == expected.keys()]
    out: dict[str, Any] = {key: found[key] for key in ("cluster", "model", "devices", "batch")}
    if not whole:
        return {**out, "failed": sorted({n for one in rounds for n in expected if n not in one})}
    out["step_s"] = {name: middle([one[name] for one in whole]) for name in expected}
    out["of_predicted"] = {name: out["step_s"][name] / expected[name] for name in expected}
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
    """Seconds of a step of every strategy, and the two ratios, the second one with what was predicted."""
    names = list(SERVER_STRATEGIES)
    out = [f"| model | link | {' | '.join(names)} | dynacomm over best rule | duplex over dynacomm |"]
    out.append("|---" * (len(names) + 4) + "|")
    for row in rows:
        if "step_s" not in row:
            out.append(f"| {row['model']} | {links_of(row)} | failed: {', '.join(row['failed'])} |")
            continue
        seconds = " | ".join(f"{row['step_s'][name]:.3f}" for name in names)
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
    cells = [c for c in data["cells"] if "step_s" in c]
    models = list(dict.fromkeys(c["model"] for c in cells))
    looks = {"layer_by_layer": (GREY, "s"), "ibatch": ("#9db4c0", "^"), "dynacomm": (PLAIN, "o"),
             "duplex": (OURS, "o")}  # fmt: skip
    with canvas(path, (4.0 * len(models), 3.2), (1, len(models))) as axes:
        for axis, model in zip(axes, models, strict=True):
            mine = [c for c in cells if c["model"] == model]
            for name, (color, mark) in looks.items():
                measured = [c["step_s"][name] / c["step_s"]["sequential"] for c in mine]
                told = [
                    c["step_s"][name] / c["of_predicted"][name]
                    / (c["step_s"]["sequential"] / c["of_predicted"]["sequential"])
                    for c in mine
                ]  # fmt: skip
                axis.plot(range(len(mine)), measured, mark, color=color, label=name)
                axis.plot(range(len(mine)), told, mark, color=color, fillstyle="none")
            axis.axhline(1, color=GREY, zorder=0)
            axis.set_xticks(range(len(mine)), [links_of(c).replace(", ", "\n") for c in mine], fontsize=7)
            axis.set_ylim(bottom=0)
            axis.set_title(model, loc="left", fontsize=10)
        axes[0].set_ylabel("step over that of sequential")
        axes[0].legend(frameon=False, fontsize=8)


def measure(args: argparse.Namespace, kept: Cells) -> None:
    """What is not among the cells yet: one lab for every number of devices, rate and latency."""
    wanted = [(DEVICES, rate, latency, model, tuple(SERVER_STRATEGIES))
              for rate in args.rates for latency in args.latencies for model in args.models]  # fmt: skip
    wanted += [(count, 50.0, 10.0, args.models[0], SCALED) for count in args.scaling]
    done = {(c["cluster"], c["model"], tuple(c["predicted_s"])) for c in kept.found if "cluster" in c}
    known: dict[tuple[int, str], Profile] = {}
    for links in dict.fromkeys(entry[:3] for entry in wanted):
        cluster = star(*links)
        todo = [e[3:] for e in wanted if e[:3] == links and (cluster.name, *e[3:]) not in done]
        if not todo:
            continue
        with Arena(cluster, []) as arena:
            for model, strategies in todo:
                prepared = prepared_job(model, args.rows * links[0])
                key = links[0], model  # times do not depend on links
                if key not in known:
                    known[key] = arena.profile(prepared, args.cache)
                kept.add(cell(arena, prepared, known[key], strategies, args.rounds))


def main() -> None:
    args = options()
    if redrawn(args, HERE, "lab", draw):
        return
    need_lab(args)
    print(f"about {estimate_s(args) / 60:.0f} minutes", flush=True)
    began, kept = time.monotonic(), Cells(args)
    if not any("curves" in c for c in kept.found):
        kept.add(accuracy(star(DEVICES, 50.0, 10.0), args.epochs))
    measure(args, kept)
    curves = next(c for c in kept.found if "curves" in c)
    cells = [c for c in kept.found if "cluster" in c]
    summaries = [summary(c) for c in cells if len(c["predicted_s"]) == len(SERVER_STRATEGIES)]
    scaling = speed_ups([c for c in cells if len(c["predicted_s"]) == len(SCALED)])
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
