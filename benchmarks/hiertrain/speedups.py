"""Tables and picture of HierTrain's sweep, from raw cells; ``python speedups.py`` makes them again."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measured import plan_words, step_s
from pictures import OURS, PLAIN, canvas

HERE = Path(__file__).resolve().parent
SUBJECT = "hiertrain"
SINGLE = ("all_cloud", "all_edge", "all_device")
BASELINES = (*SINGLE, "split_two", "two_tier", "rounded_lp")
NAMES = (SUBJECT, *BASELINES)
CLOUD = "all_cloud"
PUBLISHED = 6.9  # "up to 6.9x over the cloud-based hierarchical approach", from the abstract of the paper
LOOKS = {
    "all_cloud": (OURS, "o"), "all_edge": (PLAIN, "s"), "all_device": ("#9db4c0", "^"),
    "split_two": ("#c2b280", "D"), "two_tier": ("#b6a6ca", "v"), "rounded_lp": ("#a0855b", "P"),
}  # fmt: skip

Cell = dict[str, Any]


@dataclass(frozen=True)
class Both:
    """The same number measured and predicted; None where there is none."""

    measured: float | None
    predicted: float | None

    def over(self, other: Both) -> Both:
        """How often the other goes into this one."""
        return Both(_ratio(self.measured, other.measured), _ratio(self.predicted, other.predicted))

    def text(self, form: str) -> str:
        """Measured, and predicted in brackets; '-' for what is missing."""
        return f"{_text(self.measured, form)} ({_text(self.predicted, form)})"


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form.rstrip("x")) + ("x" if form.endswith("x") else "")


def seconds(cell: Cell, name: str) -> Both:
    """Of a step. Strategies whose plans came out the same share one measurement."""
    if name not in cell["plans"]:
        return Both(None, None)
    found = cell["plans"][name]
    return Both(step_s(cell["rounds"][found["same_as"]]), found["predicted_s"])


def speed_up(cell: Cell, name: str) -> Both:
    """A baseline's step over that of ``hiertrain``: above 1 the baseline is slower."""
    return seconds(cell, name).over(seconds(cell, SUBJECT))


def best_single(cell: Cell) -> str:
    """The fastest of those that compute everything on one machine, as measured; empty if none ran."""
    found = {name: s for name in SINGLE if (s := seconds(cell, name).measured)}
    return min(found, key=lambda name: found[name], default="")


def ordered(cells: list[Cell]) -> list[Cell]:
    """By model, in the order in which they came, and bandwidth."""
    models = list(dict.fromkeys(c["model"] for c in cells))
    return sorted(cells, key=lambda c: (models.index(c["model"]), c["mbit_per_s"]))


def _head(cell: Cell) -> str:
    return f"| {cell['model']} | {cell['batch']} | {cell['mbit_per_s']:g} |"


def speed_up_lines(cells: list[Cell]) -> list[str]:
    """A row a cell: how much faster ``hiertrain`` is than each baseline, measured and predicted."""
    names = " | ".join(BASELINES)
    lines = [f"| model | batch | Mbit/s to the cloud | {names} | best single machine |"]
    lines.append("|" + "---|" * (len(BASELINES) + 4))
    for cell in ordered(cells):
        ratios = " | ".join(speed_up(cell, name).text(".2fx") for name in BASELINES)
        best = best_single(cell)
        last = f"{speed_up(cell, best).text('.2fx')}, {best}" if best else "-"
        lines.append(f"{_head(cell)} {ratios} | {last} |")
    return lines


def second_lines(cells: list[Cell]) -> list[str]:
    """A row a cell: seconds of a step of every strategy, measured and predicted."""
    head = [
        f"| model | batch | Mbit/s to the cloud | {' | '.join(NAMES)} |",
        "|" + "---|" * (len(NAMES) + 3),
    ]
    texts = [[seconds(cell, name).text(".3f") for name in NAMES] for cell in ordered(cells)]
    rows = zip(ordered(cells), texts, strict=True)
    return head + [f"{_head(cell)} {' | '.join(found)} |" for cell, found in rows]


def plan_lines(cells: list[Cell]) -> list[str]:
    """A row a cell: what ``hiertrain`` decided, layers counted from 0, rows of a micro-batch by device."""
    lines = ["| model | batch | Mbit/s to the cloud | plan of `hiertrain` |", "|---|---|---|---|"]
    for cell in ordered(cells):
        words = plan_words(cell["plans"][SUBJECT]["plan"]) if SUBJECT in cell["plans"] else "none"
        lines.append(f"{_head(cell)} {words} |")
    return lines


def summary_lines(cells: list[Cell]) -> list[str]:
    """The greatest speed-ups, what went against us, and how far predictions were off."""
    lines: list[str] = []
    for model in dict.fromkeys(c["model"] for c in cells):
        mine = [c for c in cells if c["model"] == model and speed_up(c, CLOUD).measured]
        if mine:
            best = max(mine, key=lambda c: speed_up(c, CLOUD).measured or 0.0)
            lines.append(
                f"{model}: {speed_up(best, CLOUD).text('.2fx')} over {CLOUD} at {best['mbit_per_s']:g} "
                f"Mbit/s, the most of {len(mine)} bandwidths; published over all settings: up to {PUBLISHED}x"
            )
    found = [(c, name, speed_up(c, name)) for c in ordered(cells) for name in BASELINES]
    behind = [
        f"{_where(cell)}, {name}: {ratio.text('.2fx')}"
        for cell, name, ratio in found
        if ratio.measured is not None and ratio.measured < 1.0
    ]
    lines.append(f"a baseline measured faster in {len(behind)} cases" + "".join(f"; {b}" for b in behind))
    errors = [abs(e) for c in cells for name in NAMES if (e := error(c, name)) is not None]
    if errors:
        lines.append(
            f"{len(errors)} step times: predicted over measured off by {statistics.median(errors):.1%} in "
            f"the middle, {max(errors):.1%} at most"
        )
    return lines + [line for cell in ordered(cells) for line in _missing(cell)]


def _missing(cell: Cell) -> list[str]:
    """Who has no plan or did not run, and why."""
    lines = [f"no plan: {_where(cell)}, {reason}" for reason in cell["without"].values()]
    for name, rounds in cell["rounds"].items():
        lines += [f"failed: {_where(cell)}, {name}: {one['error']}" for one in rounds if one["error"]]
    return lines


def _where(cell: Cell) -> str:
    return f"{cell['model']} at {cell['mbit_per_s']:g} Mbit/s"


def error(cell: Cell, name: str) -> float | None:
    """Predicted over measured step time, less 1; None for who shares another one's measurement."""
    if name not in cell["plans"] or cell["plans"][name]["same_as"] != name:
        return None
    found = seconds(cell, name)
    ratio = _ratio(found.predicted, found.measured)
    return None if ratio is None else ratio - 1


def tables(data: dict[str, Any]) -> list[str]:
    """Everything that the README shows."""
    cells = data["cells"]
    parts = (speed_up_lines(cells), second_lines(cells), plan_lines(cells), summary_lines(cells))
    return [line for part in parts for line in (*part, "")]


def draw(data: dict[str, Any], path: Path) -> None:
    """Speed-up over each baseline by bandwidth, a panel a model: lines simulated, points measured."""
    models = list(dict.fromkeys(c["model"] for c in data["cells"]))
    with canvas(path, (4.0 * len(models), 3.4), (1, len(models))) as axes:
        for axis, model in zip(axes, models, strict=True):
            mine = ordered([c for c in data["cells"] if c["model"] == model])
            sweep = sorted((s for s in data["sweep"] if s["model"] == model), key=lambda s: s["mbit_per_s"])
            _panel(axis, mine, sweep)
            axis.set_title(f"{model}, batch {mine[0]['batch']}", loc="left", fontsize=10)
        low, high = (pick(axis.get_ylim()[i] for axis in axes) for i, pick in ((0, min), (1, max)))
        marks = [y for y in (0.5, 1, 2, 3, 5, 10, 20, 50, 100) if low <= y <= high]
        for axis in axes:  # one scale for all, so that panels can be compared
            axis.set_ylim(low, high)
            axis.set_yticks(marks, [f"{y:g}x" for y in marks])
            axis.set_yticks([], minor=True)
        axes[0].set_ylabel("speed-up of hiertrain over")
        axes[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _panel(axis: Any, cells: list[Cell], sweep: list[dict[str, Any]]) -> None:
    axis.axhline(1.0, color="#888888", lw=0.8)
    axis.axhline(PUBLISHED, color=OURS, lw=0.8, ls=":")
    words = f"published over the cloud: up to {PUBLISHED}x"
    axis.text(cells[-1]["mbit_per_s"], PUBLISHED, words, color=OURS, fontsize=7, ha="right", va="bottom")
    for name, (color, mark) in LOOKS.items():
        line = [(s["mbit_per_s"], r) for s in sweep if (r := simulated(s, name)) is not None]
        axis.plot([x for x, _ in line], [y for _, y in line], color=color, lw=2.2 if name == CLOUD else 1.2)
        points = [(c["mbit_per_s"], r) for c in cells if (r := speed_up(c, name).measured)]
        axis.plot([x for x, _ in points], [y for _, y in points], mark, color=color, ms=5, label=name)
    ticks = [c["mbit_per_s"] for c in cells]
    axis.set(xscale="log", yscale="log", xlabel="Mbit/s to the cloud")
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.set_xticks([], minor=True)


def simulated(point: dict[str, Any], name: str) -> float | None:
    """Speed-up over a baseline at a point of the sweep."""
    found = point["predicted_s"]
    return _ratio(found.get(name), found.get(SUBJECT))


def main() -> None:
    raw = [path for path in sorted((HERE / "raw").glob("*.json")) if ".partial" not in path.suffixes]
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in raw]
    data = {key: [entry for part in reversed(parts) for entry in part[key]] for key in ("cells", "sweep")}
    print("\n".join(tables(data)))
    draw(data, HERE / "hiertrain.svg")


if __name__ == "__main__":
    main()
