"""Step time by recurrence: when every forward and backward of a pipeline ends.

Between the formula of ``price.py``, which knows no order of forwards and backwards, and the simulator, which
knows all of a plan: stages take their micro-batches in the order of the schedule, and all messages from one
stage to the next are one, which waits until the capacities on its way are free. It takes a tenth of a
simulation or less, so it tells which of many plans are worth one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from spanwise.core.order import OpKind, joined
from spanwise.core.plan import Plan, Stage
from spanwise.planner.facts.links import Lane
from spanwise.planner.plans.bubble import joined_s, stage_seconds
from spanwise.planner.plans.price import INFINITE, Pipeline, Step, pipeline_of, price
from spanwise.planner.problem import Problem
from spanwise.schedules import stage_order

ROUNDS = 2  # steps, one after the other; the time from the end of the first to that of the second counts


@dataclass(slots=True)
class _Way:
    """All messages from one stage to the next: seconds that they occupy each capacity, then the latency."""

    busy: list[tuple[str, float]]
    latency_s: float
    longest_s: float
    free: dict[str, float]

    @classmethod
    def of(cls, lane: Lane, nbytes: float, free: dict[str, float]) -> _Way:
        busy = [(name, nbytes * load) for name, load in lane.loads]
        return cls(busy, lane.latency_s, max((s for _, s in busy), default=0.0), free)

    def arrival(self, sent: float) -> float:
        """One after the other on a capacity; those that overlap take as long as side by side."""
        free, begin = self.free, sent
        for name, _ in self.busy:
            if free[name] > begin:
                begin = free[name]
        for name, seconds in self.busy:
            free[name] = begin + seconds
        return begin + self.longest_s + self.latency_s


_Work = tuple[OpKind, int, float]  # of a micro-batch, in seconds; several weight halves at once are one


@dataclass(slots=True)
class _Stage:
    """A stage with its orders, and when what it waits for arrives, by micro-batch."""

    sum_s: float
    ops: tuple[_Work, ...]
    onward: _Way | None
    back: _Way | None
    free: float = 0.0
    at: int = 0
    runs: bool = False
    inputs: dict[int, float] = field(default_factory=dict[int, float])
    gradients: dict[int, float] = field(default_factory=dict[int, float])


def pace_s(problem: Problem, plan: Plan) -> float:
    """Seconds of a step; infinite where a link is missing.

    Where a device holds several stages, which the recurrence does not know, it is the price.
    """
    key = (plan.stages, plan.sources, plan.micro_batches, plan.schedule)
    known = problem.memo.paces
    if key not in known:
        known[key] = _pace_s(problem, plan)
    return known[key]


def _pace_s(problem: Problem, plan: Plan) -> float:
    held = [device for stage in plan.stages for device in stage.devices]
    if len(set(held)) < len(held) or len(plan.stages) == 1:
        return price(problem, plan).step_time_s
    found = pipeline_of(problem, plan)
    if found is None:
        return INFINITE
    names = [name for lane in (found.inputs, *found.forth, *found.back) for name, _ in lane.loads]
    free = dict.fromkeys(names, 0.0)
    stages = _stages(problem, plan, found, free)
    # Raw rows come in beside the rest: how they share a link with it only counts as a bound.
    raw = _Way.of(found.inputs, plan.micro_batch_rows * problem.graph.input_row_bytes, dict(free))
    waits = found.steps[0].kind == "link"
    ends: list[float] = []
    for _ in range(ROUNDS):
        begin = stages[0].free if waits else 0.0  # devices that only hold data run ahead
        _round(stages, {m: raw.arrival(begin) for m in range(plan.micro_batches)})
        for stage in stages:
            stage.free += stage.sum_s
        ends.append(max(stage.free for stage in stages))
        if problem.job.clip_norm is not None:
            for stage in stages:
                stage.free = ends[-1]
    return max(ends[-1] - ends[-2], *(bound.step_time_s for bound in found.bounds), 0.0)


def _stages(problem: Problem, plan: Plan, found: Pipeline, free: dict[str, float]) -> list[_Stage]:
    computing = [step for step in found.steps if step.kind == "compute"]
    forth: list[_Way | None] = []
    back: list[_Way | None] = [None]
    for stage, out, into in zip(plan.stages[:-1], found.forth, found.back, strict=True):
        layer, rows = problem.graph.layers[stage.stop - 1], plan.micro_batch_rows
        forth.append(_Way.of(out, rows * layer.cut_bytes, free))
        back.append(_Way.of(into, rows * layer.gradient_cut_bytes, free))
    forth.append(None)
    return [
        _Stage(step.sum_s, tuple(_work(problem, plan, stage, step)), onward, backward)
        for stage, step, onward, backward in zip(plan.stages, computing, forth, back, strict=True)
    ]


def _work(problem: Problem, plan: Plan, stage: Stage, step: Step) -> Iterator[_Work]:
    order = stage_order(plan.schedule, plan.micro_batches, stage.warmup, stage.ops)
    seconds: dict[OpKind, float]
    if plan.schedule != "zero_bubble":
        seconds = {"forward": step.forward_s, "backward": step.backward_s}
    else:
        halves = stage_seconds(problem, stage)
        seconds = {"forward": halves.forward_s, "backward_input": halves.input_s}
    weights: dict[int, float] = {}  # weight halves by how many are done at once
    for (kind, m), count in joined(order):
        if kind == "backward_weight":
            if count not in weights:
                weights[count] = joined_s(problem, stage, count)
            yield kind, m, weights[count]
        else:
            yield kind, m, seconds[kind]


def _round(stages: list[_Stage], inputs: dict[int, float]) -> None:
    """All operations of one step in the order in which they end, as messages queue in that order."""
    for stage in stages:
        stage.at, stage.inputs, stage.gradients = 0, {}, {}
    stages[0].inputs = inputs
    queue: list[tuple[float, int]] = []
    _begin(stages, 0, queue)
    while queue:
        end, number = heappop(queue)
        stage = stages[number]
        kind, m, _ = stage.ops[stage.at]
        stage.at += 1
        stage.runs = False
        if kind == "forward" and stage.onward is not None:
            stages[number + 1].inputs[m] = stage.onward.arrival(end)
            _begin(stages, number + 1, queue)
        elif kind == "forward":
            stage.gradients[m] = end
        elif kind != "backward_weight" and stage.back is not None:
            stages[number - 1].gradients[m] = stage.back.arrival(end)
            _begin(stages, number - 1, queue)
        _begin(stages, number, queue)


def _begin(stages: list[_Stage], number: int, queue: list[tuple[float, int]]) -> None:
    """The next operation of a stage, if it is free and what that waits for is known."""
    stage = stages[number]
    if stage.runs or stage.at == len(stage.ops):
        return
    kind, m, seconds = stage.ops[stage.at]
    free = stage.free
    if kind != "backward_weight":  # else it follows its input half on the same stage, so it is always ready
        ready = (stage.inputs if kind == "forward" else stage.gradients).get(m)
        if ready is None:
            return
        if ready > free:
            free = ready
    stage.free = free = free + seconds
    stage.runs = True
    heappush(queue, (free, number))
