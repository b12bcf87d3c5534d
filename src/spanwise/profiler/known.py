"""Profiles by what a job says, without torch: planning a known job need not import or trace anything.

An entry is keyed by the job's model, loss and data, by the source text of the modules that they name, by the
machine and by the versions. When any of these changes the job is traced and measured again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

from pydantic import Field

from spanwise.core.errors import InputError
from spanwise.core.job import LIVE, Job
from spanwise.core.model import ModelGraph
from spanwise.core.noun import Noun
from spanwise.core.profile import TimeTable

FORMAT = 3  # of what is cached: 2 has the halves of backwards, 3 sums of gradients
_SOURCE_FILES = 500  # of one package; beyond that its text does not go into the key


class Known(Noun):
    """What tracing and measuring a job gave: the graph, and one table per thread count."""

    graph: ModelGraph
    tables: dict[int, TimeTable] = Field(default_factory=dict[int, TimeTable])


def job_key(job: Job) -> str | None:
    """Key of a job on this machine; None when it holds live objects, which have no name."""
    named = (job.model.name, job.data.name, job.loss)
    if LIVE in named:
        return None
    parts = {
        "format": FORMAT,
        "model": job.model.to_data(),
        "data": job.data.to_data(),
        "loss": job.loss,
        "dtype": job.dtype,
        "rows": profile_rows(job.batch),
        "sources": [_source_digest(name.partition(":")[0]) for name in named if ":" in name],
        "machine": [platform.machine(), cpu_name(), platform.python_version()],
        "versions": [_version("spanwise"), _version("torch")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def find(folder: Path, job: Job) -> Known | None:
    """The entry of a job; None if there is none or it cannot be read."""
    key = job_key(job)
    path = folder / f"known-{key}.json"
    if key is None or not path.is_file():
        return None
    try:
        return Known.load(path)
    except InputError:
        return None  # written by another version or damaged: measured again


def keep(folder: Path, job: Job, known: Known) -> None:
    """Stores an entry; live jobs are not stored."""
    key = job_key(job)
    if key is not None:
        known.save(folder / f"known-{key}.json")


def profile_rows(batch: int) -> tuple[int, ...]:
    """Row counts to measure for a global batch: powers of two up to 64 or the batch."""
    return tuple(r for r in (1, 2, 4, 8, 16, 32, 64) if r <= max(batch, 2))


def cpu_name() -> str:
    """Model name of this machine's processor, as far as it is known."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _source_digest(module: str) -> str:
    """SHA-256 of the Python source of the package that a module lies in; of large ones, of the module only.

    Looks at files and imports nothing: finding a submodule by the import system would run its parents.
    """
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return "unknown"
    if spec is None or spec.origin is None:
        return "unknown"
    origin = Path(spec.origin)
    files = [origin]
    if origin.name == "__init__.py":
        files = sorted(islice(origin.parent.rglob("*.py"), _SOURCE_FILES + 1))
        if len(files) > _SOURCE_FILES:
            place = origin.parent.joinpath(*rest)
            files = [f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()]
    digest = hashlib.sha256(_version(top).encode())
    for file in files:
        digest.update(os.fsencode(file.name))
        digest.update(file.read_bytes())
    return digest.hexdigest()
