"""The run folder: the interface between commands. Each file can be redone, diffed and tested alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from spanwise.core.errors import InputError, ResourceError
from spanwise.core.noun import write_whole


def _aside(path: Path) -> Iterator[Path]:
    return (path.with_name(f"{path.name}.{number}") for number in count(1))


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run; ``docs/run-folder.md`` describes each."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, keep: bool = False) -> RunFolder:
        """Makes the folder; an earlier run there is moved aside (to ``NAME.1``, ...), or kept with ``keep``.

        Raises:
            ResourceError: it cannot be written.
        """
        folder = cls(path)
        try:
            if folder.job.is_file() and not keep:
                path.rename(next(p for p in _aside(path) if not p.exists()))
            folder.timelines.mkdir(parents=True, exist_ok=True)
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ResourceError(
                f"run folder {path}: cannot be written ({error.strerror}); choose another with --run"
            ) from None
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run; ``InputError`` if there is none."""
        folder = cls(path)
        if not folder.job.is_file():
            raise InputError(
                f"run folder {path}: holds no run (no {folder.job.name}); give the folder of a run"
            )
        return folder

    @property
    def job(self) -> Path:
        """Job."""
        return self.path / "job.json"

    @property
    def cluster(self) -> Path:
        """Cluster."""
        return self.path / "cluster.json"

    @property
    def graph(self) -> Path:
        """ModelGraph."""
        return self.path / "graph.json"

    @property
    def ops(self) -> Path:
        """The traced operations that stages are built from."""
        return self.path / "ops.json"

    @property
    def profile(self) -> Path:
        """Profile."""
        return self.path / "profile.json"

    @property
    def plan(self) -> Path:
        """Plan."""
        return self.path / "plan.json"

    @property
    def decoupling(self) -> Path:
        """Decoupling, of runs by ``decouple``; their sub-models are runs in ``sub-0``, ``sub-1``, ..."""
        return self.path / "decoupling.json"

    @property
    def program(self) -> Path:
        """Program, as text."""
        return self.path / "program.txt"

    @property
    def timelines(self) -> Path:
        """Folder of timelines."""
        return self.path / "timelines"

    @property
    def simulated(self) -> Path:
        """Simulated Timeline."""
        return self.timelines / "simulated.json"

    @property
    def measured(self) -> Path:
        """Measured Timeline."""
        return self.timelines / "measured.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: ``{"event": "step" | "epoch", ...}``."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """What ``spanwise train --json`` prints."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints, ``step-00000050`` and so on."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """Final weights under the model's own names."""
        return self.path / "weights.safetensors"

    @property
    def report(self) -> Path:
        """Self-contained HTML report."""
        return self.path / "report.html"

    @property
    def trace(self) -> Path:
        """Chrome trace."""
        return self.path / "trace.json"

    @property
    def env(self) -> Path:
        """Versions, cores, memory, command."""
        return self.path / "env.json"

    def append_metric(self, metric: dict[str, Any]) -> None:
        """Adds a line to ``metrics.jsonl``."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metric) + "\n")
        except OSError as error:
            raise ResourceError(f"{self.metrics}: cannot be written ({error.strerror})") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line of ``metrics.jsonl``."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def write_json(self, path: Path, data: dict[str, Any]) -> None:
        """Writes one JSON file of the run whole."""
        write_whole(path, json.dumps(data, indent=1) + "\n")
