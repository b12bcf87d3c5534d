"""Draws ``planner.svg`` from the raw files: gaps by family on the left, seconds by devices on the right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import FAMILIES
from pictures import OURS, PLAIN, canvas

HERE = Path(__file__).resolve().parent
CONTROL, TARGET = PLAIN, "#777777"
LEAST = 0.01  # per cent: where no gap at all is drawn


def main() -> None:
    with canvas(HERE / "planner.svg", (10, 3.8), (1, 2)) as (left, right):
        gaps(left, json.loads((HERE / "raw" / "quality.json").read_text())["rows"])
        seconds(right, json.loads((HERE / "raw" / "planner.json").read_text())["compare"])


def gaps(axes: Any, rows: list[dict[str, Any]]) -> None:
    """One dot a cluster; those without any gap lie on the lower edge."""
    for at, family in enumerate(FAMILIES):
        for key, colour, aside in (("control_s", CONTROL, 0.2), ("hpp_s", OURS, -0.2)):
            own = [
                r for r in rows if r["family"] == family and r["best_s"] is not None and r[key] is not None
            ]
            values = [max(LEAST, 100 * (r[key] / r["best_s"] - 1)) for r in own]
            spread = [at + aside + 0.3 * ((7 * n) % 20 / 20 - 0.5) for n in range(len(own))]
            axes.scatter(spread, values, s=9, color=colour, alpha=0.6, linewidths=0)
            optimal = sum(value <= LEAST for value in values)
            axes.text(
                at + aside, LEAST / 2, f"{optimal}/{len(own)}\nbest", color=colour, ha="center", va="top"
            )
    axes.set_yscale("log")
    axes.set_ylim(LEAST / 1.5, 5000)
    axes.set_yticks([0.01, 0.1, 1, 10, 100], ["none", "0.1 %", "1 %", "10 %", "100 %"])
    axes.set_xticks(range(len(FAMILIES)), FAMILIES)
    axes.tick_params(axis="x", pad=32, length=0)
    axes.axhline(5, color=TARGET, linewidth=1, linestyle="--")
    axes.text(len(FAMILIES) - 0.55, 5.5, "5 %", color=TARGET, ha="right")
    axes.set_title("Step time above the exhaustive best", loc="left")
    axes.text(0.99, 0.97, "spanwise hpp", color=OURS, transform=axes.transAxes, ha="right", va="top")
    axes.text(0.99, 0.89, "devices in order of memory", color=CONTROL, transform=axes.transAxes, ha="right",
              va="top")  # fmt: skip


def seconds(axes: Any, compared: dict[str, dict[str, Any]]) -> None:
    """All strategies and ``hpp`` alone, with the targets."""
    found = sorted(compared.values(), key=lambda entry: entry["devices"])
    devices = [entry["devices"] for entry in found]
    for key, label, colour in (("cpu_seconds", "all strategies", CONTROL), ("hpp_cpu_seconds", "hpp", OURS)):
        values = [entry[key]["median"] for entry in found]
        axes.plot(devices, values, marker="o", markersize=4, color=colour)
        axes.annotate(f" {label}", (devices[-1], values[-1]), color=colour, va="center")
    axes.plot([16, 200, 2000], [2, 30, 300], "_", color=TARGET, markersize=14)
    axes.annotate("targets", (200, 30), color=TARGET, xytext=(0, 5), textcoords="offset points", ha="center")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(2.5, 9000)
    axes.set_xticks([3, 16, 200, 2000], ["3", "16", "200", "2,000"])
    axes.minorticks_off()
    axes.set_yticks([0.1, 1, 10, 100], ["0.1 s", "1 s", "10 s", "100 s"])
    axes.set_xlabel("devices")
    axes.set_title("Time to plan, one thread", loc="left")


if __name__ == "__main__":
    main()
