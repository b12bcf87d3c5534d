"""Any plan on any cluster: it ends, no lane does two things at once, nothing is faster than it can be."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from strategies import Case, cases

from spanwise.core.errors import PlanError
from spanwise.core.order import Kept
from spanwise.core.program import Action, Program
from spanwise.core.timeline import Timeline
from spanwise.cost.halves import portions
from spanwise.cost.training import again_s, kept_bytes, ring_edge_bytes, stage_bytes
from spanwise.lowering import check, lower
from spanwise.planner.plans import feasible
from spanwise.simulator import simulate

COPIES = 1
COMPUTE = ("forward", "backward", "backward_input", "backward_weight")
ROUNDING = 1e-9


def lowered(case: Case) -> Program:
    """The Program; cases without any possible order are left out, which only reuse of devices can cause."""
    held = [device for stage in case.plan.stages for device in stage.devices]
    try:
        return lower(case.plan, case.graph, clip=case.clip)
    except PlanError as error:
        if "no order" not in str(error) or len(held) == len(set(held)):
            raise
    assume(False)
    raise AssertionError("unreachable")


def run(case: Case, program: Program, *, steps: int = 1, spans: bool = True) -> Timeline:
    return simulate(
        program, case.plan, case.graph, case.profile, case.cluster,
        optimizer_copies=COPIES, steps=steps, spans=spans,
    )  # fmt: skip


def sent_bytes(program: Program) -> dict[tuple[str, str], float]:
    """Bytes of a step over every ordered pair, rings included."""
    out: dict[tuple[str, str], float] = defaultdict(float)
    for device, actions in program.devices.items():
        for action in actions:
            if action.kind == "send":
                out[device, action.peer] += action.nbytes
            elif action.kind == "reduce":
                after = action.members[(action.members.index(device) + 1) % len(action.members)]
                out[device, after] += ring_edge_bytes(len(action.members), action.nbytes)
    return out


def seconds(case: Case, action: Action, device: str) -> float:
    """The definition: of weight halves, each portion as one micro-batch of as many rows."""
    profile, stage, rows = case.profile, case.plan.stages[action.stage], action.rows[1] - action.rows[0]
    start, stop = action.layers or (stage.start, stage.stop)
    match action.kind:
        case "forward":
            return profile.forward_s(device, start, stop, rows)
        case "backward":
            return profile.backward_s(device, start, stop, rows)
        case "backward_input":
            return profile.halves_s(device, start, stop, rows)[0]
        case _:
            return sum(
                profile.halves_s(device, layer, layer + 1, size * rows)[1]
                for layer in range(start, stop)
                for size in portions(case.graph.layers[layer], rows, action.at_once)
            )


def compute_s(case: Case, program: Program) -> dict[str, float]:
    """Busy seconds of a step on every device."""
    out: dict[str, float] = {}
    sizes = {p.name: p.bytes for p in case.graph.parameters}
    for device, actions in program.devices.items():
        table, factor = case.profile.table(device)
        total = 0.0
        for action in actions:
            rows = action.rows[1] - action.rows[0]
            if action.kind in COMPUTE:
                stage = case.plan.stages[action.stage]
                total += seconds(case, action, device)
                if action.kind in ("backward", "backward_input"):
                    total += again_s(case.profile, stage, device, rows)
            elif action.kind in ("send", "recv"):
                total += factor * (table.message_s + action.nbytes * table.message_s_per_byte)
            elif action.kind == "reduce":  # every round of a ring sends one message and receives one
                n = len(action.members)
                total += (
                    factor * 4 * (n - 1) * (table.message_s + action.nbytes / n * table.message_s_per_byte)
                )
                total += factor * action.nbytes * table.sum_s_per_byte
            elif action.kind == "step":
                total += case.profile.update_s(device, sum(sizes[n] for n in program.held[device]))
        out[device] = total
    return out


@settings(
    max_examples=200, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(cases())
def test_what_holds_of_every_run(case: Case) -> None:
    """Every rule on every case: to make and lower a case takes longer than to run it."""
    program = lowered(case)
    it_ends_and_every_step_does_the_same_work(case, program)
    no_micro_batch_may_miss_its_weight_half(case, program)
    two = run(case, program, steps=2)
    no_lane_does_two_things_at_once(two)
    nothing_is_faster_than_it_can_be(case, program)
    it_is_deterministic_and_spans_change_nothing(case, program, two)
    memory_returns_to_its_base_and_stays_below_the_bound(case, program, two)


def it_ends_and_every_step_does_the_same_work(case: Case, program: Program) -> None:
    check(program, case.plan, case.graph)
    timeline = run(case, program, steps=3)
    work = compute_s(case, program)
    sent = sent_bytes(program)
    for device in program.devices:
        use = timeline.device(device)
        assert math.isclose(use.busy_s, work[device], rel_tol=1e-9, abs_tol=1e-12)
        assert use.sent_bytes == round(sum(n for (a, _), n in sent.items() if a == device))
    for device, actions in program.devices.items():
        expected = [str(a) for a in actions if a.kind in (*COMPUTE, "step")] * 3
        lane = [s for s in timeline.spans if s.lane == device and s.kind != "wait"]
        assert [s.action for s in sorted(lane, key=lambda s: (s.start_s, s.end_s))] == expected
    sends = [a for actions in program.devices.values() for a in actions if a.kind == "send"]
    moved = [s for s in timeline.spans if ">" in s.lane and s.kind != "reduce"]
    assert len(moved) == 3 * len(sends)


def no_micro_batch_may_miss_its_weight_half(case: Case, program: Program) -> None:
    """Negative control of the check: weight halves that are done at once, without one of them."""
    for device, actions in program.devices.items():
        for at, action in enumerate(actions):
            if action.at_once > 1:
                for fewer in (
                    action._replace(at_once=action.at_once - 1),
                    action._replace(micro_batch=action.micro_batch + 1, at_once=action.at_once - 1),
                ):
                    changed = {**program.devices, device: (*actions[:at], fewer, *actions[at + 1 :])}
                    with pytest.raises(PlanError, match="weight half"):
                        check(replace(program, devices=changed), case.plan, case.graph)
                return


def no_lane_does_two_things_at_once(timeline: Timeline) -> None:
    """Messages of one ordered pair neither; a reduction may run beside them."""
    lanes = defaultdict(list)
    for span in timeline.spans:
        assert 0 <= span.start_s <= span.end_s
        if span.kind != "reduce":
            lanes[span.lane].append(span)
    for spans in lanes.values():
        spans.sort(key=lambda span: (span.start_s, span.end_s))
        for before, after in pairwise(spans):
            assert before.end_s <= after.start_s + ROUNDING


def nothing_is_faster_than_it_can_be(case: Case, program: Program) -> None:
    """A step takes at least the compute of every device and the bytes of every capacity."""
    bounds = list(compute_s(case, program).values())
    loads: dict[tuple[str, float], float] = defaultdict(float)
    measured = {(link.source, link.target): link for link in case.profile.links}
    for (a, b), nbytes in sent_bytes(program).items():
        link = measured.get((a, b))
        if link is not None:
            bounds.append(nbytes / link.bandwidth_bytes_per_s)
        if not measured:  # else shared capacities are those that were measured
            for resource in case.cluster.route(a, b).resources:
                loads[resource] += nbytes
    bounds += [nbytes / rate for (_, rate), nbytes in loads.items()]
    one = run(case, program, spans=False)
    assert one.step_time_s >= max(bounds) * (1 - ROUNDING)
    for steps in (2, 4):
        timeline = run(case, program, steps=steps)
        end = max((span.end_s for span in timeline.spans), default=0.0)
        assert end >= steps * max(bounds) * (1 - ROUNDING)


def it_is_deterministic_and_spans_change_nothing(case: Case, program: Program, first: Timeline) -> None:
    again, bare = run(case, program, steps=2), run(case, program, steps=2, spans=False)
    assert first == again
    assert bare.spans == ()
    assert bare.memory == ()
    assert (bare.step_time_s, bare.devices) == (first.step_time_s, first.devices)


def memory_returns_to_its_base_and_stays_below_the_bound(
    case: Case, program: Program, timeline: Timeline
) -> None:
    steps = 2
    levels: dict[str, list[int]] = defaultdict(list)
    for point in timeline.memory:
        levels[point.device].append(point.bytes)
    for device in program.devices:
        assert levels[device][-1] == levels[device][0] == min(levels[device])
        assert max(levels[device]) == timeline.device(device).peak_memory_bytes
        assert timeline.device(device).peak_memory_bytes <= bound_bytes(case, device, steps)


def bound_bytes(case: Case, device: str, steps: int) -> int:
    """Sum of ``stage_bytes`` over the stages of a device, and what a plan may pile up beyond that.

    Inputs and labels come from sources that run ahead. A micro-batch is at one place of a stage: waiting,
    in flight, or leaving as a gradient; at most as many are in any of these as the stage before runs ahead.
    ``stage_bytes`` covers two more than are in flight, and those that wait instead of being in flight as
    long as what is saved includes what comes in.
    """
    plan, graph = case.plan, case.graph
    synced = any(device in sync.devices for sync in plan.syncs)
    in_halves = plan.schedule == "zero_bubble" or any(sync.most_segments > 1 for sync in plan.syncs)
    total = 0
    in_flight = [feasible.kept(stage, plan.schedule, plan.micro_batches) for stage in plan.stages]
    if any(sync.most_segments > 1 for sync in plan.syncs):  # the last micro-batch may go back in halves
        in_flight = [(*kept, Kept(0, 1)) for kept in in_flight]
    depths = [max(whole for whole, _ in kept) for kept in in_flight]
    raw = graph.input_row_bytes + graph.label_row_bytes
    for source in plan.sources:
        if source.device == device:  # to both ends of the pipeline
            total += plan.micro_batches * source.rows * raw
    for index, stage in enumerate(plan.stages):
        for replica in stage.replicas:
            if replica.device != device:
                continue
            depth = depths[index]
            total += max(
                stage_bytes(
                    graph, stage.start, stage.stop, rows=replica.rows, in_flight=whole, halved=halved,
                    in_halves=in_halves, recompute=stage.recompute, copies=COPIES, synced=synced,
                )
                for whole, halved in in_flight[index]
            )  # fmt: skip
            if index in (0, len(plan.stages) - 1):
                total += steps * plan.micro_batches * replica.rows * raw
            if index > 0:
                into = replica.rows * graph.layers[stage.start - 1].cut_bytes
                kept = kept_bytes(graph, stage.start, stage.stop, replica.rows, stage.recompute)
                total += max(depths[index - 1] - depth - 2, 0) * into + depth * max(into - kept, 0)
    return total
