"""What is planned while somebody waits: a HierTrain plan, segments of a chain, segments of a run cut anew."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import large, unlike

from spanwise.core.observed import Arrival, Departure, DeviceStep
from spanwise.core.plan import Plan
from spanwise.lowering import lower
from spanwise.planner import Problem, make_plan
from spanwise.planner.adapting.resegment import Resegmenter
from spanwise.planner.segments.chain import best_segments
from spanwise.planner.strategies.parameter_server import exchanges, star_of

LAYERS, DEEP, REPEATS = 50, 152, 50
OVERHEAD_S = 0.02  # that messages of the run show; it was planned with none


def seconds(work: Callable[[], object], before: Callable[[], None] = lambda: None, repeats: int = 1) -> float:
    """The median of some repeats; what comes before each does not count."""
    found: list[float] = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return median(found)


def step(problem: Problem, plan: Plan, number: int) -> tuple[DeviceStep, ...]:
    """What devices tell of a step whose messages take that overhead and 1, 2, 3 ... us for 10 bytes."""
    sent: dict[str, list[Departure]] = {device: [] for device in plan.devices}
    came: dict[str, list[Arrival]] = {device: [] for device in plan.devices}
    for device, actions in lower(plan, problem.graph).devices.items():
        free_s: dict[str, float] = {}
        for action in actions:
            if action.kind == "send" and action.payload == "push":
                begin_s = free_s.get(action.peer, 0.0)
                slow = 1 + plan.devices.index(device)  # no two workers alike
                free_s[action.peer] = end_s = begin_s + OVERHEAD_S + slow * action.nbytes * 1e-7
                tag = 1000 * number + action.transfer
                sent[device].append(Departure(action.peer, tag, action.nbytes, begin_s))
                latency_s = problem.cluster.route(device, action.peer).latency_s
                came[action.peer].append(Arrival(device, tag, end_s + latency_s, True))
    return tuple(DeviceStep(d, (), tuple(sent[d]), tuple(came[d])) for d in plan.devices)


def anew_s(workers: int) -> float:
    """Of cutting anew when the fit of every worker's pushes has moved."""
    problem = large(workers + 1, DEEP, 0, sites=1)
    plan = make_plan(problem, "dynacomm")
    follower = Resegmenter.of(problem, plan)
    assert follower is not None
    planned = dict(follower._cut_by)
    for number in range(4):
        follower.add(1.0, step(problem, plan, number))
    assert len(follower.fits) == workers
    assert follower.cut_anew() is not None
    return seconds(follower.cut_anew, lambda: follower._cut_by.update(planned), REPEATS)


def main() -> None:
    three = unlike(3, LAYERS, 0)
    chain = exchanges(deep := large(2, DEEP, 0, sites=1), star_of(deep), by_latency=False)[0].pull
    print(f"hiertrain, 3 devices x {LAYERS} layers: {seconds(lambda: make_plan(three, 'hiertrain')):.2f} s")
    print(f"segments of {DEEP} layers: {1e3 * seconds(lambda: best_segments(chain), repeats=REPEATS):.2f} ms")
    for workers in (1, 4):
        print(f"cut anew, {DEEP} layers, {workers} workers: {1e3 * anew_s(workers):.2f} ms")


if __name__ == "__main__":
    main()
