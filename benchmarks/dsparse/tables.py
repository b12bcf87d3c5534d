"""Tables of the benchmark from its raw cells; ``python tables.py`` prints them again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DENSE, SUBJECT = "dense", "dsparse"
MIB = 2**20

Cell = Mapping[str, Any]


def tables(data: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: per plan, per device, accuracy."""
    lab = [_without_overhead(cell, data.get("overhead", {})) for cell in data["lab"]]
    whole = _workers(data["lab"], data.get("overhead", {}))
    return [*_plans(lab), "", *_devices(lab), "", *whole, "", *_accuracy(data["accuracy"])]


def _without_overhead(cell: Cell, overhead: Mapping[str, float]) -> Cell:
    """Measured peaks less what a worker takes besides tensors."""
    if "error" in cell:
        return cell
    return {**cell, "peak_bytes": {d: b - overhead.get(d, 0.0) for d, b in cell["peak_bytes"].items()}}


def _plans(cells: Sequence[Cell]) -> list[str]:
    dense = next((c for c in cells if c["lab"] == DENSE and "error" not in c), None)
    out = [
        "| plan | trained share | step, s (predicted) | aggregation, s | against dense, flat buffer | "
        "sent a step, MB | mean peak, MiB (predicted) | mean memory against dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        if "error" in cell:
            out.append(f"| {cell['lab']} | {cell['error']} |" + " - |" * 6)
            continue
        peak, sent = _mean(cell["peak_bytes"]), sum(cell["sent_bytes"].values())
        out.append(
            f"| {cell['lab']} | {100 * cell['union']:.0f} % | {_middle(cell['step_s']):.2f} "
            f"({cell['predicted_s']:.2f}) | {cell['aggregation_s']:.3f} | "
            f"{_change(cell['aggregation_s'], dense and dense['aggregation_s'])} | {sent / 1e6:.1f} | "
            f"{peak / MIB:.0f} ({_mean(cell['predicted_bytes']) / MIB:.0f}) | "
            f"{_less(cell['peak_bytes'], dense and dense['peak_bytes'])} |"
        )
    return out


def _devices(cells: Sequence[Cell]) -> list[str]:
    """Predicted and measured bytes of the subject and of dense."""
    found = {c["lab"]: c for c in cells if "error" not in c}
    shown = [name for name in (DENSE, SUBJECT) if name in found]
    if not shown:
        return []
    out = [
        "| device | " + " | ".join(f"{n}, MiB predicted | measured | off" for n in shown) + " |",
        "|---|" + "---|" * 3 * len(shown),
    ]
    for device in found[shown[0]]["peak_bytes"]:
        row: list[str] = []
        for name in shown:
            guess, seen = (found[name][k][device] for k in ("predicted_bytes", "peak_bytes"))
            row.append(f"{guess / MIB:.1f} | {seen / MIB:.1f} | {100 * (guess / seen - 1):+.1f} %")
        out.append(f"| {device} | " + " | ".join(row) + " |")
    return out


def _workers(cells: Sequence[Cell], overhead: Mapping[str, float]) -> list[str]:
    """Predicted and measured bytes of whole workers, interpreter and libraries included, by plan.

    What a started worker holds and what training takes besides tensors is measured, the latter once for all
    plans; tensors are predicted.
    """
    out = ["| plan | whole worker, MiB predicted | measured | off, by device |", "|---|---|---|---|"]
    for cell in [c for c in cells if "worker_bytes" in c]:
        peaks = {d: own["peak"] for d, own in cell["worker_bytes"].items()}
        # Peaks are kept as what they are above the worker before training, so the rest is what it held then.
        held = {d: peak - cell["peak_bytes"][d] for d, peak in peaks.items()}
        pairs = [
            (held[d] + overhead.get(d, 0.0) + cell["predicted_bytes"][d], peak) for d, peak in peaks.items()
        ]
        guess, seen = (statistics.fmean(values) / MIB for values in zip(*pairs, strict=True))
        off = ", ".join(f"{100 * (a / b - 1):+.1f}" for a, b in pairs)
        out.append(f"| {cell['lab']} | {guess:.0f} | {seen:.0f} | {off} % |")
    return out


def _accuracy(cells: Sequence[Cell]) -> list[str]:
    out = [
        "| start, shards | plan | seeds | accuracy, % (mean, least, most) | against dense, points |",
        "|---|---|---|---|---|",
    ]
    for setting in dict.fromkeys(c["setting"] for c in cells):
        own = [c for c in cells if c["setting"] == setting and c.get("curve")]
        dense = {c["seed"]: _last(c) for c in own if c["name"] == DENSE}
        for name in dict.fromkeys(c["name"] for c in own):
            by_seed = {c["seed"]: _last(c) for c in own if c["name"] == name}
            gaps = [value - dense[seed] for seed, value in by_seed.items() if seed in dense]
            gap = f"{statistics.fmean(gaps):+.2f}" if gaps else "-"  # each against the same seed's
            found = by_seed.values()
            values = f"{statistics.fmean(found):.2f} ({min(found):.2f}, {max(found):.2f})"
            out.append(f"| {setting} | {name} | {len(found)} | {values} | {gap} |")
        out += [
            f"| {setting} | {c['name']} | - | {c['error']} | - |"
            for c in cells
            if c["setting"] == setting and "error" in c
        ]
    return out


def _last(cell: Cell) -> float:
    return 100 * cell["curve"][-1]["accuracy"]


def _mean(values: Mapping[str, float]) -> float:
    return statistics.fmean(values.values())


def _middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def _change(value: float, base: float | None) -> str:
    return f"{100 * (value / base - 1):+.1f} %" if base else "-"


def _less(values: Mapping[str, float], base: Mapping[str, float] | None) -> str:
    """The mean over devices of each one's share of what dense takes there."""
    if base is None:
        return "-"
    return f"{100 * (statistics.fmean(values[d] / base[d] for d in values) - 1):+.1f} %"


def main() -> None:
    path = HERE / "raw" / "dsparse.json"
    print("\n".join(tables(json.loads(path.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
