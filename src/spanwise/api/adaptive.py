"""A run that adapts: the planner's Adapter, fed by the training loop, with searches in a thread beside it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from spanwise.core.errors import SpanwiseError
from spanwise.core.run_folder import RunFolder
from spanwise.lowering import lower
from spanwise.planner import Problem
from spanwise.planner.adapter import Adaptation, Adapter, Change, Search, found_in
from spanwise.planner.replan import Candidate
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.session import Probe, StepReport, Switched

OnChange = Callable[[Assignment, Adaptation], None]


class Adapting:
    """Steers a run (``runtime.training.Steering``). Training goes on while a search is under way."""

    def __init__(
        self, problem: Problem, assignment: Assignment, folder: RunFolder, *, last_step: int,
        strategy: str, on_change: OnChange = lambda _, __: None,
    ) -> None:  # fmt: skip
        """Begins under ``assignment``; ``strategy`` makes plans from the ground up."""
        self._assignment, self._folder, self._on_change = assignment, folder, on_change
        self.adapter = Adapter(problem, assignment.plan, last_step=last_step, strategy=strategy)
        self._change: Change | None = None
        self._thread: threading.Thread | None = None
        self._found: queue.SimpleQueue[tuple[list[Candidate], bool]] = queue.SimpleQueue()
        self._written: dict[int, Adaptation] = {}

    def observe(self, report: StepReport, step_time_s: float) -> None:
        """Takes a step in, and a search that has ended."""
        if self._change is not None:
            return
        now = time.monotonic()
        wanted = self.adapter.observe(report.step, step_time_s, report.observed, now)
        if isinstance(wanted, Change):
            self._change = wanted
        elif wanted is not None:
            self._search(wanted)
        else:
            self._consider(report.step, now)
        self._write()

    def wants_halt(self) -> bool:
        """Whether there is a plan to go over to."""
        return self._change is not None

    def wanted_probes(self) -> tuple[Probe, ...]:
        """Links that slowed down and carry nothing, from time to time."""
        if self._change is not None:
            return ()
        return tuple(Probe(*look.link, look.sizes) for look in self.adapter.look(time.monotonic()))

    def probed(self, probe: Probe, samples: tuple[tuple[int, float], ...]) -> None:
        """Takes a probe in."""
        self.adapter.looked((probe.source, probe.target), samples)

    def next_assignment(self) -> Assignment | None:
        """The run under the plan to go over to."""
        if self._change is None:
            return None
        plan, graph = self._change.plan, self._assignment.graph
        program = lower(plan, graph, clip=self._assignment.job.clip_norm is not None)
        return replace(self._assignment, plan=plan, program=program)

    def switched(self, assignment: Assignment, step: int, cost: Switched) -> None:
        """Notes what the change took."""
        assert self._change is not None
        record = self.adapter.changed(self._change, step, cost.moved_bytes, cost.seconds)
        self._assignment, self._change = assignment, None
        self._write()
        self._on_change(assignment, record)

    def close(self) -> None:
        """Waits for a search under way: it cannot be stopped, and ends within seconds."""
        if self._thread is not None:
            self._thread.join()

    def _search(self, search: Search) -> None:
        def work() -> None:
            try:
                for number, found in enumerate(found_in(search)):
                    self._found.put((found, number > 0))
            except SpanwiseError:  # no plan for these numbers: the one that runs stays
                self._found.put(([], True))

        self._thread = threading.Thread(target=work, name="replan", daemon=True)
        self._thread.start()

    def _consider(self, step: int, now_s: float) -> None:
        """Takes in what a search has found by now."""
        while self._change is None and not self._found.empty():
            found, last = self._found.get()
            self._change = self.adapter.consider(found, step, now_s, last=last)

    def _write(self) -> None:
        """Appends records that are new or have changed; of one step the last line counts."""
        for record in self.adapter.records:
            if self._written.get(record.step) != record:
                self._written[record.step] = record
                self._folder.append_metric({"event": "adaptation", **record.to_data()})
