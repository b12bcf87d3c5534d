"""A lab in which peers and spanwise run by turns on the same devices, measured the same way.

Every device holds one process for the peers (``peers/rank.py``) and one spanwise worker, both started
once; while one side runs the other sleeps. Utilisation, bytes and memory are the kernel's accounts.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).resolve().parent / "peers"), os.environ.get("PYTHONPATH")))
)

import fleet
from measured import middle as middle
from measured import step_s as step_s
from models import RECIPES

from spanwise.api.in_lab import meet_in_lab, profile_in_lab
from spanwise.api.planning import predict
from spanwise.api.prepare import Prepared, prepare
from spanwise.core.cluster import Cluster
from spanwise.core.errors import SpanwiseError
from spanwise.core.job import Job
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.lab import Lab
from spanwise.lowering import lower
from spanwise.planner import Problem
from spanwise.planner.tryout import SETTLE_STEPS, TIMED_STEPS, Tryout, finalists
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.measure import step_times
from spanwise.runtime.pool import WorkerPool
from spanwise.runtime.processes import ProcessSession

CLUSTERS = Path(__file__).resolve().parents[1] / "clusters"
ENDLESS_S = 1e6  # a step of a plan that failed
_MIB = 2**20


@dataclass(frozen=True)
class Measurement:
    """One contestant in one round.

    ``devices`` counts the timed steps only, bytes per step; ``pipes`` are bytes between sites in all that
    was run, for the peers with joining and warm-up.
    """

    step_s: tuple[float, ...]
    devices: Mapping[str, Mapping[str, float]]
    pipes: Mapping[str, float]
    error: str = ""

    def data(self) -> dict[str, Any]:
        """For the raw file."""
        return {"step_s": self.step_s, "devices": self.devices, "pipes": self.pipes, "error": self.error}


def failed(reason: str) -> Measurement:
    """A contestant that did not run."""
    return Measurement((), {}, {}, reason)


def job_of(model: str, batch: int, steps: int = 4, tables: Mapping[str, Any] | None = None) -> Job:
    """The job that trains a benchmark model, as the peers train it.

    ``tables``: model, data and loss of one that the peers do not know.
    """
    return Job.parse(
        {
            "name": f"{model}-{batch}", "batch": batch, "steps": steps, "checkpoint_every": 0,
            "optimizer": {"name": "SGD", "lr": 0.01, "momentum": 0.9}, "transfer_timeout_s": 120.0,
            **(RECIPES[model].tables() if tables is None else tables),
        }
    )  # fmt: skip


class Arena:
    """A context manager: the lab of one cluster file with both sides' processes in it.

    ``models`` are those that peers will train; none leaves the peers out. ``huge_pages``: as ``train`` starts
    workers that train a part.
    """

    def __init__(self, cluster: Cluster, models: Sequence[str], *, huge_pages: bool = False) -> None:
        self.cluster = cluster
        self._stack = contextlib.ExitStack()
        try:
            self.lab = self._stack.enter_context(Lab(cluster))
            with self.lab.eased():
                if models:
                    self.fleet = self._stack.enter_context(
                        fleet.Fleet(cluster.ids, self._start_rank, models=models, eased=self.lab.eased)
                    )
                self.pool: WorkerPool = meet_in_lab(
                    self.lab, cluster.ids, 120.0, lambda _: None, huge_pages=huge_pages
                )
                self._stack.callback(self.pool.close)
        except BaseException:
            self._stack.close()
            raise
        self._ports = itertools.count(20000)  # every namespace has all ports to itself

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def profile(self, prepared: Prepared, cache: Path | None) -> Profile:
        """Layer times of every device under its limits, as ``train --lab`` takes them."""
        return profile_in_lab(prepared, self.cluster, self.lab, self.pool, cache)

    def _start_rank(self, device: str, argv: list[str], env: dict[str, str]) -> Any:
        return self.lab.start(device, argv, env=env, **fleet.PIPES)

    def peer(
        self, peer: str, ranks: Sequence[str], model: str, batch: int, *, steps: int, warmup: int = 1,
        **more: Any,
    ) -> Measurement:  # fmt: skip
        """Runs one of the peers' engines on some devices."""
        command = {
            "peer": peer, "ranks": list(ranks), "model": model, "batch": batch, "steps": steps,
            "warmup": warmup, "address": self.lab.address(ranks[0]), "port": next(self._ports),
            "interface": "eth0", **more,
        }  # fmt: skip
        before = self._reading(self.fleet.pid)
        answers = self.fleet.run(command, deadline_s=300.0)
        error = fleet.failure(answers)
        if error is not None:
            return failed(error)
        found = fleet.step_s(answers)
        return self._measured(found, before, self.fleet.pid, dict(zip(ranks, answers, strict=True)), steps)

    def plan(self, prepared: Prepared, plan: Plan, *, steps: int, warmup: int = 1) -> Measurement:
        """Runs a plan of spanwise."""
        assignment = Assignment(
            prepared.job, self.lab.cluster, prepared.traced.graph, prepared.traced.ops, plan,
            lower(plan, prepared.traced.graph), len(prepared.train), False,
        )  # fmt: skip
        traced = prepared.traced
        tensors = {k: v.detach() for k, v in traced.parameters.items()} | dict(traced.buffers)
        with self.lab.eased():
            session = ProcessSession(self.pool, assignment, tensors, prepared.train)
        if warmup:
            list(session.run(0, warmup))
        pids = self.pool.process_ids
        before = self._reading(lambda device: pids[device])
        reports = list(session.run(warmup, steps + 1))  # a step counts from the end of the one before
        found = step_times(reports, skip=0)
        return self._measured(found, before, lambda device: pids[device], {}, steps + 1)

    def attempt(self, prepared: Prepared, plan: Plan, *, steps: int, warmup: int = 1) -> Measurement:
        """The same; a plan that does not run is kept as failed."""
        try:
            return self.plan(prepared, plan, steps=steps, warmup=warmup)
        except SpanwiseError as error:
            return failed(f"{type(error).__name__}: {error}")

    def tried(self, prepared: Prepared, problem: Problem, first: Plan, tries: int) -> Tryout:
        """Plans by turns until one has won, as ``train --tries`` does; one that fails loses."""
        others = finalists(problem, first, tries - 1) if tries > 1 else ()
        tryout = Tryout((first, *(change.plan for change in others)))
        while not tryout.over:
            steps = self.attempt(prepared, tryout.running, steps=TIMED_STEPS, warmup=SETTLE_STEPS).step_s
            found = steps[:TIMED_STEPS] or (ENDLESS_S,) * TIMED_STEPS
            for seconds in (*found[:1] * tryout.settling, *found):
                tryout.observe(seconds)
        return tryout

    def _reading(self, pid: Any) -> dict[str, Any]:
        for device in self.cluster.ids:
            with contextlib.suppress(OSError):  # starts the kernel's peak of resident memory anew
                Path(f"/proc/{pid(device)}/clear_refs").write_text("5")
        return {
            "at": time.monotonic(),
            "cpu_s": {d: self.lab.cpu_s(d) for d in self.cluster.ids},
            "sent": self.lab.sent_bytes(),
            "pipes": {name: p["sent_bytes"] for name, p in self.lab.pipes().items()},
            "resident": {d: _resident(pid(d), "VmRSS") for d in self.cluster.ids},
        }

    def _measured(
        self, step_s: Sequence[float], before: Mapping[str, Any], pid: Any, answers: Mapping[str, Any],
        steps: int,
    ) -> Measurement:  # fmt: skip
        after_cpu = {d: self.lab.cpu_s(d) for d in self.cluster.ids}
        after_sent, pipes = self.lab.sent_bytes(), self.lab.pipes()
        wall = time.monotonic() - before["at"]
        devices = {}
        for d in self.cluster.ids:
            # A peer times its own steps: what it used in them it says itself, joining and warm-up left out.
            own = answers.get(d, {})
            used = float(own.get("cpu_s", after_cpu[d] - before["cpu_s"][d]))
            seconds = sum(step_s) if own else wall
            devices[d] = {
                "utilization": used / (seconds * self.lab.share(d)),
                "sent_bytes": own.get("sent_bytes", after_sent[d] - before["sent"][d]) / steps,
                "peak_mib": _resident(pid(d), "VmHWM") / _MIB,
                "idle_mib": before["resident"][d] / _MIB,
            }
        carried = {n: p["sent_bytes"] - before["pipes"].get(n, 0) for n, p in pipes.items()}
        return Measurement(tuple(step_s), devices, carried)


def predicted_s(prepared: Prepared, plan: Plan, times: Profile, cluster: Cluster) -> float:
    """Simulated step time of a plan."""
    return predict(plan, prepared.traced.graph, times, cluster, prepared.job).step_time_s


def shape(plan: Plan) -> str:
    """Equal for plans that do the same, whoever made them."""
    return plan.model_copy(update={"strategy": ""}).digest


def trials(tryout: Tryout) -> list[dict[str, Any]]:
    """For the raw file: what each plan showed of itself; nothing where there was no choice."""
    if len(tryout.plans) < 2:
        return []
    return [{"plan": plan.to_data(), "step_s": tryout.seconds(plan)} for plan in tryout.plans]


def prepared_job(model: str, batch: int) -> Prepared:
    """The traced model with its data."""
    return prepare(job_of(model, batch))


def _resident(pid: int, key: str) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(key)), 0)
