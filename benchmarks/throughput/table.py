"""Rows and picture of the throughput table, from raw cells; ``python table.py`` redraws from the raw file.

``python table.py FILE`` prints the rows of another, against the best rate of a core in both.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arena import CLUSTERS, step_s
from losses import CAUSES
from pictures import OURS, PLAIN, canvas

from spanwise.core.cluster import Cluster

HERE = Path(__file__).resolve().parent
ENGINES = ("ddp", "fsdp2", "gpipe", "1f1b", "single")
PEERS = (*ENGINES, "cloud_only")
TITLES = {
    "ddp": "DDP", "fsdp2": "FSDP2", "gpipe": "GPipe", "1f1b": "1F1B", "single": "best device",
    "cloud_only": "cloud only", "auto": "spanwise auto",
}  # fmt: skip


def throughput(cell: dict[str, Any]) -> dict[str, float]:
    """Samples per second of everybody who ran, at the better of two settings where there are two."""
    out: dict[str, float] = {}
    for name, rounds in cell["rounds"].items():
        seconds = step_s(rounds)
        if seconds:
            key = name.removesuffix("_5mb").removesuffix("_m32")  # the better setting counts
            out[key] = max(out.get(key, 0.0), cell["batch"] / seconds)
    return out


def core_rate(cells: list[dict[str, Any]], model: str) -> float:
    """Samples per second of one whole core at its best, over all cells of a model, whoever drove it."""
    rates: list[float] = []
    for cell in (c for c in cells if c["model"] == model):
        cluster = Cluster.load(CLUSTERS / f"{cell['cluster']}.toml")
        share = max(d.speed for d in cluster.devices) * cluster.core_share
        alone = [p for p in cell.get("plans", {}).values() if _alone(cluster, p["plan"])]
        seconds = [step_s(cell["rounds"].get("single", [])), *(step_s([p]) for p in alone)]
        rates += [cell["batch"] / s / share for s in seconds if s]
    return max(rates, default=float("nan"))


def bound(cells: list[dict[str, Any]], cell: dict[str, Any]) -> float:
    """If compute were all: what one core does at its best, times the cores of all devices."""
    cluster = Cluster.load(CLUSTERS / f"{cell['cluster']}.toml")
    return core_rate(cells, cell["model"]) * sum(d.speed for d in cluster.devices) * cluster.core_share


def _alone(cluster: Cluster, plan: dict[str, Any]) -> bool:
    """Whether a plan is that of one device, one of the fastest."""
    used = {r["device"] for stage in plan["stages"] for r in stage["replicas"]}
    return len(used) == 1 and cluster.device(used.pop()).speed == max(d.speed for d in cluster.devices)


def mean_use(rounds: list[dict[str, Any]]) -> float:
    """Mean over devices of processor time used over processor time granted."""
    last = next((r for r in reversed(rounds) if r["devices"]), None)
    return statistics.mean(d["utilization"] for d in last["devices"].values()) if last else 0.0


def summarize(cells: list[dict[str, Any]], others: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """One row a cell: throughput, the best peer, spanwise against it and against the bound.

    The best rate of a core is that of any cell, of ``others`` too.
    """
    rows: list[dict[str, Any]] = []
    for cell in cells:
        found = throughput(cell)
        peers = {name: found[name] for name in PEERS if name in found}
        best = max(peers, key=lambda n: peers[n]) if peers else ""
        engine = max((peers[name] for name in ENGINES if name in peers), default=float("nan"))
        auto = found.get("auto", 0.0)
        limit = bound([*cells, *others], cell)
        ratio = auto / peers[best] if best else float("nan")
        use = {n: mean_use(cell["rounds"][n]) for n in (best, "auto") if n in cell["rounds"]}
        row = {
            "cluster": cell["cluster"], "model": cell["model"], "batch": cell["batch"], "found": found,
            "best": best, "ratio": ratio, "over_engines": auto / engine, "fraction": auto / limit,
            "bound": limit, "use": use, "strategy": cell["auto_strategy"],
            "error": cell["predicted_step_time_s"] * auto / cell["batch"] - 1,
        }  # fmt: skip
        cells_text = " | ".join(f"{found[n]:.1f}" if n in found else "-" for n in PEERS)
        row["text"] = (
            f"| {cell['cluster']} | {cell['model']} | {cell['batch']} | {cells_text} | {auto:.1f} "
            f"({cell['auto_strategy']}) | {auto / engine:.2f}x | {ratio:.2f}x | {auto / limit:.0%} |"
        )
        rows.append(row)
    return rows


def where_the_rest_goes(cells: list[dict[str, Any]]) -> list[str]:
    """A line a cell: what part of the predicted step is the bound, and what part each cause of more.

    Last, throughput over what the devices would give together under their quotas, if compute were all.
    """
    lines: list[str] = []
    for cell in cells:
        parts = cell.get("losses_s")
        if parts:
            whole = sum(parts.values())
            shares = " | ".join(f"{parts[name] / whole:.0%}" for name in ("bound", *CAUSES))
            own = (parts["bound"] + parts["quota"]) * throughput(cell).get("auto", 0.0) / cell["batch"]
            lines.append(f"| {cell['cluster']} | {cell['model']} | {cell['batch']} | {shares} | {own:.0%} |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: throughput over the aggregate-compute bound, every contestant, one panel a cluster."""
    names = list(dict.fromkeys(row["cluster"] for row in rows))
    colors = {"ddp": "#9db4c0", "fsdp2": PLAIN, "gpipe": "#c2b280", "1f1b": "#a0855b",
              "single": "#cfcfcf", "cloud_only": "#b6a6ca", "auto": OURS}  # fmt: skip
    order = [*PEERS, "auto"]
    with canvas(path, (11, 3.1 * len(names)), (len(names), 1)) as axes:
        for axis, name in zip(axes, names, strict=True):
            mine = [row for row in rows if row["cluster"] == name]
            for place, contestant in enumerate(order):
                heights = [row["found"].get(contestant, 0.0) / row["bound"] for row in mine]
                at = [i + (place - (len(order) - 1) / 2) * 0.12 for i in range(len(mine))]
                axis.bar(at, heights, 0.11, color=colors[contestant], label=TITLES[contestant])
            for i, row in enumerate(mine):
                axis.text(i + 0.36, row["fraction"] + 0.02, f"{row['ratio']:.2f}x", ha="center", fontsize=8)
            axis.set_xticks(
                range(len(mine)), [f"{row['model']}\nbatch {row['batch']}" for row in mine], fontsize=8
            )
            axis.set_ylim(0, 1.05)
            axis.set_ylabel("of the compute bound")
            axis.set_title(name, loc="left", fontsize=10)
        axes[0].legend(ncol=7, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.32))


def main() -> None:
    whole = json.loads((HERE / "raw" / "throughput.json").read_text(encoding="utf-8"))["cells"]
    cells = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["cells"] if sys.argv[1:] else whole
    rows = summarize(cells, whole)
    for line in [row["text"] for row in rows] + where_the_rest_goes(cells):
        print(line)
    if cells is whole:
        draw(rows, HERE / "throughput.svg")


if __name__ == "__main__":
    main()
