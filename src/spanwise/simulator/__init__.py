"""Interprets a Program in virtual time. Knows nothing of the runtime, which interprets the same for real."""

from __future__ import annotations

from spanwise.core.cluster import Cluster
from spanwise.core.errors import InputError
from spanwise.core.faults import Fault
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.core.program import Program
from spanwise.core.timeline import DeviceUse, Timeline
from spanwise.simulator.contention import relieved, shares_machine
from spanwise.simulator.engine import Engine, feeders
from spanwise.simulator.network import max_min_rates
from spanwise.simulator.setup import Costs

__all__ = ["max_min_rates", "simulate"]

LEAST_FED = 3  # steps until those of a plan whose rows come from elsewhere are all alike


def simulate(
    program: Program,
    plan: Plan,
    graph: ModelGraph,
    profile: Profile,
    cluster: Cluster,
    *,
    optimizer_copies: int = 1,
    steps: int = 2,
    spans: bool = True,
    faults: tuple[Fault, ...] = (),
) -> Timeline:
    """The predicted Timeline of ``steps`` steps, one after the other without a barrier.

    Args:
        program: what every device does; lowered from ``plan``.
        plan: whose stages give the compute.
        graph: layers and their bytes.
        profile: layer times; its measured links replace the cluster file's.
        cluster: routes and shared capacities.
        optimizer_copies: of the parameters, for memory; see ``cost.optimizer_copies``.
        steps: how many; the step time is the distance between the ends of the last two. Where a device only
            feeds others its rows, at least three, and one more that does not count: in a last step no rows
            for the next one are on the links, and in the first ones they came too early.
        spans: whether to keep spans and memory points; planners need only the totals.
        faults: what goes wrong; a lost device or cut link ends the Timeline where nothing moves any more.

    Raises:
        PlanError: the Program never ends.
        InputError: a device without times in the profile, two devices without a link, no steps.
    """
    if steps < 1:
        raise InputError(f"simulation: {steps} steps; at least 1 is needed")
    if shares_machine(profile):
        costs = Costs(program, plan, graph, profile, cluster, optimizer_copies, ())
        profile = relieved(profile, cluster, _timeline(costs, steps=2, spans=False))
    costs = Costs(program, plan, graph, profile, cluster, optimizer_copies, faults)
    return _timeline(costs, steps=steps, spans=spans)


def _timeline(costs: Costs, *, steps: int, spans: bool) -> Timeline:
    feeding = bool(feeders(costs.program))
    steps = max(steps, LEAST_FED) if feeding and steps > 1 else steps
    engine = Engine(costs, steps=steps + feeding, spans=spans)
    trace = engine.run()
    done = min((min(lane.step, steps) for lane in engine.lanes.values()), default=0)
    ends = trace.ends[:done]
    step_s = ends[-1] - ends[-2] if len(ends) > 1 else ends[-1] if ends else 0.0
    last = max(done - 1, 0)
    uses = tuple(
        DeviceUse(
            device=device,
            busy_s=trace.busy[device][last],
            utilization=trace.busy[device][last] / step_s if step_s else 0.0,
            peak_memory_bytes=engine.memory.peak[device],
            sent_bytes=round(trace.sent[device][last]),
        )
        for device in costs.program.devices
    )
    if feeding:
        trace.spans = [span for span in trace.spans if span["step"] < steps]
    trace.spans.sort(key=lambda span: (span["lane"], span["start_s"]))
    return Timeline.model_validate(
        {
            "origin": "simulated",
            "step_time_s": step_s,
            "spans": trace.spans,
            "memory": engine.memory.points,
            "devices": uses,
        }
    )
