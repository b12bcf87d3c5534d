"""Private data: raw samples (and labels) never leave their device. Shown by recording every message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from cases import MLP
from equality import assignment, cluster, of, plan_of
from torch import Tensor

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.core.profile import DeviceTimes, Profile
from spanwise.planner import Problem, compare, make_plan
from spanwise.profiler.scale import analytic_table
from spanwise.runtime.threads import ThreadSession
from spanwise.runtime.transport import Pending, Tensors, Transport

SOURCES = ("a", "b")


@dataclass
class Recording:
    """Passes everything on and keeps a copy of what was sent."""

    inner: Transport
    sent: list[Tensor] = field(default_factory=list)

    def send(self, peer: str, tag: int, tensors: Tensors) -> Pending:
        self.sent += [t.detach().clone() for t in tensors]
        return self.inner.send(peer, tag, tensors)

    def recv(self, peer: str, tag: int, buffers: Tensors) -> Pending:
        return self.inner.recv(peer, tag, buffers)

    def close(self) -> None:
        self.inner.close()


def messages(plan: Plan) -> list[Tensor]:
    """Everything that any device sent in two steps."""
    _, source = of(MLP)
    recorders: list[Recording] = []

    def wrap(_: str, transport: Transport) -> Transport:
        recorders.append(Recording(transport))
        return recorders[-1]

    work = assignment(MLP, source, plan, cluster(SOURCES))
    session = ThreadSession(work, source.parameters | source.buffers, MLP.data(), wrap=wrap)
    list(session.run(0, 2))
    session.close()
    return [t for recorder in recorders for t in recorder.sent]


def leaked_rows(sent: Iterable[Tensor], rows: Tensor) -> int:
    """How many messages hold a row of the data set."""
    known = {tuple(row.reshape(-1).tolist()) for row in rows}
    found = 0
    for tensor in sent:
        if tensor.dtype == rows.dtype and tensor.dim() == rows.dim() and tensor.shape[1:] == rows.shape[1:]:
            found += any(tuple(row.reshape(-1).tolist()) in known for row in tensor)
    return found


def integer_messages(sent: Iterable[Tensor]) -> int:
    """Labels are the only integers that are ever sent."""
    return sum(not tensor.is_floating_point() for tensor in sent)


def problem(*, private: bool, share_labels: bool = False) -> Problem:
    _, source = of(MLP)
    table = analytic_table(source.graph, 1e8)
    machines = cluster(SOURCES)
    times = Profile(
        graph_digest=source.graph.digest,
        tables=(table,),
        devices=tuple(
            DeviceTimes(device=d.id, factor=8.0 if d.id in SOURCES else 1.0) for d in machines.devices
        ),
    )
    job = MLP.job(private=private, share_labels=share_labels)
    return Problem(graph=source.graph, profile=times, cluster=machines, job=job)


def feasible(task: Problem) -> list[Plan]:
    return [e.plan for e in compare(task) if e.plan is not None]


def test_private_rows_and_labels_stay() -> None:
    x, y = MLP.data().tensors
    plans = feasible(problem(private=True))
    assert plans
    for plan in plans:
        assert {d for s in (plan.stages[0], plan.stages[-1]) for d in s.devices} == set(SOURCES)
        sent = messages(plan)
        assert sent
        assert leaked_rows(sent, x.double()) == 0
        assert integer_messages(sent) == 0
    assert y.dtype == torch.int64


def test_shared_labels_leave_but_samples_do_not() -> None:
    plans = feasible(problem(private=True, share_labels=True))
    elsewhere = [p for p in plans if set(p.stages[-1].devices) - set(SOURCES)]
    assert elsewhere, "no plan uses the faster devices for the last layers"
    for plan in elsewhere:
        sent = messages(plan)
        assert leaked_rows(sent, MLP.data().tensors[0].double()) == 0
        assert integer_messages(sent) > 0


def test_the_recorder_sees_samples_when_they_may_leave() -> None:
    """Negative control: without ``private`` raw rows travel, and the test above would notice."""
    graph = of(MLP)[1].graph
    plan = plan_of(
        graph,
        (Stage(start=0, stop=len(graph), replicas=(Replica(device="c", rows=6),)),),
        (Replica(device="a", rows=3), Replica(device="b", rows=3)),
        2,
    )
    sent = messages(plan)
    assert leaked_rows(sent, MLP.data().tensors[0].double()) > 0
    assert integer_messages(sent) > 0


def test_one_device_cannot_train_private_data_of_two(tmp_path: Path) -> None:
    del tmp_path
    with pytest.raises(InfeasibleError, match=r"single: .*a.*b"):
        make_plan(problem(private=True), "single")


def test_middle_layers_may_run_elsewhere() -> None:
    """A U-shaped plan: first and last layers where the data is, the middle on faster devices."""
    graph = of(MLP)[1].graph
    rows = (Replica(device="a", rows=3), Replica(device="b", rows=3))
    stages = (
        Stage(start=0, stop=1, replicas=rows, warmup=3),
        Stage(start=1, stop=3, replicas=(Replica(device="c", rows=6),), warmup=2),
        Stage(start=3, stop=len(graph), replicas=rows, warmup=1),
    )
    sent = messages(plan_of(graph, stages, rows, 2))
    assert leaked_rows(sent, MLP.data().tensors[0].double()) == 0
    assert integer_messages(sent) == 0
