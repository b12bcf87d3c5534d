"""Step time by formula: Asteroid's cost model, for ranking only.

Ye et al., "Asteroid", MobiCom 2024. The equations are those of two unofficial re-implementations that cite
the paper's equation numbers; we derived them anew but have not held them against the paper itself.

A plan is a list of steps: compute of stage 0, link, compute of stage 1, ... Step ``c`` takes ``E_c`` seconds
a micro-batch, forward and backward together. The dominant step is the one with the greatest
``M * E_c + sum of E_i before it``; call that time G. Published is ``max over stages of Tw_s + Te_s + Ta_s``:
first forward arrives, all forwards and backwards, gradient sum. Written out, ``Tw_s + Te_s`` is G less the
backwards before s, whether s stands before or behind the dominant step, so

    round = G + max(0, max over s of (Ta_s - sum over i < s of Eb_i)).

Three corrections are ours. Links are full duplex: they are busy ``max(Ef, Eb)`` a micro-batch, and latency
counts once. From step to step there is no barrier unless gradients are clipped by their global norm: stage s
starts its next step when its own sum is done, so that ``E_i`` stands in place of ``Eb_i``. And K
micro-batches in flight through a round trip of R seconds cannot take less than ``M * R / K``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from spanwise.core.plan import Plan, Replica, Stage
from spanwise.planner.facts.links import Lane, Shares
from spanwise.planner.problem import Problem

INFINITE = float("inf")
# A device that holds several stages makes them wait for each other: simulated plans lose up to a third once
# such a device is busy more than about three quarters of the time. Per further stage that it holds:
SHARED = 0.3


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the pipeline: compute of a stage, or the link behind it; seconds a micro-batch.

    ``busy_s`` is how long it cannot take the next micro-batch, ``sum_s`` its gradient sum and update.
    """

    kind: Literal["compute", "link"]
    name: str
    forward_s: float
    backward_s: float
    busy_s: float
    sum_s: float = 0.0

    @property
    def both_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


StageStep = tuple[Step, tuple[tuple[str, float], ...]]  # and by device how long a micro-batch keeps it busy


@dataclass(frozen=True, slots=True)
class Price:
    """Predicted seconds of a step and what limits it."""

    step_time_s: float
    bottleneck: str


def dominant(steps: Sequence[Step], micro_batches: int) -> tuple[int, float]:
    """Index of the dominant step and its time G."""
    best, most, before = 0, -1.0, 0.0
    for index, step in enumerate(steps):
        time = (micro_batches - 1) * step.busy_s + step.both_s + before
        if time > most:
            best, most = index, time
        before += step.both_s
    return best, most


def round_s(steps: Sequence[Step], micro_batches: int, *, barrier: bool) -> float:
    """Seconds of one training step, given as many micro-batches in flight as it needs.

    Args:
        steps: compute, link, compute, ...
        micro_batches: M.
        barrier: whether all devices wait for each other at the end of the step.
    """
    _, most = dominant(steps, micro_batches)
    exposed = before = 0.0
    for step in steps:
        exposed = max(exposed, step.sum_s - before)
        before += step.backward_s if barrier else step.both_s
    return most + exposed


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A plan in numbers.

    Attributes:
        steps: compute, link, compute, ...; in front the input link where data devices compute as well.
        bounds: what it cannot beat however the steps are put together.
        inputs: all messages with raw data of a micro-batch.
        forth, back: all with activations and gradients, for every cut.
    """

    steps: list[Step]
    bounds: list[Price]
    inputs: Lane
    forth: list[Lane]
    back: list[Lane]


def pipeline_of(problem: Problem, plan: Plan) -> Pipeline | None:
    """None where a link is missing."""
    lanes = _lanes(problem, plan)
    found = [lane for lane in lanes if lane is not None]
    if len(found) < len(lanes):
        return None
    steps, bounds = _steps(problem, plan, found)
    return Pipeline(steps, bounds, found[0], found[1::2], found[2::2])


def price(problem: Problem, plan: Plan) -> Price:
    """Step time of a plan by formula; infinite where a link is missing."""
    found = pipeline_of(problem, plan)
    if found is None:
        return Price(INFINITE, "a link that does not exist")
    steps, bounds = found.steps, found.bounds
    index, _ = dominant(steps, plan.micro_batches)
    best = Price(
        round_s(steps, plan.micro_batches, barrier=problem.job.clip_norm is not None), steps[index].name
    )
    for bound in (*bounds, *_in_flight_bounds(plan, steps)):
        if bound.step_time_s > best.step_time_s:
            best = bound
    return best


def _lanes(problem: Problem, plan: Plan) -> list[Lane | None]:
    """Inputs; then forward and backward of every cut."""
    index = problem.index

    def shares(replicas: tuple[Replica, ...]) -> Shares:
        return tuple((index[r.device], float(r.rows)) for r in replicas)

    groups = [shares(stage.replicas) for stage in plan.stages]
    sources = shares(plan.sources)
    lanes = [problem.links.lane(sources, groups[0])]
    if problem.graph.label_row_bytes and problem.links.lane(sources, groups[-1]) is None:
        lanes.append(None)
    for before, after in pairwise(groups):
        lanes += [problem.links.lane(before, after, cut=True), problem.links.lane(after, before, cut=True)]
    return lanes


def _steps(problem: Problem, plan: Plan, lanes: list[Lane]) -> tuple[list[Step], list[Price]]:
    rows, count, last = plan.micro_batch_rows, plan.micro_batches, len(plan.stages) - 1
    loads: dict[str, float] = {}
    used: dict[str, float] = {}
    raw = rows * problem.graph.input_row_bytes
    for name, load in lanes[0].loads:
        loads[name] = loads.get(name, 0.0) + load * raw
    steps: list[Step] = []
    for number, stage in enumerate(plan.stages):
        messages = (
            lanes[0].messages_in if number == 0 else lanes[2 * number - 1].messages_in,
            0 if number == last else lanes[2 * number + 1].messages_out,
        )
        steps.append(_compute(problem, stage, sum(messages), used))
        if number == last:
            break
        forth, back = lanes[2 * number + 1], lanes[2 * number + 2]
        layer = problem.graph.layers[stage.stop - 1]
        for lane, size in ((forth, layer.cut_bytes), (back, layer.gradient_cut_bytes)):
            for name, load in lane.loads:
                loads[name] = loads.get(name, 0.0) + load * size * rows
        names = f"link {'+'.join(stage.devices)} > {'+'.join(plan.stages[number + 1].devices)}"
        steps.append(link_step(names, rows * layer.cut_bytes, rows * layer.gradient_cut_bytes, forth, back))
    computing = {problem.index[device] for stage in plan.stages for device in stage.devices}
    # A device that only holds data runs ahead; one that computes sends when its own next step begins.
    waits = computing.intersection(lanes[0].senders)
    fill = lanes[0].latency_s + raw * lanes[0].s_per_byte if waits else 0.0
    if fill:
        first = steps[0]
        steps.insert(0, Step("link", "input link", fill, 0.0, raw * lanes[0].s_per_byte))
        assert first.kind == "compute"
    bounds = [Price(count * load, f"network {name}") for name, load in loads.items()]
    held = [device for stage in plan.stages for device in stage.devices]
    for device, busy in used.items():
        stages = held.count(device)
        if stages > 1:
            bound = (1 + SHARED * (stages - 1)) * count * busy
            bounds.append(Price(bound, f"compute on {device}, which holds {stages} stages"))
    return steps, bounds


def link_step(name: str, forth_bytes: float, back_bytes: float, forth: Lane, back: Lane) -> Step:
    """The step of a cut; ``forth_bytes`` and ``back_bytes`` are those of a micro-batch."""
    out, into = forth_bytes * forth.s_per_byte, back_bytes * back.s_per_byte
    return Step("link", name, out + forth.latency_s, into + back.latency_s, max(out, into))


def _compute(problem: Problem, stage: Stage, messages: int, used: dict[str, float]) -> Step:
    key = (stage.start, stage.stop, stage.replicas, stage.recompute, messages)
    known = problem.memo.steps
    if key not in known:
        known[key] = _stage_step(problem, stage, messages)
    step, busy = known[key]
    for device, seconds in busy:
        used[device] = used.get(device, 0.0) + seconds
    return step


def _stage_step(problem: Problem, stage: Stage, messages: int) -> StageStep:
    tables = problem.tables
    index = problem.index
    forward = backward = update = 0.0
    busy: list[tuple[str, float]] = []
    nbytes = float(tables.parameters[stage.start, stage.stop])
    for replica in stage.replicas:
        d, y = index[replica.device], replica.rows
        extra = messages * float(tables.message_s[d])
        f = float(tables.forward[d, stage.stop, y] - tables.forward[d, stage.start, y]) + extra
        b = float(tables.backward[d, stage.stop, y] - tables.backward[d, stage.start, y]) + extra
        for start, stop in stage.recompute:
            b += float(tables.forward[d, stop, y] - tables.forward[d, start, y])
        busy.append((replica.device, f + b))
        forward, backward = max(forward, f), max(backward, b)
        update = max(update, float(tables.update_s_per_byte[d]) * nbytes)
    per_byte, fixed = problem.links.ring(tuple(index[d] for d in stage.devices))
    name = f"compute on {'+'.join(stage.devices)}"
    total_s = per_byte * nbytes + fixed + update
    return Step("compute", name, forward, backward, forward + backward, total_s), tuple(busy)


def _in_flight_bounds(plan: Plan, steps: list[Step]) -> list[Price]:
    """``M * R / K`` for every stage, R from its forward to its backward of the same micro-batch."""
    if plan.schedule == "gpipe":
        return []
    out: list[Price] = []
    computing = [i for i, step in enumerate(steps) if step.kind == "compute"]
    for stage, at in zip(plan.stages, computing, strict=True):
        trip = sum(step.both_s for step in steps[at:])
        if stage.warmup < plan.micro_batches:
            bound = plan.micro_batches * trip / stage.warmup
            out.append(Price(bound, f"warm-up depth {stage.warmup} on {'+'.join(stage.devices)}"))
    return out
