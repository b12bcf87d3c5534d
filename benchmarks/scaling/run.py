"""Throughput over the number of devices: `auto`, `pipeline` and PyTorch DDP on SpanTrain's scaling series.

Each cluster file of the series (2, 4, 8, 12, 16 devices) becomes a lab; the cores here hold all of them. The
largest comes first: its layer times are those of all, as their devices are of the same kinds.
Efficiency is throughput over what the devices would do if compute were all, by the best rate of a core
without a quota.
Beyond that the largest cluster two and four times over is simulated, with `data_parallel` in place of DDP.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arena import CLUSTERS, Arena, predicted_s, prepared_job, step_s
from harness import Cells, cache_of, keep, need_lab, parser, redrawn
from losses import least_row_s, losses
from pictures import OURS, PLAIN, canvas

from spanwise.api.planning import choose
from spanwise.api.prepare import Prepared
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile

HERE = Path(__file__).resolve().parent
SIZES = (2, 4, 8, 12, 16)
STRATEGIES = ("auto", "pipeline")
MODELS = ("mobilenet_v2", "vit")
BEYOND = (2, 4)  # times the largest cluster, by simulation
SIMULATED = (*STRATEGIES, "data_parallel")
LONG_S = 8.0


def options() -> argparse.Namespace:
    found = parser(__doc__ or "")
    found.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    found.add_argument("--models", nargs="*", default=list(MODELS))
    found.add_argument("--batch", type=int, default=128)
    found.add_argument("--rounds", type=int, default=2)
    found.add_argument(
        "--simulate",
        type=Path,
        default=None,
        help="no lab: predict anew from the layer times of this raw file",
    )
    found.add_argument("--cache", type=Path, default=None, help="folder of profiles")
    args = found.parse_args()
    if args.short:
        args.sizes, args.models, args.rounds, args.batch = list(SIZES[:1]), ["gpt"], 1, 16
    return args


def cell(arena: Arena, model: str, args: argparse.Namespace, kept: Cells) -> dict[str, Any]:
    """One number of devices: spanwise and DDP by turns, and the fastest device alone."""
    cluster = arena.cluster
    prepared = prepared_job(model, args.batch)
    times = profile(arena, prepared, model, args, kept)
    graph = prepared.traced.graph
    plans = {s: choose(prepared.job, cluster, graph, times, s)[0] for s in STRATEGIES}
    expected = {s: predicted_s(prepared, plan, times, cluster) for s, plan in plans.items()}
    fastest = max(cluster.devices, key=lambda d: d.speed).id
    peers = {"ddp": ("ddp", list(cluster.ids)), "single": ("single", [fastest])}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in (*plans, *peers)}
    for turn in range(args.rounds):
        for name, plan in plans.items():
            rounds[name].append(arena.attempt(prepared, plan, steps=4).data())
        for name, (peer, ranks) in peers.items():
            if turn and _step_s(rounds[name]) > LONG_S:
                continue  # slow and settled
            one = arena.peer(peer, ranks, model, args.batch, steps=2)
            rounds[name].append(one.data())
    for name in rounds:
        predicted = f", predicted {expected[name]:.3f} s" if name in expected else ""
        print(f"{cluster.name} {model}: {name}: {_step_s(rounds[name]):.3f} s{predicted}", flush=True)
    return {
        "cluster": cluster.name, "devices": len(cluster.ids), "model": model, "batch": args.batch,
        "cores": sum(d.speed for d in cluster.devices) * cluster.core_share,
        "single_cores": max(d.speed for d in cluster.devices) * cluster.core_share,
        "predicted_s": expected, "plans": {n: p.to_data() for n, p in plans.items()}, "rounds": rounds,
    }  # fmt: skip


def profile(arena: Arena, prepared: Prepared, model: str, args: argparse.Namespace, kept: Cells) -> Profile:
    """Of this lab, or of a larger one that was measured before."""
    before = profiled(model, kept.found)
    if before is None:
        times = arena.profile(prepared, cache_of(args))
        kept.add({"profiled": model, "cluster": arena.cluster.name, "profile": times.to_data()})
        return times
    return fitted(arena.cluster, *before)


def profiled(model: str, cells: list[dict[str, Any]]) -> tuple[Cluster, Profile] | None:
    """The cluster whose layer times are kept, and these."""
    found = next((c for c in cells if c.get("profiled") == model), None)
    if found is None:
        return None
    return Cluster.load(CLUSTERS / f"{found['cluster']}.toml"), Profile.parse(found["profile"])


def fitted(cluster: Cluster, there: Cluster, times: Profile) -> Profile:
    """Times measured ``there`` for another cluster of the series: devices of a speed take the same."""
    known = {entry.device: entry for entry in times.devices}
    by_speed = {device.speed: known[device.id] for device in there.devices}
    devices = tuple(by_speed[d.speed].model_copy(update={"device": d.id}) for d in cluster.devices)
    return times.model_copy(update={"devices": devices, "links": ()})


def larger(cluster: Cluster, times: Profile, copies: int) -> tuple[Cluster, Profile]:
    """Every device so many times, in its site, as fast as the first."""
    data = cluster.to_data()
    devices = [
        {**d, "id": f"{d['id']}-{n}" if n else d["id"]} for n in range(copies) for d in data["devices"]
    ]
    more = Cluster.parse({**data, "name": f"{cluster.name}-x{copies}", "devices": devices})
    entries = tuple(
        entry.model_copy(update={"device": f"{entry.device}-{n}" if n else entry.device})
        for n in range(copies)
        for entry in times.devices
    )
    return more, times.model_copy(update={"devices": entries})


def predictions(model: str, args: argparse.Namespace, kept: Cells) -> list[dict[str, Any]]:
    """Predicted seconds of a step on every cluster of the series, and on the largest several times over."""
    found = profiled(model, kept.found)
    if found is None:
        return []
    there, times = found
    series = [Cluster.load(CLUSTERS / f"spantrain-{size}.toml") for size in sorted(args.sizes)]
    cases = [(cluster, fitted(cluster, there, times)) for cluster in series]
    cases += [larger(there, times, copies) for copies in BEYOND]
    prepared = prepared_job(model, args.batch)
    out: list[dict[str, Any]] = []
    for cluster, known in cases:
        seconds: dict[str, float | None] = {}
        for name in SIMULATED:
            try:
                plan, _ = choose(prepared.job, cluster, prepared.traced.graph, known, name)
                seconds[name] = predicted_s(prepared, plan, known, cluster)
            except InfeasibleError:
                seconds[name] = None
        cores = sum(d.speed for d in cluster.devices) * cluster.core_share
        out.append({"devices": len(cluster.ids), "cores": cores, "predicted_s": seconds})
        print(f"{cluster.name}: {seconds}", flush=True)
    return out


def _step_s(rounds: list[dict[str, Any]]) -> float:
    return step_s(rounds) or float("nan")


def _core_rate(cells: list[dict[str, Any]], model: str) -> float:
    """The best rate of one core: by layer times at the rows that suit best, or of the fastest alone."""
    mine = [c for c in cells if c.get("model") == model and step_s(c.get("rounds", {}).get("single", ()))]
    alone = [c["batch"] / _step_s(c["rounds"]["single"]) / c["single_cores"] for c in mine]
    known = profiled(model, cells)
    if known is not None:
        alone.append(1 / least_row_s(known[1]))
    return max(alone)


def efficiency(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per cell and system: samples per second, and these over the bound of its devices' cores."""
    out: list[dict[str, Any]] = []
    for found in (c for c in cells if "rounds" in c):
        core = _core_rate(cells, found["model"])
        rates = {n: found["batch"] / _step_s(r) for n, r in found["rounds"].items()}
        out.append(
            {
                "cluster": found["cluster"], "devices": found["devices"], "model": found["model"],
                "samples_per_s": rates,
                "of_bound": {n: r / (core * found["cores"]) for n, r in rates.items()},
            }
        )  # fmt: skip
    return out


def simulated(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of what was only simulated."""
    out: list[dict[str, Any]] = []
    for found in (c for c in cells if "simulated" in c):
        core = _core_rate(cells, found["model"])
        for more in found["simulated"]:
            rates = {n: found["batch"] / s for n, s in more["predicted_s"].items() if s}
            share = {n: r / (core * more["cores"]) for n, r in rates.items()}
            out.append({"model": found["model"], "devices": more["devices"], "samples_per_s": rates,
                        "of_bound": share})  # fmt: skip
    return out


def where_the_rest_goes(cells: list[dict[str, Any]]) -> list[str]:
    """A line a cell: which part of what `auto` was predicted is the bound, and what each cause of more."""
    lines: list[str] = []
    for found in (c for c in cells if "rounds" in c):
        known = profiled(found["model"], cells)
        if known is None:
            continue
        cluster = Cluster.load(CLUSTERS / f"{found['cluster']}.toml")
        times = fitted(cluster, *known)
        plan = Plan.parse(found["plans"]["auto"])
        parts = losses(prepared_job(found["model"], found["batch"]), plan, times, cluster)
        shares = ", ".join(f"{name} {part / sum(parts.values()):.0%}" for name, part in parts.items())
        lines.append(f"{found['cluster']} {found['model']}: {shares}")
    return lines


def draw(data: dict[str, Any], path: Path) -> None:
    """Efficiency over devices, one panel a model."""
    rows = efficiency(data["cells"])
    models = list(dict.fromkeys(row["model"] for row in rows))
    looks = {"auto": (OURS, "o"), "pipeline": (PLAIN, "s"), "ddp": ("#9db4c0", "^")}
    with canvas(path, (4.2 * len(models), 3.0), (1, len(models))) as axes:
        for axis, model in zip(axes, models, strict=True):
            mine = [row for row in rows if row["model"] == model]
            for name, (color, mark) in looks.items():
                axis.plot(
                    [row["devices"] for row in mine], [100 * row["of_bound"][name] for row in mine],
                    color=color, marker=mark, label={"ddp": "PyTorch DDP"}.get(name, name),
                )  # fmt: skip
            more = [row for row in simulated(data["cells"]) if row["model"] == model]
            for name, key in (("auto", "auto"), ("pipeline", "pipeline"), ("ddp", "data_parallel")):
                known = [row for row in more if key in row["of_bound"]]
                axis.plot(
                    [row["devices"] for row in known], [100 * row["of_bound"][key] for row in known],
                    color=looks[name][0], marker=looks[name][1], ls=":", mfc="none",
                )  # fmt: skip
            ticks = sorted({row["devices"] for row in (*mine, *more)})
            axis.set_xscale("log", base=2)
            axis.set(xlabel="devices (dotted: simulated)", ylim=(0, 100), xticks=ticks, xticklabels=ticks)
            axis.set_title(model, loc="left", fontsize=10)
        axes[0].set_ylabel("of the compute bound, %")
        axes[0].legend(frameon=False, fontsize=8)


def measure(args: argparse.Namespace, kept: Cells) -> None:
    """All cells that are not there yet, the largest lab first."""
    done = {(c["devices"], c["model"]) for c in kept.found if "rounds" in c}
    for size in sorted(args.sizes, reverse=True):
        models = [m for m in args.models if (size, m) not in done]
        if not models:
            continue
        with Arena(Cluster.load(CLUSTERS / f"spantrain-{size}.toml"), models) as arena:
            for model in models:
                kept.add(cell(arena, model, args, kept))


def main() -> None:
    args = options()
    if redrawn(args, HERE, "scaling", draw):
        return
    kept = Cells(args)
    if args.simulate is None:
        need_lab(args)
        measure(args, kept)
    else:
        kept.found = json.loads(args.simulate.read_text(encoding="utf-8"))["cells"]
    cells = sorted((c for c in kept.found if "rounds" in c), key=lambda c: (c["model"], c["devices"]))
    cells += [c for c in kept.found if "profiled" in c]
    if not args.short:
        cells += [
            {"model": m, "batch": args.batch, "simulated": predictions(m, args, kept)} for m in args.models
        ]
    for row in efficiency(cells):
        texts = (
            f"{row['samples_per_s'][n]:.1f} ({row['of_bound'][n]:.0%})"
            for n in ("auto", "pipeline", "ddp", "single")
        )
        print(f"| {row['model']} | {row['devices']} | {' | '.join(texts)} |")
    print(*where_the_rest_goes(cells), sep="\n")
    for row in simulated(cells):
        texts = (
            f"{row['samples_per_s'][n]:.1f} ({row['of_bound'][n]:.0%})" if n in row["of_bound"] else "-"
            for n in SIMULATED
        )
        print(f"| {row['model']} | {row['devices']}, simulated | {' | '.join(texts)} |")
    keep(args, HERE, "scaling", {"cells": cells}, quiet=True, draw=draw)


if __name__ == "__main__":
    main()
