"""A run that adapts: the planner's Adapter, fed by the training loop, and searches in processes beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from spanwise.api.searcher import Searcher
from spanwise.core.run_folder import RunFolder
from spanwise.lowering import lower
from spanwise.planner import Problem
from spanwise.planner.adaptation import Adaptation, Change, Search, known_in
from spanwise.planner.adapter import Adapter
from spanwise.planner.replan import Candidate
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.session import Probe, StepReport, Switched

OnChange = Callable[[Assignment, Adaptation], None]

KNOWN_S = 0.5  # that simulating known plans may take of the time between two steps


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
        self._searcher, self._foreseer = Searcher(problem), Searcher(problem)
        self._foreseen: tuple[Search, list[Candidate]] | None = None
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
            self._searcher.begin(wanted)
            known = list(_within(known_in(wanted), KNOWN_S))
            self._change = self.adapter.consider(known, report.step, now, last=False)
        else:
            self._consider(report.step, now)
        self._foresee()
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
        """Ends searches under way."""
        self._searcher.close()
        self._foreseer.close()

    def _consider(self, step: int, now_s: float) -> None:
        """Takes in what a search has found by now, unless the last change has yet to show its worth."""
        while self._change is None and not self.adapter.undecided:
            found = self._searcher.found()
            if found is None:
                return
            self._change = self.adapter.consider(found[0], step, now_s, last=found[1])

    def _foresee(self) -> None:
        """Has plans made for what may come, one condition after the other."""
        if self._foreseen is None:
            search = None if self._searcher.busy else self.adapter.foresee()
            if search is not None:
                self._foreseen = (search, [])
                self._foreseer.begin(search)
            return
        search, candidates = self._foreseen
        while (found := self._foreseer.found()) is not None:
            candidates += found[0]
            if found[1]:
                self._foreseen = None
                self.adapter.foreseen(search, candidates)

    def _write(self) -> None:
        """Appends records that are new or have changed; of one step the last line counts."""
        for record in self.adapter.records:
            if self._written.get(record.step) != record:
                self._written[record.step] = record
                self._folder.append_metric({"event": "adaptation", **record.to_data()})


def _within(found: Iterator[Candidate], seconds: float) -> Iterator[Candidate]:
    """As many as come within some seconds, and one at least."""
    end_s = time.monotonic() + seconds
    for entry in found:
        yield entry
        if time.monotonic() >= end_s:
            return
