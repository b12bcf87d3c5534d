"""Quality of plans: the hybrid planner against exhaustive search on 200 random small clusters."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import FAMILIES, small
from harness import keep, parser
from oracle import NONE, exhaustive

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan
from spanwise.planner import Problem
from spanwise.planner.plans.finish import at_both_depths
from spanwise.planner.plans.trial import priced, timeline
from spanwise.planner.search.extensions import END, Extension
from spanwise.planner.search.groups import Groups
from spanwise.planner.search.outlines import refined_outlines
from spanwise.planner.search.sets import Search
from spanwise.planner.strategies.hpp import FINALISTS, hpp

CLUSTERS = 200
EXHAUSTIVE = ("plans", "best_s", "best_whole_s", "best_price_s")
Row = dict[str, Any]
SIZES = (4, 5, 6)


def memory_sorted(problem: Problem) -> Plan:
    """The control: all cuts and groups along one order of devices, largest memory first, as Asteroid has it.

    Its plans are finished like those of ``hpp``, by simulation at both depths: only the order differs.
    """
    budget = problem.tables.budget
    order = sorted(range(len(budget)), key=lambda d: (-float(budget[d]), d))
    groups = Groups(problem, tuple(range(len(problem.graph) + 1)), problem.micro_batch_choices(), 1)
    search = Search(groups, _suffixes(order))
    outlines = [search.outline(f) for f in search.found()]
    if not outlines:
        raise InfeasibleError("the memory-sorted order has no plan")
    return at_both_depths(problem, "memory_sorted", outlines[:64], FINALISTS)


def _suffixes(order: list[int]) -> Any:
    """The last devices of the order, in front of them any number of those that come before."""
    count = len(order)
    for first in reversed(range(count)):
        for stop in range(first + 1, count + 1):
            yield Extension(
                count - first, tuple(sorted(order[first:stop])), count - stop if stop < count else END
            )


def cluster(number: int) -> tuple[str, int, int]:
    """Family, devices and seed of one of the clusters."""
    return FAMILIES[number % 3], SIZES[number // 3 % 3], number


def planned_s(problem: Problem, planner: Callable[[Problem], Plan]) -> float:
    """Simulated step time of what a planner makes; infinite if it has no plan."""
    try:
        return timeline(problem, planner(problem)).step_time_s
    except InfeasibleError:
        return NONE


def searched_price(problem: Problem) -> float:
    """The least price among the plans that the search finds, before any simulation."""
    try:
        return priced(problem, "hpp", refined_outlines(problem, singles=False))[0].price_s
    except InfeasibleError:
        return NONE


def study(number: int, known: Row | None) -> Row:
    """One cluster. ``None`` in place of infinity, as JSON has none.

    ``known``: what the exhaustive search is taken from, which does not change with the planner.
    """
    family, devices, seed = cluster(number)
    best = known and {key: known[key] for key in EXHAUSTIVE}
    if best is None:
        found = exhaustive(small(family, devices, seed))
        best = {
            "plans": found.looked_at, "best_s": found.finished_s, "best_whole_s": found.simulated_s,
            "best_price_s": found.price_s,
        }  # fmt: skip
    start = time.process_time()
    own = planned_s(small(family, devices, seed), hpp)
    taken = time.process_time() - start
    row: Row = {
        "number": number, "family": family, "devices": devices, "hpp_cpu_s": taken, "hpp_s": own,
        "control_s": planned_s(small(family, devices, seed), memory_sorted),
        "hpp_price_s": searched_price(small(family, devices, seed)), **best,
    }  # fmt: skip
    return {key: None if value == NONE else value for key, value in row.items()}


def gaps(rows: list[Row], key: str, best: str) -> list[float]:
    """How much slower than the best, where both have a plan."""
    return [row[key] / row[best] - 1 for row in rows if row[key] is not None and row[best] is not None]


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """By family, and of all."""
    out: list[dict[str, Any]] = []
    for family in (*FAMILIES, "all"):
        own = [row for row in rows if family in ("all", row["family"])]
        feasible = [row for row in own if row["best_s"] is not None]
        found, control = gaps(own, "hpp_s", "best_s"), gaps(own, "control_s", "best_s")
        priced_gaps, whole = gaps(own, "hpp_price_s", "best_price_s"), gaps(own, "hpp_s", "best_whole_s")
        if not found:
            continue
        out.append(
            {
                "family": family, "clusters": len(own), "feasible": len(feasible),
                "missed": sum(row["hpp_s"] is None for row in feasible),
                "mean_gap": mean(found), "worst_gap": max(found),
                "mean_gap_whole": mean(whole), "worst_gap_whole": max(whole),
                "mean_price_gap": mean(priced_gaps), "worst_price_gap": max(priced_gaps),
                "control_mean_gap": mean(control), "control_worst_gap": max(control),
                "control_missed": sum(row["control_s"] is None for row in feasible),
            }
        )  # fmt: skip
    return out


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--first", type=int, default=0, help="number of the first cluster")
    options.add_argument("--clusters", type=int, default=None, help="how many; others in --out are kept")
    options.add_argument("--again", action="store_true", help="plan anew; the best plans are those in --out")
    args = options.parse_args()
    count = args.clusters or (9 if args.short else CLUSTERS)
    kept: list[Row] = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    by_number = {row["number"]: row for row in kept}
    for number in range(args.first, args.first + count):
        by_number[number] = study(number, by_number.get(number) if args.again else None)
    rows = sorted(by_number.values(), key=lambda row: row["number"])
    result = {"table": table(rows), "rows": rows}
    keep(args, Path(__file__).parent, "quality", result, quiet=True)
    print(json.dumps(result["table"], indent=1))


if __name__ == "__main__":
    main()
