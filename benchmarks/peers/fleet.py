"""One ``rank.py`` per device, driven from outside: every wait has a deadline, a lost fleet restarts."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from engines import PEERS

RANK = Path(__file__).with_name("rank.py")
Answer = dict[str, Any]
Start = Callable[[str, list[str], dict[str, str]], "subprocess.Popen[bytes]"]
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
_LONGEST_LINE = 2**20
_GRACE_S = 30.0  # between a group's own timeout and the fleet's


class FleetError(RuntimeError):
    """A device's process does not start or does not say hello."""


def plain(_device: str, argv: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts the process on this machine as it is; ``env`` is complete."""
    return subprocess.Popen(argv, env=env, **PIPES)


def failure(answers: Sequence[Answer]) -> str | None:
    """The first error among the answers, in one line, or None."""
    return next((" ".join(str(a["error"]).split()) for a in answers if "error" in a), None)


def step_s(answers: Sequence[Answer]) -> list[float]:
    """Seconds of each step: the slowest rank's."""
    return [max(times) for times in zip(*(a["step_s"] for a in answers), strict=True)]


class Rank:
    """One process and the thread that reads its answers."""

    def __init__(self, device: str, process: subprocess.Popen[bytes]) -> None:
        if process.stdin is None or process.stdout is None:
            raise FleetError(
                f"device '{device}': start must give a Popen with stdin and stdout pipes (PIPES)"
            )
        self.device, self.process = device, process
        self.ended = threading.Event()  # its standard output is closed
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name=f"answers of {device}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        out = self.process.stdout
        with contextlib.suppress(OSError, ValueError):
            while out is not None and (line := out.readline(_LONGEST_LINE)):
                self._lines.put(line)
        self.ended.set()
        self._lines.put(None)
        if out is not None:
            out.close()

    def send(self, command: Mapping[str, Any]) -> bool:
        """Writes one command; False if the process is gone."""
        line = json.dumps(command) + "\n"
        try:
            if self.process.stdin is None:
                return False
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except (OSError, ValueError):
            return False
        return True

    def answer(self, deadline: float) -> Answer | None:
        """The next answer, or None if the process ended or the deadline passed."""
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            found = None if line is None else json.loads(line)
        except (queue.Empty, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def hang_up(self) -> None:
        """Ends the input: the process leaves once it is idle."""
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()

    def close(self) -> None:
        """Ends the process: politely at the end of its input, else by force."""
        self.hang_up()
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(timeout=2)  # it closes the pipe

    def kill(self) -> None:
        """Ends the process at once."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        self.hang_up()
        self._reader.join(timeout=2)


class Fleet:
    """The peers' processes on ``devices``; a context manager.

    Args:
        devices: device ids, in the cluster file's order.
        start: starts a command on a device with a complete environment and ``PIPES``.
        python: the interpreter on the devices.
        models: benchmark models built once at hello, so that no run pays for importing transformers.
        peers: the peers that will run; what they need is imported at hello.
        hello_timeout_s: most seconds from start to hello.
        eased: a context in which processes start, such as ``lab.eased``.

    Raises:
        FleetError: a device said no hello.
    """

    def __init__(
        self,
        devices: Sequence[str],
        start: Start = plain,
        *,
        python: str = sys.executable,
        models: Sequence[str] = (),
        peers: Sequence[str] = PEERS,
        hello_timeout_s: float = 180.0,
        eased: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.devices = tuple(devices)
        self.versions: dict[str, Answer] = {}
        self.restarts = 0
        self._start, self._python, self._hello_command = (
            start,
            python,
            {"do": "hello", "models": [*models], "peers": [*peers]},
        )
        self._hello_timeout_s, self._eased = hello_timeout_s, eased
        self._ranks: dict[str, Rank] = {}
        self._begin()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, command: Mapping[str, Any], *, deadline_s: float = 600.0) -> list[Answer]:
        """Runs one command on ``command["ranks"]``; answers in their order.

        ``do``, ``me`` and ``rank`` are filled in. The process group's own timeout is kept below the deadline,
        so that a lost neighbour is reported by those who miss it. A rank that ended or gave no answer in time
        has ``{"error": ...}``, and the whole fleet has been started again.

        Args:
            command: fields of :class:`engines.Run`, and ``save``: a file name with ``{rank}`` in it.
            deadline_s: most seconds until the last answer.
        """
        devices = list(command["ranks"])
        unknown = [device for device in devices if device not in self._ranks]
        if unknown or not devices or len({*devices}) != len(devices):
            raise ValueError(f"fleet: ranks {devices} must be different devices of {list(self.devices)}")
        limit = max(1.0, deadline_s - _GRACE_S) if deadline_s > _GRACE_S else deadline_s
        shared = {"do": "run", **command, "timeout_s": min(float(command.get("timeout_s", 120.0)), limit)}
        deadline = time.monotonic() + deadline_s
        for rank, device in enumerate(devices):
            own = {"me": device, "rank": rank}
            if "save" in command:
                own["save"] = str(command["save"]).format(rank=rank)
            self._ranks[device].send({**shared, **own})
        found = [self._ranks[device].answer(deadline) for device in devices]
        answers = [
            answer if answer is not None else {"error": self._lost(device, deadline_s)}
            for device, answer in zip(devices, found, strict=True)
        ]
        if any(answer is None for answer in found):
            self._end(Rank.kill)
            self.restarts += 1
            self._begin()
        return answers

    def pid(self, device: str) -> int:
        """Process id on this machine."""
        return self._ranks[device].process.pid

    def _lost(self, device: str, deadline_s: float) -> str:
        rank = self._ranks[device]
        if rank.ended.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return f"device '{device}': its process ended with status {rank.process.wait(timeout=2)}"
        return f"device '{device}': no answer within {deadline_s:g} s"

    def _begin(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        try:
            with self._eased():
                for device in self.devices:
                    started = self._start(device, [self._python, str(RANK)], dict(env))
                    self._ranks[device] = Rank(device, started)
                for rank in self._ranks.values():
                    rank.send(self._hello_command)
                deadline = time.monotonic() + self._hello_timeout_s
                for device, rank in self._ranks.items():
                    self.versions[device] = self._hello(rank, deadline)
        except BaseException:
            self._end(Rank.kill)
            raise

    def _hello(self, rank: Rank, deadline: float) -> Answer:
        answer = rank.answer(deadline)
        if answer is None or "error" in answer:
            why = answer["error"] if answer else self._lost(rank.device, self._hello_timeout_s)
            raise FleetError(f"device '{rank.device}' said no hello: {why}; see its standard error")
        return answer

    def close(self) -> None:
        """Ends all processes."""
        for rank in self._ranks.values():
            rank.hang_up()  # all at once, so that they leave side by side
        self._end(Rank.close)

    def _end(self, how: Callable[[Rank], None]) -> None:
        for rank in self._ranks.values():
            how(rank)
        self._ranks.clear()
