"""A process beside a run that looks for plans: at the lowest priority, so that training loses nothing to it.

In a thread a search would hold the interpreter that hands steps on, and compete for a core with devices that
run on this machine. The process gets one line of JSON with the problem, then one for each search, and answers
with a line for each group of candidates. It ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from typing import IO, Any

from spanwise.core.cluster import Cluster
from spanwise.core.errors import SpanwiseError
from spanwise.core.importance import Importance
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.planner.adapting.adaptation import Search, found_in
from spanwise.planner.adapting.replan import Candidate
from spanwise.planner.problem import Memo, Problem

LEAST_PRIORITY = 19
IDLE_S = 60.0  # without a search after which the process ends, until there is one
TRIES = 2  # processes that may die of a search
ENDING_S = 5.0

Found = tuple[list[Candidate], bool]  # candidates; whether nothing more comes of that search


class Searcher:
    """One search at a time: ``begin`` it, and take what it has ``found`` from time to time."""

    def __init__(self, problem: Problem) -> None:
        self.busy = False
        self._problem = problem
        self._process: subprocess.Popen[bytes] | None = None
        self._number = 0  # of the search whose answers count
        self._wanted: queue.SimpleQueue[tuple[int, Search] | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[int, Found]] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="searcher", daemon=True)
        self._thread.start()

    def begin(self, search: Search) -> None:
        """A search under way is given up."""
        self.give_up()
        self.busy = True
        self._wanted.put((self._number, search))

    def give_up(self) -> None:
        """Ends a search under way; nothing more comes of it."""
        self._number += 1
        if self.busy:
            self._kill()
        self.busy = False

    def found(self) -> Found | None:
        """The next that has come of the search, if there is anything."""
        try:
            number, found = self._found.get_nowait()
        except queue.Empty:
            return None
        if number != self._number:
            return self.found()
        self.busy = not found[1]
        return found

    def close(self) -> None:
        """Ends the process; a search under way is given up."""
        self._closed = True
        self._wanted.put(None)
        self._kill()
        self._thread.join(ENDING_S)

    def _kill(self) -> None:
        process = self._process
        if process is not None:
            process.kill()

    def _serve(self) -> None:
        try:
            while not self._closed:
                try:
                    wanted = self._wanted.get(timeout=IDLE_S)
                except queue.Empty:
                    self._end()
                    continue
                if wanted is not None:
                    self._carry_out(*wanted)
        finally:
            self._end()

    def _carry_out(self, number: int, search: Search) -> None:
        for _ in range(TRIES):
            if number != self._number or self._closed:
                return
            try:
                self._ask(number, search)
            except (OSError, ValueError):  # the process died, or was killed for the search before this one
                self._end()
            else:
                return
        self._found.put((number, ([], True)))

    def _ask(self, number: int, search: Search) -> None:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        _write(process.stdin, _search_data(search))
        last = False
        while not last:
            answer = json.loads(process.stdout.readline())  # of an ended process: empty, a ValueError
            last = bool(answer["last"])
            self._found.put((number, ([_candidate(entry) for entry in answer["found"]], last)))

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "spanwise.api.searcher"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._process = process
        if self._closed:
            process.kill()
        assert process.stdin is not None
        _write(process.stdin, _problem_data(self._problem))
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not written is lost with the process
                    stream.close()


def main() -> None:
    """The process: searches until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run that started it ends it
    _give_way()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # nothing else may get between the lines
    try:
        problem = _problem(json.loads(sys.stdin.buffer.readline()))
        for line in sys.stdin.buffer:
            _answer(_search(json.loads(line), problem), out)
    except BrokenPipeError:
        pass


def _give_way() -> None:
    """Runs only when nothing else wants the processor, from now on.

    A process that is merely the least important keeps it until its slice ends, and a device that wakes up
    meanwhile is late by some milliseconds.
    """
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            return
    if hasattr(os, "nice"):
        os.nice(LEAST_PRIORITY)


def _answer(search: Search, out: IO[bytes]) -> None:
    try:
        for found in found_in(search):
            _write(out, {"found": [_candidate_data(entry) for entry in found], "last": False})
    except SpanwiseError:  # no plan for these numbers: the one that runs stays
        pass
    _write(out, {"found": [], "last": True})


def _write(stream: IO[bytes], data: dict[str, Any]) -> None:
    stream.write(json.dumps(data, separators=(",", ":")).encode() + b"\n")
    stream.flush()


def _problem_data(problem: Problem) -> dict[str, Any]:
    importance = None if problem.importance is None else problem.importance.to_data()
    return {
        "graph": problem.graph.to_data(), "profile": problem.profile.to_data(),
        "cluster": problem.cluster.to_data(), "job": problem.job.to_data(), "importance": importance,
        "thorough": problem.thorough,
    }  # fmt: skip


def _problem(data: dict[str, Any]) -> Problem:
    importance = None if data["importance"] is None else Importance.parse(data["importance"])
    return Problem(
        graph=ModelGraph.parse(data["graph"]), profile=Profile.parse(data["profile"]),
        cluster=Cluster.parse(data["cluster"]), job=Job.parse(data["job"]), importance=importance,
        thorough=bool(data["thorough"]),
    )  # fmt: skip


def _search_data(search: Search) -> dict[str, Any]:
    return {
        "profile": search.problem.profile.to_data(), "plan": search.plan.to_data(),
        "strategy": search.strategy, "reason": search.reason, "ahead": search.ahead,
    }  # fmt: skip


def _search(data: dict[str, Any], problem: Problem) -> Search:
    now = replace(problem, profile=Profile.parse(data["profile"]), memo=Memo())
    return Search(
        now, Plan.parse(data["plan"]), str(data["strategy"]), str(data["reason"]), ahead=bool(data["ahead"])
    )


def _candidate_data(entry: Candidate) -> dict[str, Any]:
    return {
        "plan": entry.plan.to_data(), "kind": entry.kind, "step_s": entry.step_s,
        "moved_bytes": entry.moved_bytes, "move_s": entry.move_s,
    }  # fmt: skip


def _candidate(data: dict[str, Any]) -> Candidate:
    return Candidate(
        Plan.parse(data["plan"]), data["kind"], float(data["step_s"]), int(data["moved_bytes"]),
        float(data["move_s"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
