"""Training over a parameter server: the same bits under any segments, every parameter moved once each way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from cases import GPT, GPT2, MLP
from equality import Case, assignment, largest_difference, of, plan_of, reference
from torch import Tensor, nn

from server_cases import server_plan
from spanwise.core.errors import PeerError
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.core.program import Action
from spanwise.core.syncs import ServerSync
from spanwise.lowering import natural_syncs
from spanwise.runtime.device_run import Assignment, Snapshot
from spanwise.runtime.pool import WorkerPool
from spanwise.runtime.processes import ProcessSession
from spanwise.runtime.threads import ThreadSession
from spanwise.runtime.transport import Pending, Tensors, Transport

STEPS = 4
ROWS = {"a": 5, "b": 4, "c": 3}


def sync_of(graph: ModelGraph, r: random.Random, **more: Any) -> ServerSync:
    """Random segments both ways, half of the time pulled as they are aggregated, in any order."""

    def ends() -> tuple[int, ...]:
        inner = r.sample(range(1, len(graph)), r.randint(0, len(graph) - 1))
        return (*sorted(inner), len(graph))

    pulls = ends()
    order = r.sample(range(len(pulls)), len(pulls))
    fields = {"server": "d", "devices": tuple(ROWS), "pushes": ends(), "pulls": pulls, "order": order}
    return ServerSync.parse({**fields, "as_aggregated": r.random() < 0.5, **more})


def plan_for(case: Case, seed: int, **more: Any) -> Plan:
    graph = of(case)[1].graph
    rows = {device: n * case.batch // 12 for device, n in ROWS.items()}
    return server_plan(graph, rows, sync_of(graph, random.Random(seed), **more))


@contextmanager
def on_threads(
    case: Case, plan: Plan, work: Assignment | None = None, **more: Any
) -> Iterator[ThreadSession]:
    source = of(case)[1]
    tensors = source.parameters | source.buffers
    session = ThreadSession(work or assignment(case, source, plan), tensors, case.data(), **more)
    try:
        yield session
    finally:
        session.close()


def trained(case: Case, plan: Plan, runs: Sequence[int] = (STEPS,)) -> tuple[Snapshot, list[float]]:
    losses: list[float] = []
    with on_threads(case, plan) as session:
        for count in runs:
            losses += [report.loss for report in session.run(len(losses), count)]
        return session.snapshot(), losses


def same_bits(one: Snapshot, other: Snapshot) -> bool:
    return all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
        for mine, theirs in ((one.parameters, other.parameters), (one.optimizer, other.optimizer))
    )


def off(case: Case, plan: Plan, found: Snapshot, losses: list[float]) -> float:
    """How far a run is from plain PyTorch on one device that adds up the same slices."""
    model, source = of(case)
    expected, expected_losses = reference(case, model, assignment(case, source, plan), len(losses))
    far = max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True))
    return max(far, largest_difference(found.parameters, {k: expected[k] for k in found.parameters}))


def normed() -> nn.Module:
    """Batch statistics and buffers."""
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(),
        nn.Linear(12, 4),
    )  # fmt: skip


ADAM = replace(MLP, name="normed", model=normed, optimizer=(("name", "AdamW"), ("lr", 1e-2)))
UNCLIPPED = replace(GPT2, clip_norm=None)


@pytest.mark.parametrize("case", [MLP, ADAM, UNCLIPPED], ids=["momentum", "adam-statistics", "tied"])
def test_any_segments_give_the_same_bits_and_those_of_plain_pytorch(case: Case) -> None:
    found = [trained(case, plan_for(case, seed)) for seed in range(3)]
    assert all(same_bits(found[0][0], other) for other, _ in found[1:])
    assert len({tuple(losses) for _, losses in found}) == 1
    plan = plan_for(case, 0)
    assert off(case, plan, *found[0]) < 1e-12
    backwards = trained(case, plan_for(case, 0, devices=tuple(reversed(ROWS))))[0]
    assert not same_bits(found[0][0], backwards)  # negative control: another order of summation shows


@pytest.mark.parametrize("server", ["a", "c"])
def test_a_server_may_compute_too(server: str) -> None:
    found = trained(MLP, plan_for(MLP, 3, server=server))
    assert same_bits(found[0], trained(MLP, plan_for(MLP, 5))[0])


def test_float32_is_one_device_too() -> None:
    case = replace(MLP, dtype="float32")
    plans = [plan_for(case, seed) for seed in range(2)]
    found = [trained(case, plan) for plan in plans]
    assert same_bits(found[0][0], found[1][0])
    assert off(case, plans[0], *found[0]) < 1e-6


@pytest.mark.parametrize("seed", range(2))
def test_gloo_processes_give_the_bits_of_threads(pool: WorkerPool, seed: int) -> None:
    plan, source = plan_for(ADAM, seed), of(ADAM)[1]
    session = ProcessSession(
        pool, assignment(ADAM, source, plan), source.parameters | source.buffers, ADAM.data()
    )
    losses = [report.loss for report in (*session.run(0, 1), *session.run(1, STEPS - 1))]
    here, expected = trained(ADAM, plan)
    assert same_bits(session.snapshot(), here)
    assert losses == expected


def test_the_norm_of_all_gradients_clips_every_segment() -> None:
    plan = plan_for(GPT, 1, as_aggregated=False)
    found = trained(GPT, plan)
    assert off(GPT, plan, *found) < 1e-12
    other = trained(replace(GPT, clip_norm=None), plan)[0]
    assert largest_difference(found[0].parameters, other.parameters) > 1e-6


def test_micro_batches_and_a_stage_without_a_server() -> None:
    """The first layers on two devices, whose server computes the others: a ring sums a tied weight, and all
    gradients are clipped together."""
    case, graph = GPT, of(GPT)[1].graph
    half = len(graph) // 2
    both = tuple(Replica(device=d, rows=n) for d, n in (("a", 3), ("b", 3)))
    stages = (
        Stage(start=0, stop=1, replicas=both, warmup=3),
        Stage(start=1, stop=half, replicas=both, warmup=3),
        Stage(start=half, stop=len(graph), replicas=(Replica(device="d", rows=6),), warmup=1),
    )
    sync = {"server": "d", "devices": ["a", "b"], "pushes": [1, half], "pulls": [half], "order": [0]}
    rings = [ring for ring in natural_syncs(stages, graph) if len(ring.devices) == 3]
    assert rings
    plan = Plan.parse({**plan_of(graph, stages, both, 2).to_data(), "syncs": [*rings, sync]})
    found = trained(case, plan, runs=(1, 3))
    assert off(case, plan, *found) < 1e-12


def test_runs_in_pieces_end_with_equal_copies_and_go_on() -> None:
    plan = plan_for(MLP, 2, as_aggregated=True)
    whole = trained(MLP, plan)[0]
    with on_threads(MLP, plan) as session:
        for first, count in ((0, 1), (1, 2), (3, 1)):
            list(session.run(first, count))
            states = {device: run.state() for device, run in session._runs.items()}
            for device in ROWS:
                assert same_bits(Snapshot(states[device].parameters), Snapshot(states["d"].parameters))
                assert not states[device].optimizer
                assert not states[device].options
        assert same_bits(session.snapshot(), whole)


def test_a_checkpoint_goes_on_under_another_plan() -> None:
    source = of(ADAM)[1]
    three = tuple(Replica(device=d, rows=n) for d, n in ROWS.items())
    ring = plan_of(source.graph, (Stage(start=0, stop=len(source.graph), replicas=three),), three, 1)
    ours = [plan_for(ADAM, 1), ring, plan_for(ADAM, 2, server="b")]
    expected, _ = trained(ADAM, ours[0])
    with on_threads(ADAM, ours[0]) as session:
        list(session.run(0, 1))
        session.switch(assignment(ADAM, source, ours[1]))
        list(session.run(1, 1))
        session.switch(assignment(ADAM, source, ours[2]))
        list(session.run(2, 1))
        kept = session.snapshot()
    with on_threads(ADAM, ours[0], resume=kept) as session:
        # A resumed run begins with the parameters of the checkpoint, which a test has to hand over itself.
        for run in session._runs.values():
            with torch.no_grad():
                for name, parameter in run.parameters.items():
                    parameter.copy_(kept.parameters[name])
        list(session.run(3, 1))
        found = session.snapshot()
    assert largest_difference(found.parameters, expected.parameters) < 1e-8  # a ring adds in another order
    assert found.optimizer.keys() == expected.optimizer.keys()


@dataclass
class Counting:
    """Counts the bytes of every message."""

    inner: Transport
    sent: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])

    def send(self, peer: str, tag: int, tensors: Tensors) -> Pending:
        self.sent[peer, tag] += sum(t.numel() * t.element_size() for t in tensors)
        return self.inner.send(peer, tag, tensors)

    def recv(self, peer: str, tag: int, buffers: Tensors) -> Pending:
        return self.inner.recv(peer, tag, buffers)

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("seed", range(2))
def test_every_parameter_goes_once_each_way(seed: int) -> None:
    plan, graph = plan_for(UNCLIPPED, seed), of(UNCLIPPED)[1].graph
    counting: dict[str, Counting] = {}

    def wrap(device: str, inner: Transport) -> Transport:
        return counting.setdefault(device, Counting(inner))

    with on_threads(UNCLIPPED, plan, wrap=wrap) as session:
        list(session.run(0, STEPS))
    actions = assignment(UNCLIPPED, of(UNCLIPPED)[1], plan).program.devices
    own = {d: sum(a.nbytes for a in actions[d] if a.payload in ("input", "label")) for d in actions}
    assert not any(own.values())
    for device, found in counting.items():
        wanted = len(ROWS) if device == "d" else 1
        assert sum(found.sent.values()) == STEPS * wanted * graph.parameter_bytes
        assert len(found.sent) == STEPS * sum(a.kind == "send" for a in actions[device])


@dataclass
class Harmed:
    """Does something else with one message that a device sends."""

    inner: Transport
    harm: Any
    left: int  # messages before it

    def send(self, peer: str, tag: int, tensors: Tensors) -> Pending:
        self.left -= 1
        return (self.harm if self.left == -1 else self.inner.send)(peer, tag, tensors)

    def recv(self, peer: str, tag: int, buffers: Tensors) -> Pending:
        return self.inner.recv(peer, tag, buffers)

    def close(self) -> None:
        self.inner.close()


class Done:
    def wait(self, timeout_s: float) -> None:
        return


def lose(peer: str, tag: int, tensors: Tensors) -> Pending:
    return Done()


def harmed(plan: Plan, device: str, harm: str, left: int) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """What a run says whose ``left``-th message of a device is lost or doubled; the server's parameters."""
    work = assignment(MLP, of(MLP)[1], plan)
    work = replace(work, job=MLP.job(transfer_timeout_s=0.3))

    def wrap(name: str, inner: Any) -> Transport:
        def double(peer: str, tag: int, tensors: Tensors) -> Pending:
            with inner.fabric.changed:  # so that nobody can take the first one in between
                inner.send(peer, tag, tensors)
                return inner.send(peer, tag, tensors)

        def vanish(peer: str, tag: int, tensors: Tensors) -> Pending:
            raise PeerError(f"{name} vanished", device=name)

        harms = {"lose": lose, "double": double, "vanish": vanish}
        return Harmed(inner, harms[harm], left) if name == device else inner

    with on_threads(MLP, plan, work, wrap=wrap) as session:
        before = {k: v.detach().clone() for k, v in session._runs["d"].parameters.items()}
        with pytest.raises(PeerError) as caught:
            list(session.run(0, 2))
        return str(caught.value), before, dict(session._runs["d"].parameters)


def in_layers(**more: Any) -> Plan:
    ends = tuple(range(1, len(of(MLP)[1].graph) + 1))
    return plan_for(MLP, 0, pushes=ends, pulls=ends, order=tuple(range(len(ends))), **more)


def test_a_step_whose_push_is_missing_has_changed_nothing() -> None:
    plan = in_layers(as_aggregated=False)
    for harm in ("lose", "vanish"):
        said, before, after = harmed(plan, "b", harm, left=2)
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert "b vanished" in said or "nothing within 0.3 s" in said
    # Negative control: as aggregated the segments that were in have been updated by then.
    _, before, after = harmed(in_layers(as_aggregated=True), "b", "lose", left=2)
    assert any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(("device", "text"), [("a", "send push y0.3 to d"), ("d", "send pull y0.0 to a")])
def test_a_doubled_segment_is_found(device: str, text: str) -> None:
    said, _, _ = harmed(in_layers(as_aggregated=False), device, "double", left=0)
    assert "still in use" in said
    assert text in said


def test_a_lost_pull_ends_the_run_at_its_receiver() -> None:
    said, _, _ = harmed(in_layers(as_aggregated=False), "d", "lose", left=1)
    assert "recv pull y0.0 from d" in said
    assert "nothing within 0.3 s" in said


def test_a_closed_run_leaves_nothing_on_its_way() -> None:
    """A receive that is given up would block the connection for the next run of a pool of workers."""
    with on_threads(MLP, in_layers(as_aggregated=True)) as session:
        list(session.run(0, 2))
        assert session._fabric.mail  # pulls for a step that does not come
    assert not session._fabric.mail


def test_a_pull_that_does_not_come_is_missed_by_who_asks_for_the_state() -> None:
    plan = in_layers(as_aggregated=False)
    work = replace(assignment(MLP, of(MLP)[1], plan), job=MLP.job(transfer_timeout_s=0.3))
    with on_threads(MLP, plan, work, wrap=lambda d, t: Harmed(t, lose, 2) if d == "d" else t) as session:
        list(session.run(0, 1))
        with pytest.raises(PeerError, match=r"c: step 0, 'recv pull y0\.0 from d .*nothing within 0\.3 s"):
            session.snapshot()


def test_only_actions_of_the_plan_are_recorded() -> None:
    plan = plan_for(MLP, 1, as_aggregated=True)
    work = assignment(MLP, of(MLP)[1], plan)
    with on_threads(MLP, plan) as session:
        list(session.run(0, 2))
        spans = {found.device: found for found in session.spans()}
    updates = [str(a) for a in work.program.devices["d"] if a.kind == "update"]
    for _, _, _, _, entries in spans["d"].steps:
        assert [text for _, kind, text, _, _ in entries if kind == "update"] == updates
    assert all(Action.parse(text).payload in ("push", None) for *_, text, _, _ in spans["d"].steps[0][4])
