"""Devices that train some parameters or channels: all ways to pass values on give the same ones."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import equality
import pytest
import torch
import torch.nn.functional as F
from sparse_plans import (
    CASE,
    DECAY,
    LAYOUTS,
    LR,
    MOMENTUM,
    STEPS,
    WAYS,
    Net,
    layout_of,
    sparse_plan,
    with_groups,
)
from torch import Tensor, nn

from planner_cases import make_profile
from spanwise.api.planning import predict
from spanwise.api.prepare import prepare_live
from spanwise.api.run import TrainOptions, run_job
from spanwise.api.scores import scores
from spanwise.core.errors import InputError, PeerError, PlanError
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan, Trained
from spanwise.core.profile import Profile
from spanwise.core.timeline import Timeline
from spanwise.core.trained import GroupSync, parse_unit
from spanwise.lowering import lower, units_of
from spanwise.ops.allocator import HUGE_PAGES
from spanwise.runtime import orders
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.pool import Meeting, WorkerPool
from spanwise.runtime.processes import ProcessSession
from spanwise.runtime.tags import Tags
from spanwise.runtime.threads import ThreadSession
from spanwise.runtime.transport import Tensors, Transport
from spanwise.zoo.data import synthetic_images
from sparse_cases import unequal


def oracle(model: nn.Module, work: Assignment, steps: int) -> dict[str, Tensor]:
    """One process: every unit by the mean gradient of its trainers' rows, all else untouched."""
    values = {k: p.detach().clone() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    momentum: dict[str, Tensor] = {}
    plan, graph, data = work.plan, work.graph, CASE.data()
    units = units_of(plan, graph)
    for step in range(steps):
        indices = equality.batch_indices(work, work.sampler, step)
        total: dict[str, Tensor] = {k: torch.zeros_like(v) for k, v in values.items()}
        trained = {k: torch.zeros_like(v, dtype=torch.bool) for k, v in values.items()}
        for stage in plan.stages:
            own = {p.name for p in graph.parameters_of(stage.start, stage.stop)}
            mine = [u for u in units if u.parameter in own]
            for device, a, b in stage.row_ranges():
                rows_of = [(data.tensors[0][i[a:b]], data.tensors[1][i[a:b]]) for i in indices]
                found = gradients(model, values, buffers, rows_of, stored=bool(plan.stored_statistics))
                for unit in mine:
                    if device not in unit.trainers:
                        continue
                    rows = sum(r.rows for r in stage.replicas if r.device in unit.trainers)
                    where = place(plan, graph, unit.text, values[unit.parameter])
                    total[unit.parameter][where] += found[unit.parameter][where] * (
                        (b - a) / rows / len(indices)
                    )
                    trained[unit.parameter][where] = True
        for name, value in values.items():
            update = total[name] + DECAY * value
            momentum[name] = update if step == 0 else MOMENTUM * momentum[name] + update
            value.copy_(torch.where(trained[name], value - LR * momentum[name], value))
    return values


def place(plan: Plan, graph: ModelGraph, text: str, like: Tensor) -> Tensor:
    """Which elements of a parameter a unit is."""
    name, part = parse_unit(text)
    mask = torch.ones_like(like, dtype=torch.bool)
    if part is not None:
        index = torch.tensor(plan.ranking[name][part[0] : part[1]])
        mask = torch.zeros_like(mask).index_fill_(graph.sliceable[name][0], index, True)
    return mask


def gradients(
    model: nn.Module, values: dict[str, Tensor], buffers: dict[str, Tensor],
    rows: list[tuple[Tensor, Tensor]], *, stored: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Of the sum of mean losses of some slices, by stored statistics or by those of each slice."""
    leaves = {k: v.clone().requires_grad_() for k, v in values.items()}
    model.train(not stored)
    loss = torch.zeros((), dtype=torch.float64)
    for x, y in rows:
        own = {**leaves, **{k: v.clone() for k, v in buffers.items()}}
        loss = loss + F.cross_entropy(torch.func.functional_call(model, own, (x.double(),)), y)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def run(plan: Plan, steps: int, **changes: object) -> tuple[ThreadSession, Assignment]:
    _, traced = equality.of(CASE)
    work = equality.assignment(CASE, traced, plan)
    work = replace(work, job=CASE.job(**changes))
    tensors = {k: v.detach() for k, v in traced.parameters.items()} | dict(traced.buffers)
    session = ThreadSession(work, tensors, CASE.data())
    list(session.run(0, steps))
    return session, work


@pytest.mark.parametrize("way", WAYS)
def test_batch_statistics_are_those_of_each_device_s_rows(way: str) -> None:
    model, traced = equality.of(CASE)
    plan = with_groups(
        sparse_plan(traced.graph, 3, layout_of("replicas", traced.graph), stored=False), WAYS[way]
    )
    session, work = run(plan, STEPS)
    expected = oracle(model, work, STEPS)
    for name, value in session.snapshot().parameters.items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-12), name
    session.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ways_give_the_oracles_parameters_to_all(layout: str) -> None:
    model, traced = equality.of(CASE)
    graph = traced.graph
    for seed in range(2):
        base = sparse_plan(graph, seed, layout_of(layout, graph))
        before = {k: p.detach().clone() for k, p in traced.parameters.items()}
        expected: dict[str, Tensor] | None = None
        for way, change in WAYS.items():
            plan = with_groups(base, change)
            session, work = run(plan, STEPS)
            expected = oracle(model, work, STEPS) if expected is None else expected
            copies = [r.parameters for r in session._runs.values()]
            for parameters in (session.snapshot().parameters, *copies):
                for name, value in parameters.items():
                    assert torch.allclose(value, expected[name], rtol=0, atol=1e-12), (seed, way, name)
            _frozen_stay(plan, graph, before, session)
            session.close()


def _frozen_stay(plan: Plan, graph: ModelGraph, before: dict[str, Tensor], session: ThreadSession) -> None:
    """To the bit; an optimizer keeps state of what trains only."""
    for unit in units_of(plan, graph):
        if not unit.trainers:
            where = place(plan, graph, unit.text, before[unit.parameter])
            for device in unit.receivers:
                now = session._runs[device].parameters[unit.parameter].detach()
                assert torch.equal(now[where], before[unit.parameter][where]), unit.text
    units = units_of(plan, graph)
    for device, part in session._runs.items():
        kept = 0 if part.optimizer is None else sum(
            t.numel() for state in part.optimizer.state.values() for t in state.values() if t is not None
        )  # fmt: skip
        trained = [u.nbytes // 8 for u in units if device in u.trainers]  # traced in float64
        apart = {u.parameter for u in units}
        whole = [p.numel() for name, p in part.parameters.items() if name not in apart]
        assert kept == sum(trained) + sum(whole), "momentum of what trains"


def _alike(copies: list[dict[str, nn.Parameter]]) -> bool:
    """To rounding: a slice and a whole weight may be updated by other instructions."""
    return all(torch.allclose(c[k], v, rtol=0, atol=1e-12) for c in copies[1:] for k, v in copies[0].items())


def test_masking_gradients_alone_moves_what_is_frozen() -> None:
    """Negative control: weight decay and momentum move what has no gradient."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    weight.grad = torch.tensor([1.0, 1.0, 0.0, 0.0])
    optimizer.step()
    assert not torch.equal(weight.detach()[2:], torch.ones(2))


def test_a_postponed_refresh_leaves_copies_behind_until_it_comes() -> None:
    _, traced = equality.of(CASE)
    base = sparse_plan(traced.graph, 1, layout_of("replicas", traced.graph))
    plan = with_groups(base, lambda _, s: s.model_copy(update={"refresh_every": 3}) if s.receivers else s)
    for steps, fresh in ((2, False), (3, True)):
        session, _ = run(plan, steps)
        copies = [r.parameters for r in session._runs.values()]
        assert _alike(copies) == fresh
        session.close()


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_ended() -> None:
    _, traced = equality.of(CASE)
    plan = sparse_plan(traced.graph, 2, layout_of("replicas", traced.graph))
    whole, work = run(plan, 4)
    first, _ = run(plan, 2)
    state = first.snapshot()
    tensors = state.parameters | dict(traced.buffers)
    second = ThreadSession(work, tensors, CASE.data(), resume=state)
    list(second.run(2, 2))
    found, expected = second.snapshot().parameters, whole.snapshot().parameters
    assert all(torch.allclose(found[k], v, rtol=0, atol=1e-12) for k, v in expected.items())
    for session in (whole, first, second):
        session.close()


def test_adam_and_clipping_need_summed_gradients() -> None:
    _, traced = equality.of(CASE)
    base = sparse_plan(traced.graph, 0, layout_of("replicas", traced.graph))
    masked = with_groups(base, WAYS["masked"])
    with pytest.raises(PlanError, match="clip_norm"):
        lower(masked, traced.graph, clip=True)
    with pytest.raises(InputError, match="not for Adam"):
        run(masked, 1, optimizer={"name": "Adam", "lr": 0.01})
    session, _ = run(base, 2, optimizer={"name": "Adam", "lr": 0.01})
    copies = [r.parameters for r in session._runs.values()]
    assert _alike(copies)
    session.close()


class _Dead:
    def wait(self, timeout_s: float) -> None:
        return


class Dying:
    """A device that is gone as soon as values are passed on: nothing of it arrives any more."""

    def __init__(self, inner: Transport, least: int) -> None:
        self._inner, self._least = inner, least

    def send(self, peer: str, tag: int, tensors: Tensors) -> object:
        return _Dead() if tag >= self._least else self._inner.send(peer, tag, tensors)

    def recv(self, peer: str, tag: int, buffers: Tensors) -> object:
        return self._inner.recv(peer, tag, buffers)

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("way", ["grouped", "masked"])
def test_a_device_lost_while_values_are_passed_on_ends_the_run(way: str) -> None:
    _, traced = equality.of(CASE)
    plan = with_groups(sparse_plan(traced.graph, 1, layout_of("replicas", traced.graph)), WAYS[way])
    work = replace(equality.assignment(CASE, traced, plan), job=CASE.job(transfer_timeout_s=0.3))
    tensors = {k: v.detach() for k, v in traced.parameters.items()} | dict(traced.buffers)
    at, group = next((i, s) for i, s in enumerate(plan.syncs) if isinstance(s, GroupSync) and s.receivers)
    dying, tags = group.trainers[0], Tags.of(work.program)
    least = tags.rings[0][0] if way == "masked" else tags.chains[at][0]
    session = ThreadSession(
        work, tensors, CASE.data(), wrap=lambda d, t: Dying(t, least) if d == dying else t  # pyright: ignore
    )  # fmt: skip
    with pytest.raises(PeerError, match=r"nothing within 0\.3 s|ended on another"):
        list(session.run(0, 2))
    session.close()


def test_a_device_with_another_plan_is_refused() -> None:
    _, traced = equality.of(CASE)
    plan = sparse_plan(traced.graph, 0, layout_of("hybrid", traced.graph))
    head = orders.whole(equality.assignment(CASE, traced, plan))
    assert orders.read_whole(head).plan == plan
    head["plan"]["stages"][0]["replicas"][0]["trains"] = []
    with pytest.raises(PlanError, match="digest"):
        orders.read_whole(head)


def test_the_program_prints_and_parses() -> None:
    _, traced = equality.of(CASE)
    for way, change in WAYS.items():
        plan = with_groups(sparse_plan(traced.graph, 1, layout_of("hybrid", traced.graph)), change)
        program = lower(plan, traced.graph)
        assert orders.ProgramFile.of(program).program() == program, way
        assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_without_selections_is_written_as_before() -> None:
    _, traced = equality.of(CASE)
    plan = equality.random_plan(traced.graph, 12, 0)
    assert not {"rankings", "stored_statistics"} & plan.to_data().keys()
    assert all("trains" not in r for s in plan.to_data()["stages"] for r in s["replicas"])


def test_bad_selections_are_refused() -> None:
    _, traced = equality.of(CASE)
    graph = traced.graph
    good = sparse_plan(graph, 1, layout_of("replicas", graph))

    def changed(trained: tuple[Trained, ...]) -> Plan:
        replicas = (
            good.stages[0].replicas[0].model_copy(update={"trains": trained}),
            *good.stages[0].replicas[1:],
        )
        stage = good.stages[0].model_copy(update={"replicas": replicas})
        return Plan.parse(good.model_copy(update={"stages": (stage,)}).to_data())

    with pytest.raises(PlanError, match="do not use"):
        lower(changed((Trained(parameter="nowhere"),)), graph)
    with pytest.raises(PlanError, match="ranking has 8"):
        changed((Trained(parameter="narrow.weight", channels=8),))
    with pytest.raises(PlanError, match="no sync passes it on"):
        lower(good.model_copy(update={"syncs": good.syncs[1:]}), graph)


def test_worker_processes_give_what_threads_give(pool: WorkerPool) -> None:
    _, traced = equality.of(CASE)
    plan = with_groups(sparse_plan(traced.graph, 2, layout_of("hybrid", traced.graph)), WAYS["mixed"])
    threads, work = run(plan, 2)
    tensors = {k: v.detach() for k, v in traced.parameters.items()} | dict(traced.buffers)
    processes = ProcessSession(pool, work, tensors, CASE.data())
    timed = processes.stage_times()  # which changes nothing
    assert [(t.device, t.stage) for t in timed] == [(t.device, t.stage) for t in threads.stage_times()]
    assert all(t.plan == plan.digest and t.forward_s > 0 and t.backward_s > 0 for t in timed)
    assert processes.stage_times() == timed, "once"
    list(processes.run(0, 2))
    found, expected = processes.snapshot(), threads.snapshot()
    assert found.parameters.keys() == expected.parameters.keys() == traced.parameters.keys()
    for key, value in expected.parameters.items():
        assert torch.allclose(found.parameters[key], value, rtol=0, atol=1e-12), key
    assert found.optimizer.keys() == expected.optimizer.keys()
    threads.close()
    processes.close()


@pytest.mark.parametrize("asked", [True, False])
def test_workers_that_will_hand_memory_back_are_started_with_huge_pages(asked: bool) -> None:
    seen: list[Mapping[str, str]] = []

    def start(device: str, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        seen.append(env)
        raise InputError(f"{device}: enough")

    with pytest.raises(InputError, match="enough"):
        WorkerPool(equality.cluster(), ("a",), Meeting(start=start, huge_pages=asked), emulate=False)
    assert (HUGE_PAGES.items() <= seen[0].items()) == asked


def test_timing_its_stages_leaves_no_gradients_behind() -> None:
    """Of the portable emulation, which runs every stage before the first step."""
    _, traced = equality.of(CASE)
    plan = sparse_plan(traced.graph, 1, layout_of("replicas", traced.graph))
    machines = equality.cluster(tuple("abcd"), emulation={"core_share": 1.0})
    work = replace(equality.assignment(CASE, traced, plan, machines), emulate=True)
    tensors = {k: v.detach() for k, v in traced.parameters.items()} | dict(traced.buffers)
    session = ThreadSession(work, tensors, CASE.data())
    leaves = [leaf for part in session._runs.values() for leaf in part.trained.leaves.values()]
    assert leaves
    assert all(leaf.grad is None for leaf in leaves)
    session.close()


def test_stored_statistics_of_a_model_that_was_never_trained_are_refused() -> None:
    train, _ = synthetic_images(rows=64, shape=(3, 6, 6), classes=4, seed=0)
    job = CASE.job(batch=12, statistics="stored", dtype="float32")
    prepared = prepare_live(job, Net(), nn.CrossEntropyLoss(), train, None)
    with pytest.raises(InputError, match=r'never trained and has none; .* statistics = "batch"'):
        scores(prepared, "dsparse")
    fresh = scores(replace(prepared, job=CASE.job(batch=12, dtype="float32")), "dsparse")
    assert fresh is not None
    assert fresh.from_scratch


@pytest.mark.parametrize("statistics", ["batch", "stored"])
def test_a_run_from_the_job_to_the_report(tmp_path: Path, statistics: str) -> None:
    """Scores by a probe, a plan under unequal budgets, training, and a page that says who trains what."""
    torch.manual_seed(0)
    train, test = synthetic_images(rows=64, test_rows=16, shape=(3, 6, 6), classes=4, seed=0)
    model = Net()
    with torch.no_grad():
        model(train.tensors[0])  # statistics: as if it had been trained before
    machines = unequal({"a": 40_000, "b": 24_000, "c": 19_000})
    job = CASE.job(batch=12, steps=3, dtype="float32", statistics=statistics)
    prepared = prepare_live(job, model, nn.CrossEntropyLoss(), train, test)
    before = {k: v.detach().clone() for k, v in model.state_dict().items()}
    times = make_profile(prepared.traced.graph, machines)
    options = TrainOptions(
        run=tmp_path / "r", strategy="dsparse", backend="threads", times=times, prepared=prepared
    )
    outcome = run_job(job, machines, options)
    plan = outcome.plan
    assert plan.strategy == "dsparse"
    assert bool(plan.stored_statistics) == (statistics == "stored")
    assert plan.groups
    trained = {u.parameter for u in units_of(plan, prepared.traced.graph) if u.trainers}
    after = outcome.model.state_dict()
    moved = {k for k, v in before.items() if not torch.equal(after[k], v)}
    counted = set() if statistics == "stored" else {k for k, _ in model.named_buffers()}
    assert moved == trained | counted
    assert outcome.folder.report.exists()
    timed = Profile.load(outcome.folder.profile)
    assert {(t.device, t.plan) for t in timed.stages or ()} == {(d, plan.digest) for d in plan.devices}
    assert Timeline.load(outcome.folder.simulated) == predict(
        plan, prepared.traced.graph, timed, machines, job
    )
    for use in outcome.predicted.devices:
        assert use.peak_memory_bytes <= machines.device(use.device).memory_bytes
    with pytest.raises(InputError, match="keeps its plan"):
        run_job(job, machines, replace(options, adapt=True, run=tmp_path / "s"))
