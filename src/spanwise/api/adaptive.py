"""A run that adapts: the planner's Adapter, fed by the training loop, and searches in processes beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from spanwise.api.searcher import Searcher
from spanwise.core.profile import Profile
from spanwise.core.run_folder import RunFolder
from spanwise.planner import Problem
from spanwise.planner.adapting.adaptation import Adaptation, Change, Search, known_in
from spanwise.planner.adapting.adapter import Adapter
from spanwise.planner.adapting.replan import Candidate
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.session import Probe, StepReport, Switched

OnChange = Callable[[Assignment, Adaptation], None]

POLL_S = 0.01
KNOWN_S = 0.5  # that simulating known plans may take of the time between two steps
AHEAD_S, AHEAD_SHARE = 30.0, 0.2  # for plans made ahead, and at most this part of what training will take
MOST_SEARCH_S = 120.0  # after which a search is given up


class Adapting:
    """Steers a run (``runtime.training.Steering``). Training goes on while a search is under way."""

    def __init__(
        self, problem: Problem, assignment: Assignment, folder: RunFolder, *, last_step: int,
        strategy: str, on_change: OnChange = lambda _, __: None,
    ) -> None:  # fmt: skip
        """Begins under ``assignment``; ``strategy`` makes plans from the ground up."""
        self._assignment, self._folder, self._on_change = assignment, folder, on_change
        self.adapter = Adapter(problem, assignment.plan, last_step=last_step, strategy=strategy)
        self._problem = problem
        self._change: Change | None = None
        self._searcher = Searcher(problem)
        self._found: list[Candidate] = []
        self._since_s = 0.0
        self._written: dict[int, Adaptation] = {}
        self._step = 0  # the newest that was observed

    @property
    def records(self) -> tuple[Adaptation, ...]:
        """All changes of plan, in order."""
        return tuple(self.adapter.records)

    @property
    def profile(self) -> Profile:
        """The numbers believed now."""
        return self.adapter.profile

    def begin(self, assignment: Assignment) -> None:
        """Under another plan than was thought, before any step."""
        self._assignment = assignment
        self.adapter.begin(assignment.plan)

    def prepare(self, training_s: float) -> None:
        """Before the first step: has plans made for what may come, as many as fit into some seconds.

        Not later: a search takes a core, and where that is one of the devices' all steps get longer.
        ``training_s``: what the whole run will take.
        """
        end_s = time.monotonic() + min(AHEAD_S, AHEAD_SHARE * training_s)
        searchers = (self._searcher, Searcher(self._problem))
        thought: dict[Searcher, tuple[Search, list[Candidate]]] = {}
        try:
            while time.monotonic() < end_s:
                for searcher in searchers:
                    if searcher not in thought and (search := self.adapter.foresee()) is not None:
                        thought[searcher] = (search, [])
                        searcher.begin(search)
                if not thought:
                    break
                self._gather(thought)
                time.sleep(POLL_S)
        finally:
            searchers[0].give_up()
            searchers[1].close()

    def _gather(self, thought: dict[Searcher, tuple[Search, list[Candidate]]]) -> None:
        for searcher, (search, candidates) in tuple(thought.items()):
            while (found := searcher.found()) is not None:
                candidates += found[0]
                if found[1]:
                    del thought[searcher]
                    self.adapter.foreseen(search, candidates)

    def observe(self, report: StepReport, step_time_s: float) -> None:
        """Takes a step in, and a search that has ended."""
        self._step = report.step
        if self._change is not None:
            return
        now = time.monotonic()
        wanted = self.adapter.observe(report.step, step_time_s, report.observed, now)
        if isinstance(wanted, Change):
            self._change = wanted
        elif wanted is not None:
            self._begin(wanted, now)
        elif self.adapter.searching:
            self._consider(report.step, now)
        self._write()

    def _begin(self, wanted: Search, now_s: float) -> None:
        """Holds what is known against a new condition, and has more looked for if that is not enough."""
        known, enough = list(_within(known_in(wanted), KNOWN_S)), self.adapter.covered(wanted)
        self._change = self.adapter.consider(known, self._step, now_s, last=enough)
        if self._change is None and not enough:
            self._searcher.begin(wanted)
            self._found, self._since_s = [], now_s

    def wants_halt(self) -> bool:
        """Whether there is a plan to go over to."""
        return self._change is not None

    def wanted_probes(self) -> tuple[Probe, ...]:
        """Links that may be why steps take longer, or that slowed down and carry nothing."""
        if self._change is not None:
            return ()
        return tuple(Probe(*look.link, look.sizes) for look in self.adapter.look(time.monotonic()))

    def probed(self, probe: Probe, samples: tuple[tuple[int, float], ...]) -> None:
        """Takes a probe in, and keeps it: why a run was planned anew may rest on nothing else."""
        self.adapter.looked((probe.source, probe.target), samples)
        self._folder.append_metric(
            {"event": "probe", "step": self._step, "source": probe.source, "target": probe.target,
             "round_trips": [[size, round(seconds, 6)] for size, seconds in samples]}
        )  # fmt: skip
        wanted = self.adapter.reconsider(self._step) if self._change is None else None
        if wanted is not None:
            self._begin(wanted, time.monotonic())

    def hesitates_s(self) -> float:
        """While a link is probed of which steps may have become longer."""
        return 0.0 if self._change is not None else self.adapter.hesitates_s(self._step, time.monotonic())

    def next_assignment(self) -> Assignment | None:
        """The run under the plan to go over to."""
        return None if self._change is None else self._assignment.under(self._change.plan)

    def switched(self, assignment: Assignment, step: int, cost: Switched) -> None:
        """Notes what the change took."""
        assert self._change is not None
        record = self.adapter.changed(self._change, step, cost.moved_bytes, cost.seconds)
        self._assignment, self._change = assignment, None
        self._write()
        self._on_change(assignment, record)

    def close(self) -> None:
        """Ends a search under way."""
        self._searcher.close()

    def _consider(self, step: int, now_s: float) -> None:
        """Takes in what a search has found, once it has ended or has lasted too long."""
        last = now_s - self._since_s > MOST_SEARCH_S
        while not last and (found := self._searcher.found()) is not None:
            self._found += found[0]
            last = found[1]
        if last:
            self._change = self.adapter.consider(self._found, step, now_s, last=True)

    def _write(self) -> None:
        """Appends records that are new or have changed."""
        for record in self.adapter.records:
            if self._written.get(record.step) != record:
                self._written[record.step] = record
                note(self._folder, record)


def note(folder: RunFolder, record: Adaptation) -> None:
    """A line of ``metrics.jsonl``; of one step the last counts."""
    folder.append_metric({"event": "adaptation", **record.to_data()})


def _within(found: Iterator[Candidate], seconds: float) -> Iterator[Candidate]:
    """As many as come within some seconds, and one at least."""
    end_s = time.monotonic() + seconds
    for entry in found:
        yield entry
        if time.monotonic() >= end_s:
            return
