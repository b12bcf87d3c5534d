"""HierTrain's plans: what the formula says and what the simulator does, baselines, data that must stay."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hiertrain_cases import IDS, random_layout, three_problem
from planner_cases import make_cluster, make_graph, make_job, make_problem, make_profile
from spanwise.api.planning import predict
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InfeasibleError, InputError
from spanwise.core.plan import Plan
from spanwise.core.program import Action, Program
from spanwise.lowering import check, lower
from spanwise.planner import BASELINES, Problem, check_plan, make_plan
from spanwise.planner.hiertrain.layout import Instance, Layout, Roles
from spanwise.planner.hiertrain.model import step_time_s
from spanwise.planner.hiertrain.plan import Arena, row_orders, stages_of
from spanwise.planner.hiertrain.search import Candidate, Search
from spanwise.planner.hiertrain.strategy import THREE_MACHINES, finalists
from spanwise.planner.plans.feasible import memory_bytes
from spanwise.planner.plans.trial import timeline
from spanwise.planner.published.decided import exactly
from spanwise.simulator import simulate

OURS = ("all_device", "all_edge", "all_cloud", "split_two", "two_tier")


def plan_of(problem: Problem, layout: Layout, rows: tuple[int, ...]) -> tuple[Arena, Plan]:
    arena = Arena.on(problem, (0, 1, 2))
    decision = arena.decision(Candidate(0.0, layout, rows, 1))
    assert decision is not None
    return arena, exactly(problem, "test", decision)


def with_barrier(program: Program) -> Program:
    """Gradients are summed when all devices are through: a norm, which takes no time here, waits for all."""
    devices: dict[str, tuple[Action, ...]] = {}
    for device, actions in program.devices.items():
        sums = tuple(a for a in actions if a.kind == "reduce")
        norms = tuple(a for a in actions if a.kind in ("norm", "step"))
        devices[device] = (*(a for a in actions if a not in (*sums, *norms)), *norms[:1], *sums, *norms[1:])
    return Program(devices, program.held, program.buckets)


def as_published(arena: Arena) -> Instance:
    """Each step begins with its raw rows, as the first one does, whoever sends them."""
    return replace(arena.instance, sources=None)


def in_one_step(problem: Problem, plan: Plan, *, barrier: bool = False) -> float:
    program = lower(plan, problem.graph, clip=barrier)
    program = with_barrier(program) if barrier else program
    given = (program, plan, problem.graph, problem.profile, problem.cluster)
    return simulate(*given, steps=1, spans=False).step_time_s


@pytest.mark.parametrize("launch_s", [0.0, 1e-3])
def test_the_formula_is_what_the_simulator_finds(launch_s: float) -> None:
    """Any layout and rows, own link per pair, no latency: equal with a barrier before the sums, else no less.

    The data lies on a machine that finishes, helps or does nothing; layers take unlike times. Where machines
    update that have done with their sums before others, the formula is above the simulation.
    """
    shorter = summed = ahead = 0
    for seed in range(60):
        layout, rows = random_layout(seed, 5, 16)
        finisher = IDS[layout.roles.finisher]
        alone = three_problem(seed, launch_s=launch_s, updates=(finisher,) if layout.roles.starts else ())
        for problem in (alone, three_problem(seed, launch_s=launch_s)):
            arena, plan = plan_of(problem, layout, rows)
            formula = step_time_s(as_published(arena), layout, rows)
            barred = in_one_step(problem, plan, barrier=True)
            assert barred <= formula * (1 + 1e-9)
            assert in_one_step(problem, plan) <= formula * (1 + 1e-9)
            steady = step_time_s(arena.instance, layout, rows)
            assert timeline(problem, plan).step_time_s <= steady * (1 + 1e-9)
            assert steady <= formula * (1 + 1e-9)
            ahead += steady < formula * (1 - 1e-6)
            if problem is alone:
                assert barred == pytest.approx(formula, rel=1e-9)
                shorter += in_one_step(problem, plan) < formula * (1 - 1e-6)
                summed += bool(plan.syncs)
    assert summed > 20
    assert shorter > 5  # sums begin before all devices are through
    assert ahead > 5  # raw rows come from a device that does not compute


@pytest.mark.parametrize("seed", range(4))
def test_the_planned_step_is_the_simulated_one(seed: int) -> None:
    """The best layout of each family at one micro-batch, found through the problem."""
    problem = three_problem(seed, batch=32, updates=())
    arena = Arena.on(problem, (0, 1, 2))
    for family in THREE_MACHINES:
        found = finalists(arena, Search(arena.instance, arena.room), family)[0]
        assert found.micro_batches == 1
        _, plan = plan_of(problem, found.layout, found.rows)
        published = step_time_s(as_published(arena), found.layout, found.rows)
        assert in_one_step(problem, plan, barrier=True) == pytest.approx(published, rel=1e-9)
        assert timeline(problem, plan).step_time_s <= found.price_s * (1 + 1e-9)
        if set(problem.sources) & {d for stage in plan.stages for d in stage.devices}:
            assert found.price_s == published


def test_devices_hold_several_stages_with_their_own_rows() -> None:
    problem = three_problem(0)
    _, plan = plan_of(problem, Layout(Roles(2, (0, 1)), (2, 4)), (4, 5, 7))
    held = [[(r.device, r.rows) for r in stage.replicas] for stage in plan.stages]
    assert held == [
        [("cloud", 4), ("end", 5), ("edge", 7)],
        [("cloud", 9), ("edge", 7)],
        [("cloud", 16)],
    ]
    assert [sync.devices for sync in plan.syncs] == [("cloud", "end", "edge"), ("cloud", "edge")]
    program = lower(plan, problem.graph)
    check(program, plan, problem.graph)
    moved = [a for actions in program.devices.values() for a in actions if a.kind == "send"]
    ways = {(a.payload, a.stage, a.peer) for a in moved if a.payload != "input"}
    forth = {("activation", 0, "cloud"), ("activation", 1, "cloud")}
    assert ways == forth | {("gradient", 0, "end"), ("gradient", 1, "edge")}


@pytest.mark.parametrize(
    ("roles", "cuts", "rows", "stages"),
    [
        (Roles(2, (0, 1), False), (2, 4), (0, 6, 10), ["end:6 edge:10", "cloud:6 edge:10", "cloud:16"]),
        (Roles(2, (0, 1)), (3, 3), (4, 5, 7), ["cloud:4 end:5 edge:7", "cloud:16"]),
        (Roles(2, (0, 1)), (2, 5), (4, 5, 7), ["cloud:4 end:5 edge:7", "cloud:9 edge:7"]),
        (Roles(2, (0, 1)), (5, 5), (4, 5, 7), ["cloud:4 end:5 edge:7"]),
        (Roles(2, (0,)), (2,), (4, 12), ["cloud:4 end:12", "cloud:16"]),
        (Roles(2, (0,), starts=False), (2,), (0, 16), ["end:16", "cloud:16"]),
        (Roles(1), (), (16,), ["edge:16"]),
    ],
)  # fmt: skip
def test_empty_stages_and_replicas_without_rows_are_not_there(
    roles: Roles, cuts: tuple[int, ...], rows: tuple[int, ...], stages: list[str]
) -> None:
    found = stages_of(Layout(roles, cuts), rows, 5, ("end", "edge", "cloud"), range(len(rows)))
    assert [" ".join(f"{r.device}:{r.rows}" for r in stage.replicas) for stage in found] == stages


def test_orders_of_rows_keep_together_what_the_finisher_has() -> None:
    for count in (1, 2, 3, 4, 7):
        orders = list(row_orders(count))
        assert tuple(range(count)) in orders
        for order in orders:
            for j in range(count):
                places = [order.index(i) for i in range(j + 1)]
                assert max(places) - min(places) == j
    assert len(set(row_orders(3))) == 4


@pytest.mark.parametrize("seed", range(6))
def test_no_baseline_simulates_faster(seed: int) -> None:
    problem = three_problem(seed, batch=24) if seed % 2 else make_problem(3 + seed // 3, 6, seed)
    ours = timeline(problem, make_plan(problem, "hiertrain")).step_time_s
    more = timeline(problem, make_plan(problem, "hiertrain_n")).step_time_s
    checked = 0
    for name in OURS:
        try:
            plan = make_plan(problem, name)
        except InfeasibleError:  # no device of that tier
            continue
        checked += 1
        assert plan.strategy == name
        assert min(ours, more) <= timeline(problem, plan).step_time_s * (1 + 1e-12)
        assert ours <= timeline(problem, plan).step_time_s * (1 + 1e-12)
    assert checked >= 3


def test_baselines_are_where_their_names_say() -> None:
    problem = three_problem(1)
    held = problem.sources
    for name, devices in (("all_device", held), ("all_edge", ("edge",)), ("all_cloud", ("cloud",))):
        plan = make_plan(problem, name)
        assert [stage.devices for stage in plan.stages] == [devices]
    split = make_plan(problem, "split_two")
    assert len(split.stages) == 2
    assert not split.syncs
    two = make_plan(problem, "two_tier")
    assert len({d for stage in two.stages for d in stage.devices}) == 2
    assert set(OURS) <= set(BASELINES)


def test_a_tier_that_no_device_has_is_a_reason() -> None:
    problem = make_problem(2, 4, 0)
    text = r"^all_cloud: no device is of tier 'cloud' \(d0: edge, d1: edge\); set tier"
    with pytest.raises(InfeasibleError, match=text):
        make_plan(problem, "all_cloud")


def test_rows_fit_the_memory_that_there_is() -> None:
    """The rows' ranges by formula are those that the exact check of a plan allows."""
    problem = three_problem(3, batch=32)
    _, plan = plan_of(problem, Layout(Roles(2, (0, 1)), (2, 4)), (8, 12, 12))
    needed = memory_bytes(problem, plan.stages, "1f1b", 1)
    devices = tuple(
        d.model_copy(update={"memory_bytes": needed[d.id]}) for d in problem.cluster.devices
    )  # fmt: skip
    tight = Problem(
        problem.graph, problem.profile, problem.cluster.model_copy(update={"devices": devices}), problem.job
    )
    room = Arena.on(tight, (0, 1, 2)).room(Layout(Roles(2, (0, 1)), (2, 4)), 1)
    assert room is not None
    assert room.upper[1:] == (12, 12)
    own = room.weights
    assert own[0] * 8 + own[1] * 12 + own[2] * 12 == pytest.approx(room.most)
    for strategy in ("hiertrain", "hiertrain_n"):
        plan = make_plan(tight, strategy)
        for use in timeline(tight, plan).devices:
            assert use.peak_memory_bytes <= tight.cluster.device(use.device).memory_bytes


@pytest.mark.parametrize("strategy", ["hiertrain", "hiertrain_n"])
@pytest.mark.parametrize("share_labels", [False, True])
def test_private_rows_are_started_where_they_are(strategy: str, share_labels: bool) -> None:
    for sources in (("end",), ("end", "edge"), ("edge", "end", "cloud")):
        problem = three_problem(2, private=True, share_labels=share_labels, data_devices=sources)
        problem = Problem(
            make_graph(5, 2), problem.profile.model_copy(update={"graph_digest": make_graph(5, 2).digest}),
            problem.cluster, problem.job,
        )  # fmt: skip
        plan = make_plan(problem, strategy)
        check_plan(problem, plan)
        assert plan.stages[0].replicas == plan.sources
        if not share_labels:
            assert plan.stages[-1].replicas == plan.sources


def test_private_rows_on_four_devices_need_more_than_three_machines() -> None:
    cluster = make_cluster(5, 1)
    graph = make_graph(5, 1)
    job = make_job(16, private=True, share_labels=True, data_devices=["d0", "d1", "d3", "d4"])
    problem = Problem(graph, make_profile(graph, cluster), cluster, job)
    text = "^hiertrain: raw data on d0 and d1 and d3 and d4 must not leave them .*; use hiertrain_n"
    with pytest.raises(InfeasibleError, match=text):
        make_plan(problem, "hiertrain")
    plan = make_plan(problem, "hiertrain_n")
    check_plan(problem, plan)
    assert set(plan.stages[0].devices) == {"d0", "d1", "d3", "d4"}


def star(helpers: int) -> Problem:
    """A quick machine and many slow ones that all have the data."""
    devices = [{"id": "hub", "speed": 1.0}, *({"id": f"h{i}", "speed": 0.4} for i in range(helpers))]
    cluster = Cluster.parse(
        {"devices": devices, "data": "everywhere",
         "links": [{"between": ["site", "site"], "bandwidth": "2 Gbit/s", "latency": "0.1 ms"}]}
    )  # fmt: skip
    graph = make_graph(8, 0, parameters=2_000)
    return Problem(graph, make_profile(graph, cluster, flops_per_s=1e8, launch_s=0.0), cluster, make_job(48))


def test_more_helpers_are_used_where_they_pay() -> None:
    problem = star(5)
    three, more = (make_plan(problem, s) for s in ("hiertrain", "hiertrain_n"))
    assert len(three.devices) == 3
    assert len(more.devices) > 3
    assert timeline(problem, more).step_time_s < 0.8 * timeline(problem, three).step_time_s


def test_three_of_many_devices_are_chosen() -> None:
    problem = make_problem(8, 6, 2)
    plan = make_plan(problem, "hiertrain")
    assert len({d for stage in plan.stages for d in stage.devices}) <= 3


def test_where_activations_share_a_link_they_wait_for_each_other() -> None:
    """Both helpers are behind one link: the formula is nearer to the simulator than with two links."""
    problem = three_problem(0, data_devices=["end"])
    near = [{**d.to_data(), "site": "far" if d.id == "cloud" else "near"} for d in problem.cluster.devices]
    links = [
        {"between": ["near", "far"], "bandwidth": "5 Mbit/s"},
        {"between": ["near", "near"], "bandwidth": "1 Gbit/s"},
    ]
    cluster = Cluster.parse({"devices": near, "links": links, "data": ["end"]})
    shared = Problem(problem.graph, problem.profile, cluster, problem.job)
    layout, rows = Layout(Roles(2, (0, 1)), (2, 3)), (2, 7, 7)
    arena, plan = plan_of(shared, layout, rows)
    found = timeline(shared, plan).step_time_s
    inst = arena.instance
    own = {
        pair: replace(route, resources=((f"{pair}", route.bandwidth_bytes_per_s),))
        for pair, route in inst.routes.items()
    }
    blind = step_time_s(replace(inst, routes=own), layout, rows)
    formula = step_time_s(inst, layout, rows)
    assert blind < formula
    assert abs(formula / found - 1) < 0.5 * abs(blind / found - 1)


def test_where_raw_rows_share_a_link_they_wait_for_each_other() -> None:
    problem = three_problem(0, data_devices=["end"])
    inst = Arena.on(problem, (0, 1, 2)).instance
    shared = tuple(
        replace(m, input_loads=(("up:end", 2e-3),)) if m.input_loads else m for m in inst.machines
    )  # fmt: skip
    apart = tuple(
        replace(m, input_loads=((f"own {i}", 2e-3),)) if m.input_loads else m
        for i, m in enumerate(inst.machines)
    )
    layout = Layout(Roles(0, (1, 2)), (5, 5))
    both, each = (step_time_s(replace(inst, machines=m), layout, (1, 7, 8)) for m in (shared, apart))
    assert each < both <= each + 8 * 2e-3 + 1e-12


@pytest.mark.parametrize("strategy", ["hiertrain", "hiertrain_n", *OURS, "rounded_lp"])
def test_times_that_are_no_numbers_give_no_plan(strategy: str) -> None:
    """Fitted under way, a profile is not validated again: the planner sees to it that its times are."""
    problem = three_problem(0)
    devices = tuple(d.model_copy(update={"factor": float("nan")}) for d in problem.profile.devices)
    profile = problem.profile.model_copy(update={"devices": devices})
    broken = Problem(problem.graph, profile, problem.cluster, problem.job)
    with pytest.raises(
        InputError, match=r"^hiertrain: forward of machine 0 takes nan s for layer 0; times must"
    ):
        make_plan(broken, strategy)


def test_baselines_that_it_looks_at_are_never_shorter_as_predicted() -> None:
    """Also where raw rows of the next step share a link with the sums of this one.

    The plan is judged by the step that is predicted later, of however many steps.
    """
    graph = make_graph(5, 2, activation=4_000, parameters=60_000, inputs=4_096)
    closest = float("inf")
    for mbit in (50, 100):
        cluster = Cluster.parse(
            {
                "devices": [
                    {"id": d, "speed": speed}
                    for d, speed in (("end", 0.1), ("edge", 1.0), ("cloud", 2.0))
                ],
                "links": [
                    {"between": ["end", "edge"], "bandwidth": "100 Mbit/s", "latency": "1 ms"},
                    {"between": ["end", "cloud"], "bandwidth": f"{mbit} Mbit/s", "latency": "10 ms"},
                    {"between": ["edge", "cloud"], "bandwidth": f"{mbit} Mbit/s", "latency": "10 ms"},
                ],
                "data": ["end"],
            }
        )  # fmt: skip
        for flops_per_s in (2e10, 5e10, 1e11):
            problem = Problem(
                graph, make_profile(graph, cluster, flops_per_s=flops_per_s), cluster, make_job(256)
            )
            for steps in (2, 4):
                ours, theirs = (
                    predict(
                        make_plan(problem, name), graph, problem.profile, cluster, problem.job, steps=steps
                    ).step_time_s
                    for name in ("hiertrain", "two_tier")
                )
                assert ours <= theirs * (1 + 1e-12)
                closest = min(closest, theirs / ours)
    assert closest < 1.1  # one helper is nearly as good somewhere
