"""What a run folder holds, read once; whatever is not there yet is None or empty."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from spanwise.core.cluster import Cluster
from spanwise.core.errors import InputError
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.noun import Noun
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.core.run_folder import RunFolder
from spanwise.core.timeline import Timeline
from spanwise.reporting.transfers import name_transfers

N = TypeVar("N", bound=Noun)


@dataclass(frozen=True, slots=True)
class StepMetric:
    """One optimizer step."""

    step: int
    loss: float | None
    step_time_s: float | None


@dataclass(frozen=True, slots=True)
class EpochMetric:
    """One evaluation, after optimizer step ``step``."""

    epoch: int
    step: int
    accuracy: float | None
    test_loss: float | None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything that a report can show."""

    job: Job
    cluster: Cluster | None = None
    graph: ModelGraph | None = None
    plan: Plan | None = None
    profile: Profile | None = None
    simulated: Timeline | None = None
    measured: Timeline | None = None
    steps: tuple[StepMetric, ...] = ()
    epochs: tuple[EpochMetric, ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def read(cls, folder: RunFolder) -> RunRecord:
        """Reads a run folder; ``InputError`` for a file that is there but broken, or does not belong."""
        graph, plan = _noun(ModelGraph, folder.graph), _noun(Plan, folder.plan)
        if graph is not None and plan is not None and plan.stages[-1].stop != len(graph):
            raise InputError(
                f"{folder.plan}: covers {plan.stages[-1].stop} layers, but {folder.graph.name} has "
                f"{len(graph)}; plan and graph must come from the same run"
            )
        measured = _noun(Timeline, folder.measured)
        if measured is not None and plan is not None and graph is not None:
            measured = name_transfers(measured, plan, graph)
        steps, epochs = _metrics(folder)
        return cls(
            job=Job.load(folder.job),
            cluster=_noun(Cluster, folder.cluster),
            graph=graph,
            plan=plan,
            profile=_noun(Profile, folder.profile),
            simulated=_noun(Timeline, folder.simulated),
            measured=measured,
            steps=steps,
            epochs=epochs,
            summary=_object(folder.summary),
            environment=_object(folder.env),
        )

    @property
    def timelines(self) -> tuple[Timeline, ...]:
        """Those that exist, simulated first."""
        return tuple(t for t in (self.simulated, self.measured) if t is not None)

    @property
    def devices(self) -> tuple[str, ...]:
        """Device ids: in the order of the plan's stages, then the rest of the cluster."""
        planned = self.plan.devices if self.plan is not None else ()
        used = [use.device for timeline in self.timelines for use in timeline.devices]
        known = self.cluster.ids if self.cluster is not None else ()
        return tuple(dict.fromkeys((*planned, *used, *known)))


def as_number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _noun(noun: type[N], path: Path) -> N | None:
    return noun.load(path) if path.is_file() else None


def _object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path}: is not a JSON file; remove it to report without it") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: must hold a JSON object; remove it to report without it")
    return cast("dict[str, Any]", data)


def _metrics(folder: RunFolder) -> tuple[tuple[StepMetric, ...], tuple[EpochMetric, ...]]:
    try:
        lines = folder.read_metrics()
    except (OSError, ValueError):
        raise InputError(
            f"{folder.metrics}: has a line that is not JSON; remove that line to report without it"
        ) from None
    steps = [
        StepMetric(int(at), as_number(m.get("loss")), as_number(m.get("step_time_s")))
        for m in lines
        if m.get("event") == "step" and (at := as_number(m.get("step"))) is not None
    ]
    epochs = [
        EpochMetric(int(e), int(at), as_number(m.get("accuracy")), as_number(m.get("test_loss")))
        for m in lines
        if m.get("event") == "epoch"
        and (e := as_number(m.get("epoch"))) is not None
        and (at := as_number(m.get("step"))) is not None
    ]
    # A resumed run writes the steps after its checkpoint again: the later line counts.
    return (
        tuple(sorted({s.step: s for s in steps}.values(), key=lambda s: s.step)),
        tuple(sorted({e.step: e for e in epochs}.values(), key=lambda e: e.step)),
    )
