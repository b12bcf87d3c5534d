"""The tables and the picture of the benchmark, from its cells."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pictures import GREY, OURS, PLAIN, canvas

Cell = dict[str, Any]

HERE = Path(__file__).resolve().parent
WANTED_SAVING, WANTED_POINTS = 11.8, 0.5


def pick(cells: Sequence[Cell], **about: Any) -> list[Cell]:
    """Cells with these values."""
    return [cell for cell in cells if all(cell.get(key) == value for key, value in about.items())]


def average(cells: Sequence[Cell], key: str = "accuracy") -> float | None:
    """Mean over seeds; None if there is none."""
    return mean(cell[key] for cell in cells) if cells else None


def show(result: dict[str, Any]) -> str:
    """Markdown: accuracy and compute by task, network and number of groups, then what was reached."""
    cells: list[Cell] = result["cells"]
    head = (
        "task", "model", "groups", "central", "apart, merged", "single width", "no negatives", "pool of 20",
        "FedAvg", "less compute a device and sample", "all devices together", "winner at equal cost",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task, model, groups in _settings(cells):
        own = pick(cells, task=task, model=model)
        merged = pick(own, way="apart", groups=groups)
        single = average(pick(own, way="single_width", groups=groups))
        score = average(merged)
        others = [average(pick(own, way=way, groups=groups)) for way in ("no_negatives", "pool", "fedavg")]
        shown = [average(pick(own, way="central")), score, single, *others]
        savings = f"{merged[0]['least_saving_per_sample']:.1f}x", f"{merged[0]['saving_over_devices']:.1f}x"
        lines.append(
            f"| {task} | {model} | {groups} | " + " | ".join(_percent(value) for value in shown)
            + f" | {savings[0]} | {savings[1]} | {_winner(score, single)} |"
        )  # fmt: skip
    return "\n".join([*lines, "", *_by_speed(cells), *_longer(cells), *_reached(cells)])


def _settings(cells: Sequence[Cell]) -> list[tuple[str, str, int]]:
    return sorted({(c["task"], c["model"], c["groups"]) for c in cells if c["way"] == "apart"})


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _winner(merged: float | None, single: float | None) -> str:
    if merged is None or single is None:
        return ""
    if abs(merged - single) < 0.0005:
        return "level"
    return "merged" if merged > single else "single width"


def _by_speed(cells: Sequence[Cell]) -> list[str]:
    """Shares by speed: who has the least, and whether all need equal times."""
    lines: list[str] = []
    for cell in pick(cells, way="by_speed", seed=0):
        shares = ", ".join(f"{d['share']:.2f}" for d in cell["devices"])
        lines.append(
            f"{cell['task']}, {cell['model']}, devices of speeds 1, 3, 5, 8: shares {shares}; merged "
            f"{_percent(cell['accuracy'])} %, {cell['saving_per_sample']:.1f}x less compute on the smallest"
        )
    return [*lines, ""] if lines else []


def _longer(cells: Sequence[Cell]) -> list[str]:
    """Half more epochs on the devices, against central training as long as before and as long as they."""
    lines: list[str] = []
    for task, model, groups in _settings(cells):
        own = pick(cells, task=task, model=model)
        found = pick(own, way="apart_longer", groups=groups)
        if not found:
            continue
        whole = pick(own, way="central")
        saving = mean(w["flops"] for w in whole) / max(d["flops"] for c in found for d in c["devices"])
        scores = (average(found), average(whole), average(pick(own, way="central_longer")))
        merged, central, longer = map(_percent, scores)
        lines.append(
            f"{task}, {model}, {groups} groups, half more epochs: merged {merged} %, {saving:.1f}x "
            f"less compute in all; central {central} %, with half more epochs, too, {longer} %"
        )
    return [*lines, ""] if lines else []


def _reached(cells: Sequence[Cell]) -> list[str]:
    lines: list[str] = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        best: tuple[float, str] | None = None
        for _, model, groups in (s for s in _settings(cells) if s[0] == task):
            own = pick(cells, task=task, model=model)
            merged, whole = pick(own, way="apart", groups=groups), average(pick(own, way="central"))
            score = average(merged)
            if score is None or whole is None or 100 * (whole - score) > WANTED_POINTS:
                continue
            saving = merged[0]["least_saving_per_sample"]
            if best is None or saving > best[0]:
                best = saving, f"{model} in {groups} groups"
        said = "none" if best is None else f"{best[0]:.1f}x less compute on every device ({best[1]})"
        ok = best is not None and best[0] >= WANTED_SAVING
        lines.append(
            f"{task}: at most {WANTED_POINTS} points below central: {said}; "
            f"{WANTED_SAVING}x {'reached' if ok else 'not reached'}"
        )
    worst = max((cell.get("largest_difference_of_forms", 0.0) for cell in cells), default=0.0)
    return [*lines, f"largest difference between the forms of a merged network: {worst:.1e}"]


def draw(data: dict[str, Any], path: Path) -> None:
    """Accuracy by number of groups, a panel for every task and network."""
    cells: list[Cell] = data["cells"]
    panels = list(dict.fromkeys((task, model) for task, model, _ in _settings(cells)))
    looks = {"apart": ("merged", OURS, "o-"), "single_width": ("one narrow net", PLAIN, "s--"),
             "no_negatives": ("without negatives", "#b0b0b0", "x:")}  # fmt: skip
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    with canvas(path, (2.6 * columns, 2.3 * rows), (rows, columns)) as axes:
        for axis, (task, model) in zip(axes, panels, strict=False):
            own = pick(cells, task=task, model=model)
            for way, (label, color, style) in looks.items():
                counts = sorted({cell["groups"] for cell in pick(own, way=way)})
                values = [100 * (average(pick(own, way=way, groups=g)) or 0.0) for g in counts]
                axis.plot(counts, values, style, color=color, label=label, ms=4, lw=1)
            whole = average(pick(own, way="central"))
            if whole is not None:
                axis.axhspan(
                    100 * whole - WANTED_POINTS, 100 * whole, color=GREY, label="central, 0.5 points"
                )
            axis.set_title(f"{task}, {model}", fontsize=8, loc="left")
            axis.set_xticks(sorted({cell["groups"] for cell in pick(own, way="apart")}))
            axis.set_xlabel("groups", fontsize=7)
            axis.set_ylabel("test accuracy, %", fontsize=7)
            axis.tick_params(labelsize=7)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        axes[0].legend(fontsize=6, frameon=False)


def main() -> None:
    data = json.loads((HERE / "raw" / "decoupled.json").read_text(encoding="utf-8"))
    print(show(data))


if __name__ == "__main__":
    main()
