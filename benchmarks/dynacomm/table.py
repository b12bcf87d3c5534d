"""Tables of the README and ``dynacomm.svg`` from the raw files of the study; the picture needs matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nets import NETS
from pictures import GREY, OURS, PLAIN, canvas

HERE = Path(__file__).resolve().parent
RULES = ("layer_by_layer", "bucket_25mb", "ibatch", "mg_wfbp", "dynacomm", "duplex")
# Greatest reductions in the paper, in %, by a reading note; none is given for the others.
PUBLISHED = {
    ("vgg19", "dynacomm"): 41.10, ("resnet152", "dynacomm"): 41.92,
    ("inception_v4", "ibatch"): 24.22, ("inception_v4", "layer_by_layer"): 35.25,
}  # fmt: skip
SHOWN = ((0.1, 20), (1.0, 10), (1.0, 1), (5.0, 5))


def reduction(point: dict[str, Any], rule: str) -> float:
    """Per cent of the step of one message each way."""
    return 100 * (1 - point["step_ns"][rule] / point["step_ns"]["sequential"])


def removed(point: dict[str, Any]) -> float:
    """Per cent of dynacomm's step that duplex removes."""
    return 100 * (1 - point["step_ns"]["duplex"] / point["step_ns"]["dynacomm"])


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def best_points(nets: dict[str, list[dict[str, Any]]]) -> None:
    """Greatest reduction of every rule, each where it is greatest, with the published one in brackets."""
    print(line("net", *RULES))
    print("|---" * (len(RULES) + 1) + "|")
    for net, points in nets.items():
        cells: list[str] = []
        for rule in RULES:
            found = max(points, key=lambda point, rule=rule: reduction(point, rule))
            published = PUBLISHED.get((net, rule))
            beside = "" if published is None else f" ({published:.1f})"
            where = f"{found['gbit_per_s']:g} Gbit/s, {found['overhead_ms']} ms"
            cells.append(f"{reduction(found, rule):.1f}{beside} at {where}")
        print(line(net, *cells))


def some_points(nets: dict[str, list[dict[str, Any]]]) -> None:
    """All rules on a few links; what duplex removes of dynacomm, and could remove at most."""
    print(line("net", "link", *RULES[:-1], "duplex of dynacomm", "bound"))
    print("|---" * (len(RULES) + 3) + "|")
    for net, points in nets.items():
        for gbit, overhead in SHOWN:
            for point in points:
                if (point["gbit_per_s"], point["overhead_ms"]) == (gbit, overhead):
                    most = 100 * (1 - point["duplex_bound_ns"] / point["step_ns"]["dynacomm"])
                    values = [f"{reduction(point, rule):.1f}" for rule in RULES[:-1]]
                    link = f"{gbit:g} Gbit/s, {overhead} ms"
                    print(line(net, link, *values, f"**{removed(point):.1f}**", f"{most:.1f}"))


def all_points(nets: dict[str, list[dict[str, Any]]]) -> None:
    """What duplex removes of dynacomm by rate, and how far its plans are above what no plan can beat."""
    points = [point for own in nets.values() for point in own]
    for gbit in sorted({point["gbit_per_s"] for point in points}):
        middle = median(removed(point) for point in points if point["gbit_per_s"] == gbit)
        print(f"{gbit:g} Gbit/s: {middle:.0f} % in the median")
    gaps = sorted(point["step_ns"]["duplex"] / point["duplex_bound_ns"] - 1 for point in points)
    met, close = sum(gap == 0 for gap in gaps), sum(gap < 0.02 for gap in gaps)
    print(f"{met} of {len(gaps)} plans meet the bound, {close} lie within 2 %")
    print(f"above the bound: median {100 * median(gaps):.1f} %, worst {100 * gaps[-1]:.0f} %")
    behind = sorted(point["step_ns"]["ibatch"] / point["step_ns"]["dynacomm"] - 1 for point in points)
    most, often = 100 * behind[-1], 100 * behind[len(behind) * 9 // 10]
    print(f"ibatch behind dynacomm: {most:.1f} % at most, {often:.1f} % in nine of ten cases")


def draw(nets: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Reduction by rate at an overhead of 10 ms, one panel a net."""
    colours = {"duplex": (OURS, "-"), "dynacomm": ("#333333", "-"), "mg_wfbp": (PLAIN, ":"),
               "bucket_25mb": (PLAIN, "--"), "layer_by_layer": ("#a9b4ba", "-")}  # fmt: skip
    with canvas(path, (12, 3.2), (1, len(nets))) as axes:
        for axis, (net, points) in zip(axes, nets.items(), strict=True):
            own = [point for point in points if point["overhead_ms"] == 10]
            rates = [point["gbit_per_s"] for point in own]
            for rule, (colour, style) in colours.items():
                values = [max(-20.0, reduction(point, rule)) for point in own]
                axis.plot(rates, values, style, color=colour, label=rule, linewidth=1.6)
            axis.axhline(0, color=GREY, linewidth=1)
            axis.set_xscale("log")
            axis.set_yticks([-20, 0, 20, 40, 60])
            axis.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
            axis.minorticks_off()
            axis.set_ylim(-22, 98)
            axis.set_title(net, loc="left", fontsize=10)
            axis.set_xlabel("Gbit/s")
        axes[0].set_ylabel("step shorter than sequential, %")
        axes[0].legend(fontsize=7, frameon=False, loc="upper left")


def main() -> None:
    nets = {net: json.loads((HERE / "raw" / f"{net}.json").read_text())["points"] for net in NETS}
    best_points(nets)
    print()
    some_points(nets)
    all_points(nets)
    draw(nets, HERE / "dynacomm.svg")


if __name__ == "__main__":
    main()
