"""Planners of others from their published rules against `auto`, all on spanwise's runtime in one lab.

A cell is one cluster, model and batch. Every planner gets the same profile; each different plan runs once a
round, by turns, so that what differs is the plan alone. Plans that come out the same share one row's time.
`tried` is the plan that `train --tries 4` settles on: what it has seen until then counts for no row.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arena import CLUSTERS, Arena, Measurement, middle, predicted_s, prepared_job, shape, step_s, trials
from harness import Cells, cache_of, keep, need_lab, parser, redrawn
from measured import plan_words
from models import RECIPES
from pictures import OURS, PLAIN, canvas

from spanwise.api.planning import choose_for
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner import Problem

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = ("spantrain-7-env1", "spantrain-7-env2", "two-site-wan")
RIVALS = ("asteroid", "pipedream", "dapple", "hetpipe", "gpipe")
AUTO, TRIED = "auto", "tried"
NAMES = (AUTO, TRIED, *RIVALS)
TRIES = 4
ENOUGH_S = 8.0  # longer steps are timed once a round


def options() -> argparse.Namespace:
    found = parser(__doc__ or "")
    found.add_argument("--environments", nargs="*", default=list(ENVIRONMENTS))
    found.add_argument("--models", nargs="*", default=list(RECIPES))
    found.add_argument("--batch", type=int, default=32)
    found.add_argument("--rounds", type=int, default=2)
    found.add_argument("--cache", type=Path, default=None, help="folder of profiles")
    found.add_argument("--planners", nargs="*", choices=NAMES, default=list(NAMES))
    args = found.parse_args()
    if args.short:
        args.environments, args.models, args.rounds = ["home"], ["gpt"], 1
        args.planners = [AUTO, RIVALS[0]]
    return args


def cell(arena: Arena, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Every planner's plan, simulated and measured."""
    prepared = prepared_job(model, args.batch)
    times = arena.profile(prepared, cache_of(args))
    problem = Problem(prepared.traced.graph, times, arena.cluster, prepared.job)
    plans: dict[str, Plan] = {}
    without: dict[str, str] = {}
    for name in [name for name in args.planners if name != TRIED]:
        try:
            plans[name], _ = choose_for(problem, name)
        except InfeasibleError as error:
            without[name] = str(error)
    trial: list[dict[str, Any]] = []
    if TRIED in args.planners:
        tryout = arena.tried(prepared, problem, plans[AUTO], TRIES)
        plans[TRIED], trial = tryout.running, trials(tryout)
    expected = {n: predicted_s(prepared, plan, times, arena.cluster) for n, plan in plans.items()}
    first = {shape(plan): name for name, plan in reversed(plans.items())}  # who stands for equal plans
    runs: dict[str, list[Measurement]] = {name: [] for name in plans if name in first.values()}
    for _ in range(args.rounds):
        for name, found in runs.items():
            steps = 2 if expected[name] > ENOUGH_S else 5
            found.append(arena.attempt(prepared, plans[name], steps=steps))
            one = found[-1]
            text = one.error[:160] or f"{middle(one.step_s):.3f} s, predicted {expected[name]:.3f} s"
            print(f"{arena.cluster.name} {model} {args.batch}: {name}: {text}", flush=True)
    return {
        "cluster": arena.cluster.name, "model": model, "batch": args.batch, "without": without,
        "tried": trial,
        "plans": {n: {"predicted_s": expected[n], "same_as": first[shape(p)], "plan": p.to_data()}
                  for n, p in plans.items()},
        "rounds": {name: [one.data() for one in found] for name, found in runs.items()},
    }  # fmt: skip


def measured_s(cell: dict[str, Any], name: str) -> float | None:
    """Median step over all rounds of a planner's plan."""
    if name not in cell["plans"]:
        return None
    return step_s(cell["rounds"][cell["plans"][name]["same_as"]])


def table(cells: list[dict[str, Any]]) -> list[str]:
    """Samples per second, one row a cell; `=` where a planner came to the plan of one named before.

    The last columns are `auto` and `tried` over the best of the others.
    """
    lines = []
    for found in cells:
        words = []
        for name in NAMES:
            seconds = measured_s(found, name)
            text = "no plan" if name in found["without"] else "failed" if name in found["plans"] else "-"
            if seconds:
                same = found["plans"][name]["same_as"]
                text = f"{found['batch'] / seconds:.1f}" + ("" if same == name else f" (= {same})")
            words.append(text)
        others = [s for n in RIVALS if (s := measured_s(found, n))]
        ours = [measured_s(found, name) for name in (AUTO, TRIED)]
        words += [f"{min(others) / s:.2f}x" if s and others else "-" for s in ours]
        lines.append(f"| {found['cluster']} | {found['model']} | {found['batch']} | {' | '.join(words)} |")
    return lines


def draw(data: dict[str, Any], path: Path) -> None:
    """Throughput of every planner over that of the plan that `auto` settles on, one panel a cluster."""
    names = list(dict.fromkeys(c["cluster"] for c in data["cells"]))
    colors = dict(zip(RIVALS, ("#9db4c0", "#c2b280", "#a0855b", "#b6a6ca", PLAIN), strict=True))
    with canvas(path, (3.4 * len(names), 3.2), (1, len(names))) as axes:
        for axis, name in zip(axes, names, strict=True):
            mine = [c for c in data["cells"] if c["cluster"] == name]
            for place, planner in enumerate(RIVALS):
                pairs = [(measured_s(c, TRIED) or measured_s(c, AUTO), measured_s(c, planner)) for c in mine]
                heights = [a / b if a and b else 0.0 for a, b in pairs]
                at = [i + (place - (len(RIVALS) - 1) / 2) * 0.16 for i in range(len(mine))]
                axis.bar(at, heights, 0.15, color=colors[planner], label=planner)
            axis.axhline(1.0, color=OURS, lw=1.5, label="auto --tries 4")
            axis.set_xticks(range(len(mine)), [c["model"] for c in mine], fontsize=7, rotation=20)
            axis.set_title(name, loc="left", fontsize=9)
        axes[0].set_ylabel("throughput over ours")
        axes[0].legend(ncol=3, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0.0, 1.32))


def main() -> None:
    args = options()
    if redrawn(args, HERE, "baselines", draw):
        return
    need_lab(args)
    kept = Cells(args)
    cells = kept.found
    done = {(c["cluster"], c["model"]) for c in cells}
    for name in args.environments:
        models = [m for m in args.models if (name, m) not in done]
        if not models:
            continue
        with Arena(Cluster.load(CLUSTERS / f"{name}.toml"), []) as arena:
            for model in models:
                kept.add(cell(arena, model, args))
    for line in table(cells):
        print(line)
    for found in cells:
        print(f"{found['cluster']}, {found['model']}, batch {found['batch']}:")
        for planner, one in found["plans"].items():
            print(f"  {planner}: {plan_words(one['plan'])}")
    keep(args, HERE, "baselines", {"cells": cells}, quiet=True, draw=draw)


if __name__ == "__main__":
    main()
