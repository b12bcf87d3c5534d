"""spanwise trains one PyTorch model across whatever devices you have.

It measures devices and links, plans the split, predicts the step time and runs exactly that plan::

    nn.Module ─profiler─▶ ModelGraph, Profile ┐
    cluster.toml ───────▶ Cluster ────────────┼─planner─▶ Plan ─lowering─▶ Program ─┬─simulator─▶ Timeline
    job.toml ───────────▶ Job ────────────────┘                                     └─runtime───▶ Timeline

Importing this package imports neither torch nor any of its own parts; names load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spanwise.api import (
        Trainer,
        decouple,
        load_cluster,
        load_job,
        plan,
        profile,
        replan,
        report,
        simulate,
        train,
    )
    from spanwise.core.cluster import Cluster, Device, Link
    from spanwise.core.decoupling import Decoupling
    from spanwise.core.defaults import default_cluster
    from spanwise.core.errors import SpanwiseError
    from spanwise.core.job import Job
    from spanwise.core.model import ModelGraph
    from spanwise.core.plan import Plan
    from spanwise.core.profile import Profile
    from spanwise.core.timeline import Timeline

_HOMES = {
    "Trainer": "api", "decouple": "api", "load_cluster": "api", "load_job": "api", "plan": "api",
    "profile": "api", "replan": "api", "report": "api", "simulate": "api", "train": "api",
    "Cluster": "core.cluster", "Device": "core.cluster", "Link": "core.cluster",
    "Decoupling": "core.decoupling", "default_cluster": "core.defaults", "SpanwiseError": "core.errors",
    "Job": "core.job",
    "ModelGraph": "core.model", "Plan": "core.plan", "Profile": "core.profile", "Timeline": "core.timeline",
}  # fmt: skip

__all__ = [
    "Cluster",
    "Decoupling",
    "Device",
    "Job",
    "Link",
    "ModelGraph",
    "Plan",
    "Profile",
    "SpanwiseError",
    "Timeline",
    "Trainer",
    "__version__",
    "decouple",
    "default_cluster",
    "load_cluster",
    "load_job",
    "plan",
    "profile",
    "replan",
    "report",
    "simulate",
    "train",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'spanwise' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"spanwise.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
