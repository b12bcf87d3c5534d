"""``--set key=value`` on a job file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from spanwise.core.errors import InputError
from spanwise.core.job import Job
from spanwise.core.noun import parse_toml


def apply(path: Path, overrides: tuple[str, ...]) -> Job:
    """The job of a file with some keys replaced. Values are TOML; a bare word is a string."""
    job = Job.load(path)
    if not overrides:
        return job
    data = job.to_data()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(
                f"--set '{text}': write it as key=value, like batch=64 or optimizer.args.lr=0.01"
            )
        target: dict[str, Any] = data
        *parents, last = key.strip().split(".")
        for parent in parents:
            inner = target.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise InputError(f"--set '{text}': '{parent}' is a value, it holds no '{last}'")
            target = cast("dict[str, Any]", inner)
        target[last] = _value(value)
    return Job.parse(data, f"{path} with {', '.join(overrides)}")


def _value(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}", "--set")["value"]
    except InputError:
        return text
