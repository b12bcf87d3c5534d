"""Where a run's processes are: the devices of a lab, or all of them plainly on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from task import SET_UP_S, Task

from spanwise.core.cluster import Cluster
from spanwise.lab import Lab

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
_GRACE_S = 5.0
_LINES = 15


class Plain:
    """The lab's way of starting processes without a lab: every device is this machine, nothing is slowed."""

    def address(self, _device: str) -> str:
        """The same for all."""
        return "127.0.0.1"

    def start(self, _device: str | None, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """A process of this machine."""
        return subprocess.Popen(argv, **options)

    def eased(self) -> AbstractContextManager[None]:
        """Nothing to ease."""
        return nullcontext()


class Place:
    """One run's place: starts processes with logs, waits with deadlines, ends all that it started."""

    def __init__(self, lab: Lab | None, task: Task) -> None:
        self.lab, self.task = lab, task
        self._starter: Lab | Plain = lab or Plain()
        self._children: dict[str, subprocess.Popen[Any]] = {}

    @property
    def interface(self) -> str:
        """Name of the interface that tensors go over."""
        return "lo" if self.lab is None else "eth0"

    def address(self, device: str) -> str:
        """A device's address on the data network."""
        return self._starter.address(device)

    def eased(self) -> AbstractContextManager[None]:
        """No CPU share holds inside: for imports and set-up."""
        return self._starter.eased()

    def start(
        self, device: str, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        """Starts a process as a device; what it prints goes to ``NAME.log`` in the task's folder."""
        with (self.task.folder / f"{name}.log").open("ab") as log:
            self._children[name] = self._starter.start(
                device, list(argv), env=environment(env or {}), cwd=HERE,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def finished(self, name: str) -> int | None:
        """Exit status of a process, or None while it runs."""
        return self._children[name].poll()

    def wait(self, done: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Waits until ``done()``.

        Raises:
            RuntimeError: a process failed before, or time is up; with the last lines of the logs.
        """
        end = time.monotonic() + timeout_s
        while not done():
            for name, child in self._children.items():
                if child.poll() not in (None, 0):
                    raise RuntimeError(f"{name} ended with {child.poll()}: {self.last_words(name)}")
            if time.monotonic() > end:
                words = "\n".join(f"{name}: {self.last_words(name)}" for name in self._children)
                raise RuntimeError(f"{what} took more than {timeout_s:g} s\n{words}")
            time.sleep(0.05)

    def wait_ready(self, *names: str) -> None:
        """Waits until these processes stand in ``task.meet``."""
        files = [self.task.folder / f"ready-{name}" for name in names]
        self.wait(lambda: all(file.exists() for file in files), "set-up", SET_UP_S)

    def let_go(self) -> None:
        """Lets all go on that stand in ``task.meet``, and waits until training is over."""
        (self.task.folder / "go").touch()
        curve = self.task.folder / "curve.json"
        # Evaluations come on top of the limit, which holds for training.
        self.wait(
            lambda: curve.exists() and self.curve()["over"], "training", 2 * self.task.limit_s + SET_UP_S
        )

    def curve(self) -> dict[str, Any]:
        """Evaluations so far."""
        return json.loads((self.task.folder / "curve.json").read_text(encoding="utf-8"))

    def last_words(self, name: str) -> str:
        """The end of a process's log."""
        path = self.task.folder / f"{name}.log"
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES:])

    def end(self) -> None:
        """Ends every process that was started here, with its group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for child in self._children.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
            end = time.monotonic() + _GRACE_S
            while any(c.poll() is None for c in self._children.values()) and time.monotonic() < end:
                time.sleep(0.05)

    def measured(self) -> dict[str, Any]:
        """What the lab counted: bytes sent on the data network, and each device's peak memory."""
        if self.lab is None:
            return {}
        return {
            "sent_bytes": sum(self.lab.sent_bytes().values()),
            "peak_memory_bytes": {d: self.lab.peak_memory_bytes(d) for d in self.lab.cluster.ids},
        }


@contextmanager
def place(cluster: Cluster, task: Task, *, in_lab: bool) -> Iterator[Place]:
    """A place for one run. A lab is made anew for each, so that its counters start at nothing."""
    with ExitStack() as stack:
        found = Place(stack.enter_context(Lab(cluster)) if in_lab else None, task)
        stack.callback(found.end)
        yield found


def free_port() -> int:
    """A port that was free a moment ago; every namespace of a lab has all of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """A process's environment: this one's without proxies, one thread, spanwise importable."""
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    paths = os.pathsep.join((str(HERE), str(REPOSITORY / "src")))
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | dict(more)
