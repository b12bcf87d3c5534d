"""DynaComm as a model study: what cutting pulls and pushes into segments takes off a step, by rule.

Layers are those of ``tables``, compute is multiply-adds over a device's speed, messages are an overhead and
bytes over a rate. Nothing is measured here: these are the formulas that the planner uses.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import keep, parser
from nets import NETS, read

from spanwise.planner.segments.chain import Chain, Exchange, bound_ns, step_ns
from spanwise.planner.segments.duplex import duplex_bound_ns
from spanwise.planner.segments.duplex_search import duplex
from spanwise.planner.segments.rules import SEGMENT_RULES

HERE = Path(__file__).resolve().parent
RATES_GBIT = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
OVERHEADS_MS = (1, 5, 10, 20)
FLOPS_PER_S = 1e12
ROWS = 32
BYTES = 4  # of a parameter
# Backward computes two products where forward computes one.
BACKWARD = 2
SHORT = ((1.0, 10),)


def exchange(net: str, gbit: float, overhead_ms: float) -> Exchange:
    """A worker's step on one of the points of the study."""
    layers = read(net)
    sizes = tuple(BYTES * layer.parameters for layer in layers)
    forward = [2 * layer.multiply_adds * ROWS / FLOPS_PER_S for layer in layers]
    overhead_s, rate = overhead_ms / 1000, gbit * 1e9 / 8
    pull = Chain.of(sizes, forward, overhead_s, rate)
    return Exchange(pull, Chain.of(sizes, [BACKWARD * s for s in forward], overhead_s, rate), sizes)


def point(net: str, gbit: float, overhead_ms: float) -> dict[str, Any]:
    """Nanoseconds of a step, and numbers of segments, under every rule."""
    task = exchange(net, gbit, overhead_ms)
    cuts = {name: rule(task) for name, rule in SEGMENT_RULES.items()}
    plan = duplex([task])
    return {
        "gbit_per_s": gbit, "overhead_ms": overhead_ms,
        "step_ns": {**{name: step_ns(task, own) for name, own in cuts.items()}, "duplex": plan.step_ns},
        "bound_ns": bound_ns(task.pull) + bound_ns(task.push), "duplex_bound_ns": duplex_bound_ns([task]),
        "segments": {
            "dynacomm": [len(cuts["dynacomm"].pull), len(cuts["dynacomm"].push)],
            "duplex": [len(plan.workers[0].cuts.pull), len(plan.workers[0].cuts.push)],
        },
    }  # fmt: skip


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    args = options.parse_args()
    points = SHORT if args.short else [(r, o) for r in RATES_GBIT for o in OVERHEADS_MS]
    for net in args.nets:
        setting = {"net": net, "flops_per_s": FLOPS_PER_S, "rows": ROWS, "bytes": BYTES, "backward": BACKWARD}
        result = {**setting, "points": [point(net, gbit, overhead) for gbit, overhead in points]}
        keep(args, HERE, net, result, quiet=not args.short)


if __name__ == "__main__":
    main()
