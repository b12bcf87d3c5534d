"""Changing plans under way: the run goes on as if nothing had happened, and nothing moves but what must."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GPT2, MLP
from equality import (
    Case,
    assignment,
    cluster,
    largest_difference,
    of,
    plan_of,
    reference,
)
from torch import nn

from spanwise.api import trying
from spanwise.api.run import Outcome, TrainOptions, run_job
from spanwise.core.cluster import Cluster
from spanwise.core.errors import PeerError
from spanwise.core.faults import Fault
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.core.profile import LinkTimes
from spanwise.lowering import move_bytes, moves
from spanwise.planner import tryout
from spanwise.runtime import migrate
from spanwise.runtime.device_run import Assignment, Snapshot
from spanwise.runtime.pool import WorkerPool
from spanwise.runtime.processes import ProcessSession
from spanwise.runtime.session import Probe, Session
from spanwise.runtime.threads import ThreadSession
from spanwise.runtime.transport import Pending, Tensors, Transport
from spanwise.zoo import mobilenet_v2
from spanwise.zoo.data import synthetic_images

STEPS = 8
EVERYWHERE = cluster(data="everywhere")

SGD = (("name", "SGD"), ("lr", 0.05), ("momentum", 0.9))
ADAM = (("name", "AdamW"), ("lr", 1e-2))
PLAIN = replace(MLP, optimizer=SGD)
CLIPPED = replace(MLP, optimizer=ADAM, clip_norm=0.5)
TIED = replace(GPT2, optimizer=ADAM)


def replicas(text: str) -> tuple[Replica, ...]:
    return tuple(Replica(device=w.split(":")[0], rows=int(w.split(":")[1])) for w in text.split())


def plans(graph: ModelGraph) -> tuple[Plan, Plan, Plan]:
    """Cuts, groups, rows and micro-batches all differ; ``d`` comes in late, ``b`` goes."""
    count = len(graph)
    early, late = max(1, count // 3), max(2, 2 * count // 3)
    one = (Stage(start=0, stop=early, replicas=replicas("a:4 b:2"), warmup=2),
           Stage(start=early, stop=count, replicas=replicas("c:6")))  # fmt: skip
    two = (Stage(start=0, stop=late, replicas=replicas("a:1 c:2"), warmup=3),
           Stage(start=late, stop=count, replicas=replicas("d:2 b:1"), warmup=2))  # fmt: skip
    three = (Stage(start=0, stop=1, replicas=replicas("d:12"), warmup=2),
             Stage(start=1, stop=count, replicas=replicas("c:5 a:7")))  # fmt: skip
    return (
        plan_of(graph, one, one[0].replicas, 2),
        plan_of(graph, two, two[0].replicas, 4),
        plan_of(graph, three, three[0].replicas, 1, "gpipe"),
    )


def works(case: Case) -> list[Assignment]:
    return [assignment(case, of(case)[1], plan, EVERYWHERE) for plan in plans(of(case)[1].graph)]


def switched(session: Session, found: list[Assignment]) -> tuple[Snapshot, list[float]]:
    """Eight steps: three under the first plan, two under the second, three under the third."""
    losses = [report.loss for report in session.run(0, 3)]
    session.switch(found[1])
    losses += [report.loss for report in session.run(3, 2)]
    session.switch(found[2])
    losses += [report.loss for report in session.run(5, 3)]
    return session.snapshot(), losses


def on_threads(case: Case, **more: Any) -> tuple[Snapshot, list[float]]:
    found, source = works(case), of(case)[1]
    session = ThreadSession(found[0], source.parameters | source.buffers, case.data(), **more)
    try:
        return switched(session, found)
    finally:
        session.close()


def distance(case: Case, found: Snapshot, losses: list[float]) -> float:
    """From plain PyTorch, which knows of no plans."""
    expected, values = reference(case, of(case)[0], works(case)[0], STEPS)
    kept = {k: expected[k] for k in found.parameters}
    far = max(abs(a - b) for a, b in zip(losses, values, strict=True))
    return max(largest_difference(found.parameters, kept), far)


@pytest.mark.parametrize("case", [PLAIN, CLIPPED, TIED], ids=["sgd", "adamw-clipped", "tied-adamw-clipped"])
def test_two_changes_of_plan_on_threads_equal_plain_pytorch(case: Case) -> None:
    assert distance(case, *on_threads(case)) < 1e-9


@pytest.mark.parametrize("case", [CLIPPED, TIED], ids=["mlp", "tied"])
def test_two_changes_of_plan_on_gloo_processes_equal_plain_pytorch(pool: WorkerPool, case: Case) -> None:
    found, source = works(case), of(case)[1]
    session = ProcessSession(pool, found[0], source.parameters | source.buffers, case.data())
    assert distance(case, *switched(session, found)) < 1e-9


def test_the_state_of_the_optimizer_must_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a migration that leaves it behind gives other parameters."""
    whole = migrate._pack

    def forgetful(state: Snapshot, move: Any) -> bytes:
        return whole(replace(state, optimizer={}), move)

    monkeypatch.setattr(migrate, "_pack", forgetful)
    assert distance(PLAIN, *on_threads(PLAIN)) > 1e-4


def test_learning_rates_go_on(tmp_path: Path) -> None:
    """A device that held nothing before takes the scheduler's place over too."""
    found, source = works(PLAIN), of(PLAIN)[1]
    scheduled = {"scheduler": {"name": "StepLR", "args": {"step_size": 2, "gamma": 0.5}},
                 "scheduler_every": "step"}  # fmt: skip
    job = PLAIN.job(**scheduled)
    found = [replace(work, job=job) for work in found]
    rates: list[float] = []
    for changing in (True, False):
        session = ThreadSession(found[0], dict(source.parameters), PLAIN.data())
        if changing:
            snapshot, _ = switched(session, found)
        else:
            list(session.run(0, STEPS))
            snapshot = session.snapshot()
        session.close()
        rates.append(snapshot.options["lr"])
    assert rates[0] == pytest.approx(0.05 * 0.5**4)
    assert rates[0] == rates[1]


@dataclass
class Counting:
    """A transport that adds up what is sent, by pair."""

    inner: Transport
    device: str
    sent: dict[tuple[str, str], int] = field(default_factory=dict)

    def send(self, peer: str, tag: int, tensors: Tensors) -> Pending:
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        self.sent[self.device, peer] = self.sent.get((self.device, peer), 0) + nbytes
        return self.inner.send(peer, tag, tensors)

    def recv(self, peer: str, tag: int, buffers: Tensors) -> Pending:
        return self.inner.recv(peer, tag, buffers)

    def close(self) -> None:
        self.inner.close()


def test_nothing_moves_but_what_changes_owner() -> None:
    found, source = works(PLAIN), of(PLAIN)[1]
    counters: list[Counting] = []

    def wrap(device: str, transport: Transport) -> Transport:
        counters.append(Counting(transport, device))
        return counters[-1]

    session = ThreadSession(found[0], dict(source.parameters), PLAIN.data(), wrap=wrap)
    list(session.run(0, 2))
    for counter in counters:
        counter.sent.clear()
    cost = session.switch(found[1])
    sent = {pair: n for counter in counters for pair, n in counter.sent.items()}
    session.close()
    graph = source.graph
    needed = moves(found[0].plan, found[1].plan, graph, EVERYWHERE)
    assert {(m.source, m.target) for m in needed} == sent.keys()
    held = {d: set(names) for d, names in found[0].program.held.items()}
    lacking = {
        (d, n) for d, names in found[1].program.held.items() for n in names if n not in held.get(d, set())
    }
    assert {(m.target, n) for m in needed for n in m.parameters} == lacking
    assert len(lacking) == sum(len(m.parameters) for m in needed)  # nothing twice
    for move in needed:
        tensors = move_bytes(move, graph, 1)  # momentum: one copy
        # Besides the tensors: their names and shapes, the learning rate, and the length of all that.
        assert 0 < sent[move.source, move.target] - tensors < 4096
    assert cost.moved_bytes == sum(sent.values()) - 8 * len(needed)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_what_goes_over_a_slow_link_is_passed_on_and_stays_exact(pool: WorkerPool, kind: str) -> None:
    source = of(CLIPPED)[1]
    spans = [(Stage(start=0, stop=len(source.graph), replicas=replicas(r)),) for r in ("a:12", "b:7 c:5")]
    plans = [plan_of(source.graph, stages, stages[0].replicas, 1) for stages in spans]
    # Observed, so devices without a part learn of the run before they get one.
    first, second = (replace(assignment(CLIPPED, source, p, EVERYWHERE), observe=True) for p in plans)
    slow = [
        LinkTimes(source=x, target=y, latency_s=0.0, bandwidth_bytes_per_s=rate)
        for x, y, rate in (("a", "b", 1e8), ("a", "c", 1e3), ("b", "c", 1e8))
    ]
    needed = moves(plans[0], plans[1], source.graph, EVERYWHERE, slow)
    assert ("b", "c") in {(m.source, m.target) for m in needed if m.relayed}
    tensors = dict(source.parameters)
    session: Session = (
        ThreadSession(first, tensors, CLIPPED.data())
        if kind == "threads"
        else ProcessSession(pool, first, tensors, CLIPPED.data())
    )
    losses = [report.loss for report in session.run(0, 4)]
    assert session.switch(second, slow).moved_bytes > 0
    losses += [report.loss for report in session.run(4, STEPS - 4)]
    snapshot = session.snapshot()
    session.close()
    assert distance(CLIPPED, snapshot, losses) < 1e-9


def test_new_rows_and_micro_batches_move_nothing() -> None:
    graph = of(PLAIN)[1].graph
    first = plans(graph)[0]
    stages = tuple(
        s.model_copy(update={"replicas": replicas(text)})
        for s, text in zip(first.stages, ("a:1 b:2", "c:3"), strict=True)
    )
    other = plan_of(graph, stages, stages[0].replicas, 4)
    assert moves(first, other, graph, EVERYWHERE) == ()


def test_running_statistics_of_a_new_holder_are_the_mean_of_the_old_ones() -> None:
    torch.manual_seed(0)
    case = Case(
        "mobilenet-3", lambda: mobilenet_v2(num_classes=3, width=0.25), nn.CrossEntropyLoss(),
        lambda: synthetic_images(rows=48, shape=(3, 16, 16), classes=3, seed=0)[0], batch=12,
    )  # fmt: skip
    _, source = of(case)
    graph = source.graph
    wide = (Stage(start=0, stop=len(graph), replicas=replicas("a:8 b:4")),)
    alone = (Stage(start=0, stop=len(graph), replicas=replicas("c:12")),)
    first, second = (
        assignment(case, source, plan_of(graph, s, s[0].replicas, 1), EVERYWHERE) for s in (wide, alone)
    )
    session = ThreadSession(first, source.parameters | source.buffers, case.data())
    list(session.run(0, 2))
    before = session.snapshot().buffers
    session.switch(second)
    after = session.snapshot().buffers
    session.close()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_peer_that_sends_nothing_is_named_within_the_deadline() -> None:
    found, source = works(PLAIN), of(PLAIN)[1]
    needed = moves(found[0].plan, found[1].plan, source.graph, EVERYWHERE)
    hurried = replace(found[1], job=PLAIN.job(transfer_timeout_s=0.2))
    session = ThreadSession(found[0], dict(source.parameters), PLAIN.data())
    list(session.run(0, 1))
    mute = needed[0].source

    class Mute:
        def __init__(self, inner: Transport) -> None:
            self.inner = inner
            self.recv, self.close = inner.recv, inner.close

        def send(self, peer: str, tag: int, tensors: Tensors) -> Pending:
            return session._fabric.transport("nobody").send(f"{peer}-elsewhere", tag, tensors)

    session._transports[mute] = Mute(session._transports[mute])
    with pytest.raises(PeerError, match=f"'{mute}': nothing within 0.2 s|failed on another device"):
        session.switch(hurried)
    session.close()


class Looking:
    """A guide that asks for a link to a device that has no part in the plan, and never halts.

    It asks again before the first answer can have come.
    """

    def __init__(self) -> None:
        sizes = (1000, 50_000)
        self.wanted = [(Probe("a", "d", sizes), Probe("d", "a", sizes)), (Probe("a", "d", sizes),)]
        self.found: dict[tuple[str, str], tuple[tuple[int, float], ...]] = {}

    def wants_halt(self) -> bool:
        return False

    def hesitates_s(self) -> float:
        return 0.0

    def wanted_probes(self) -> tuple[Probe, ...]:
        return self.wanted.pop() if self.wanted else ()

    def probed(self, probe: Probe, samples: tuple[tuple[int, float], ...]) -> None:
        self.found[probe.source, probe.target] = samples


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_link_is_probed_between_two_steps_and_the_run_goes_on(pool: WorkerPool, kind: str) -> None:
    work, source, guide = works(PLAIN)[0], of(PLAIN)[1], Looking()
    tensors = dict(source.parameters)
    session: Session = (
        ThreadSession(work, tensors, PLAIN.data())
        if kind == "threads"
        else ProcessSession(pool, work, tensors, PLAIN.data())
    )
    losses = [report.loss for report in session.run(0, STEPS, guide)]
    snapshot = session.snapshot()
    session.close()
    assert [n for n, _ in guide.found["a", "d"]] == [1000, 50_000]
    assert all(seconds > 0 for _, seconds in guide.found["a", "d"])
    assert distance(PLAIN, snapshot, losses) < 1e-9


def test_the_same_rows_make_up_a_step_under_every_plan() -> None:
    shared = cluster(("a", "b"))
    graph = of(PLAIN)[1].graph
    seen: list[list[list[int]]] = []
    for count in (1, 2, 3, 6):
        rows = PLAIN.batch // count
        stages = (Stage(start=0, stop=len(graph), replicas=(Replica(device="c", rows=rows),)),)
        sources = (Replica(device="a", rows=rows // 2), Replica(device="b", rows=rows // 2))
        sampler = assignment(PLAIN, of(PLAIN)[1], plan_of(graph, stages, sources, count), shared).sampler
        seen.append([sorted(int(i) for i in sampler.indices(s, 11).flatten()) for s in (0, 1)])
    assert all(found == seen[0] for found in seen)


def machines(*, emulated: bool = True, **changes: Any) -> Cluster:
    """Three sites; ``a`` is a little faster than the others."""
    data = {
        "name": "drifting",
        "devices": [{"id": "a", "site": "north"}, {"id": "b", "site": "south", "speed": 0.9},
                    {"id": "c", "site": "west", "speed": 0.8}],
        "links": [
            {"between": ["north", "south"], "bandwidth": "20 Mbit/s", "latency": "1 ms"},
            {"between": ["north", "west"], "bandwidth": "15 Mbit/s", "latency": "1 ms"},
            {"between": ["south", "west"], "bandwidth": "100 Mbit/s", "latency": "1 ms"},
        ],
        "data": "everywhere",
        **changes,
    }  # fmt: skip
    return Cluster.parse(data | ({"emulation": {"core_share": 0.05}} if emulated else {}))


def drifting_job(steps: int, *sizes: int) -> Job:
    return Job.parse(
        {
            "model": {"name": "spanwise.zoo:mlp", "sizes": [*sizes, 8]},
            "data": {
                "name": "spanwise.zoo.data:synthetic_vectors", "rows": 512, "features": sizes[0],
                "classes": 8,
            },
            "batch": 32, "steps": steps, "dtype": "float64", "checkpoint_every": 0,
            "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        }
    )  # fmt: skip


# A device that does all the work becomes six times as slow; the link to the device that does it four times,
# where the data lies on a slow device and another link is nearly as good.
DATA_ON_A = {
    "data": ["a"],
    "devices": [{"id": "a", "site": "north", "speed": 0.05}, {"id": "b", "site": "south"},
                {"id": "c", "site": "west"}],
}  # fmt: skip


def follows(outcome: Outcome, reason: str) -> bool:
    """Whether a plan was changed after the fault, and for that reason."""
    return any(r["step"] > 30 and reason in r["reason"] for r in outcome.summary["adaptations"])


@pytest.mark.parametrize(
    ("sizes", "world", "fault", "reason"),
    [
        ((64, 256, 256, 256), {}, "slow:a*6@30", "a takes"),
        ((512, 64), DATA_ON_A, "slow:a>b*4@30", "a>b has"),
    ],
    ids=["device", "link"],
)
def test_a_run_follows_what_drifts_and_ends_with_the_same_parameters(
    tmp_path: Path, sizes: tuple[int, ...], world: dict[str, Any], fault: str, reason: str
) -> None:
    """On the portable emulation, on threads: everything from the measurement to the migration is real.

    With ``single``, whose first plan is the same however busy this machine is.
    """
    task = drifting_job(90, *sizes)
    plain = run_job(
        task, machines(emulated=False, **world),
        TrainOptions(run=tmp_path / "plain", strategy="single", backend="threads"),
    )  # fmt: skip

    def run(attempt: int) -> Outcome:
        return run_job(
            task, machines(**world),
            TrainOptions(
                run=tmp_path / f"adapted-{attempt}", strategy="single", backend="threads", adapt=True,
                faults=(Fault.of(fault),),
            ),
        )  # fmt: skip

    adapted = run(0)
    for attempt in (1, 2):
        if follows(adapted, reason):
            break
        adapted = run(attempt)  # a busy machine drifts itself, before the fault or by more than it
    records = adapted.summary["adaptations"]
    assert follows(adapted, reason), records
    written = [m for m in adapted.folder.read_metrics() if m["event"] == "adaptation"]
    assert {m["step"] for m in written} == {r["step"] for r in records}
    a, b = plain.model.state_dict(), adapted.model.state_dict()
    assert all(torch.allclose(a[k], b[k], rtol=1e-9, atol=1e-11) for k in a)


@pytest.mark.parametrize("adapt", [False, True], ids=["tries", "tries-and-adapts"])
def test_a_run_that_tries_plans_ends_with_the_same_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, adapt: bool
) -> None:
    monkeypatch.setattr(tryout, "NEAR", 9.0)  # one device is far ahead here
    monkeypatch.setattr(trying, "affordable", lambda found, *_: found)  # and steps take milliseconds
    task = drifting_job(90, 64, 256, 256, 256)
    found = {
        tries: run_job(
            task, machines(),
            TrainOptions(
                run=tmp_path / str(tries), backend="threads", tries=tries, adapt=adapt and tries > 1
            ),
        )
        for tries in (1, 3)
    }  # fmt: skip
    assert found[1].summary["adaptations"] == []
    records = found[3].summary["adaptations"]
    assert len(records) >= 2
    assert "to try it" in records[0]["reason"]
    tried = [r for r in records if "to try it" in r["reason"]]
    assert all(r["realised_gain"] is not None for r in tried)
    assert sum(not r["undone"] for r in tried) <= tryout.TURNS  # of one plan, one a turn at most
    written = [m for m in found[3].folder.read_metrics() if m["event"] == "adaptation"]
    assert {m["step"] for m in written} == {r["step"] for r in records}
    a, b = (found[tries].model.state_dict() for tries in (1, 3))
    assert all(torch.allclose(a[k], b[k], rtol=1e-9, atol=1e-11) for k in a)


def test_only_slow_faults_on_an_emulated_cluster(tmp_path: Path) -> None:
    from spanwise.core.errors import InputError

    for where, fault in ((machines(), "lose:a@1"), (EVERYWHERE, "slow:a*2@1")):
        options = TrainOptions(
            run=tmp_path / "r", backend="threads", strategy="single", faults=(Fault.of(fault),)
        )
        with pytest.raises(InputError, match="a run suffers 'slow' faults only"):
            run_job(drifting_job(2, 8, 8), where, options)
