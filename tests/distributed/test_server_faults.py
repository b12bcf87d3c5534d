"""Training over a parameter server on a wire that harms it, and on one that is not as believed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from cases import MLP
from equality import assignment, of
from test_servers import STEPS, on_threads, same_bits
from torch import nn

from planner_cases import make_job
from server_cases import server_plan, star
from spanwise.core.errors import PeerError
from spanwise.core.plan import Plan, ServerSync
from spanwise.core.profile import DeviceTimes, LayerTimes, Profile, TimeTable
from spanwise.planner import Problem, make_plan
from spanwise.planner.adapting.resegment import Recut, Resegmenter
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.pool import Meeting, WorkerPool
from spanwise.runtime.processes import ProcessSession
from spanwise.runtime.session import Probe


def test_a_worker_killed_in_the_middle_of_a_push_leaves_whole_steps_behind() -> None:
    """A push takes half a second here; the other devices end, and what was saved before goes on."""
    graph = of(MLP)[1].graph
    ends = (len(graph),)
    sync = ServerSync(server="s", devices=("d0",), pushes=ends, pulls=ends, order=(0,), as_aggregated=True)
    plan = server_plan(graph, {"d0": MLP.batch}, sync)
    machines = star(1, bandwidth=2.0 * graph.parameter_bytes, emulation={"core_share": 0.4})
    work = replace(assignment(MLP, of(MLP)[1], plan, machines), emulate=True)
    pool = WorkerPool(machines, ("d0", "s"), Meeting(), emulate=True)
    try:
        session = ProcessSession(pool, work, dict(of(MLP)[1].parameters), MLP.data())
        list(session.run(0, 1))
        kept = session.snapshot()
        steps = session.run(1, 1_000_000)
        next(steps)
        time.sleep(0.2)
        os.kill(pool.process_ids["d0"], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(PeerError) as caught:
            deque(steps, maxlen=0)
        assert time.monotonic() - began < 10.0
        assert "'d0'" in str(caught.value)
        server = psutil.Process(pool.process_ids["s"])
    finally:
        pool.close()
    assert not server.is_running()
    alone = assignment(MLP, of(MLP)[1], plan, machines)
    with on_threads(MLP, plan, alone) as session:
        list(session.run(0, 1))
        assert same_bits(session.snapshot(), kept)  # one whole step, nothing of those that followed


def test_on_gloo_a_doubled_or_lost_segment_is_an_error_after_whole_steps() -> None:
    """Two sends with one number are two messages to gloo. No other message has that number, so nobody takes
    the second one, and its sender says so at the end of that step."""
    doubled, lost = ("doubled by a", "doubled by d"), ("lost by a", "lost by d")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gloo_faults.py")), "as it is", *doubled, *lost],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["replayed"]["own"] == [1.0, 2.0, 3.0]
    assert found["replayed"]["shared"] == [1.0, 9.0, 2.0]  # negative control: what the numbers are for
    runs = found["runs"]
    assert runs["as it is"] == {"said": dict.fromkeys("abcd", ""), "steps": [STEPS]}
    for device, action in (("a", "send push y0.3 to d"), ("d", "send pull y0.0 to a")):
        said = runs[f"doubled by {device}"]["said"][device]
        assert f"{device}: step 0, '{action}" in said
        assert "nothing within 0.5 s" in said
        assert runs[f"doubled by {device}"]["steps"] == [1]
    for name, device, text, steps in (
        ("lost by a", "d", "d: step 0, 'recv push y0.3 from a", 0),
        ("lost by d", "a", "a: step 1, 'recv pull y0.0 from d", 1),
    ):
        said = runs[name]["said"][device]
        assert text in said
        assert "nothing within 1.5 s" in said or "the connection broke" in said  # who gives up first
        assert runs[name]["steps"] == [steps]


@dataclass
class Following:
    """Halts a run as soon as its messages ask for other segments."""

    follower: Resegmenter
    found: Recut | None = None

    def wants_halt(self) -> bool:
        return self.found is not None

    def hesitates_s(self) -> float:
        return 0.0

    def wanted_probes(self) -> tuple[Probe, ...]:
        return tuple(Probe(*look.link, look.sizes) for look in self.follower.look(time.monotonic()))

    def probed(self, probe: Probe, samples: tuple[tuple[int, float], ...]) -> None:
        self.follower.looked((probe.source, probe.target), samples)


@pytest.mark.parametrize("strategy", ["dynacomm", "duplex"])
def test_a_run_whose_messages_are_cheaper_than_believed_cuts_anew_and_keeps_its_bits(strategy: str) -> None:
    """A message is believed to take 1 s whatever its size, so the plan has one each way; it takes no such
    time on these links. Fits, probes and the change are real."""
    case = replace(MLP, name="wide", model=lambda: nn.Sequential(*wide()))
    source = of(case)[1]
    graph, machines = source.graph, star(2, bandwidth=2e6, emulation={"core_share": 0.3})
    layers = (LayerTimes(forward_s=(0.01,), backward_s=(0.02,)),) * len(graph)
    table = TimeTable(rows=(1,), layers=layers, message_s=0.5)
    profile = Profile(
        graph_digest=graph.digest, tables=(table,),
        devices=tuple(DeviceTimes(device=d) for d in machines.ids),
    )  # fmt: skip
    problem = Problem(graph, profile, machines, make_job(case.batch))
    plan = make_plan(problem, strategy)
    assert len(plan.servers[0].pushes) == 1
    follower = Resegmenter.of(problem, plan)
    assert follower is not None

    def work(now: Plan) -> Assignment:
        return replace(assignment(case, source, now, machines), emulate=True, observe=True)

    step, most, pushes = 0, 12, [1]
    with on_threads(case, plan, work(plan)) as session:
        while step < most:
            guide = Following(follower)
            for report in session.run(step, most - step, guide):
                follower.add(report.end - report.start, report.observed)
                guide.found = guide.found or follower.cut_anew()
                step = report.step + 1
            if guide.found is not None:
                session.switch(work(guide.found.plan))
                pushes.append(len(guide.found.plan.servers[0].pushes))
                after = follower.under(guide.found.plan)
                assert after is not None
                follower = after
        found = session.snapshot()
    assert max(pushes) > 1
    with on_threads(case, plan, assignment(case, source, plan, machines)) as session:
        list(session.run(0, most))
        assert same_bits(session.snapshot(), found)


def wide() -> list[nn.Module]:
    return [nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 4)]
