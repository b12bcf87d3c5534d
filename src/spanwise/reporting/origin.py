"""How a run was made: job, plan in words, versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from spanwise.core.job import Job, Recipe
from spanwise.core.units import format_bytes, format_seconds
from spanwise.reporting.markup import Markup, el, join
from spanwise.reporting.record import RunRecord, as_number
from spanwise.reporting.text import describe_plan

_LONGEST = 400


def how_it_was_made(record: RunRecord) -> Markup:
    """The last section of the page."""
    plan = (
        el("pre", describe_plan(record.plan, record.graph))
        if record.plan is not None and record.graph is not None
        else None
    )
    env = (
        el("dl", *_pairs(_flat(record.environment)))
        if record.environment
        else el("p", "This run has no env.json, so versions are not known.", class_="missing")
    )
    job = (el("h3", "Job"), el("dl", *_pairs(_job(record.job))))
    return el(
        "section",
        el("h2", "How it was made"),
        el("div", el("div", *job), el("div", el("h3", "Machine and versions"), env), class_="pair"),
        join(el("h3", "Plan"), plan) if plan is not None else None,
    )


def _job(job: Job) -> list[tuple[str, str]]:
    labels = "labels may leave" if job.share_labels else "labels stay too"
    return [
        ("model", _recipe(job.model)),
        ("data", _recipe(job.data)),
        ("loss", job.loss),
        ("batch", f"{job.batch} rows"),
        ("optimizer", _recipe(job.optimizer)),
        (
            "scheduler",
            "none" if job.scheduler is None else f"{_recipe(job.scheduler)} every {job.scheduler_every}",
        ),
        ("gradient clipping", "none" if job.clip_norm is None else f"global norm {job.clip_norm:g}"),
        ("length", _length(job)),
        ("seed, dtype", f"{job.seed}, {job.dtype}"),
        ("privacy", f"raw samples stay where they are, {labels}" if job.private else "samples may travel"),
    ]


def _length(job: Job) -> str:
    limits = [(job.epochs, "epoch"), (job.steps, "step")]
    words = [f"{count} {unit}{'s' if count > 1 else ''}" for count, unit in limits if count is not None]
    return " or ".join(words) + ", what ends first" if len(words) > 1 else words[0] if words else "1 epoch"


def _recipe(recipe: Recipe) -> str:
    return (
        f"{recipe.name}({', '.join(f'{k}={v}' for k, v in recipe.args.items())})"
        if recipe.args
        else recipe.name
    )


def _flat(data: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as 'outer inner' rows; those under ``versions`` speak for themselves."""
    out: list[tuple[str, str]] = []
    for key, value in data.items():
        name = f"{prefix} {key}".strip()
        if isinstance(value, Mapping):
            out += _flat(cast("Mapping[str, object]", value), "" if key == "versions" else name)
        else:
            words = _words(key, value)
            label = name.removesuffix("_bytes").removesuffix("_s").replace("_", " ")
            out.append((label, words if len(words) <= _LONGEST else words[:_LONGEST] + "…"))
    return out


def _words(key: str, value: object) -> str:
    size = as_number(value)
    if size is not None and key.endswith("_bytes"):
        return format_bytes(size)
    if size is not None and key.endswith("_s"):
        return format_seconds(size)
    if isinstance(value, list):
        return " ".join(x if isinstance(x, str) else json.dumps(x) for x in cast("list[object]", value))
    return value if isinstance(value, str) else json.dumps(value)


def _pairs(rows: list[tuple[str, str]]) -> list[Markup]:
    return [join(el("dt", name), el("dd", value)) for name, value in rows]
