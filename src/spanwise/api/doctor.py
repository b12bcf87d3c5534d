"""What this machine is and can do."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import spanwise
from spanwise.lab import reason_against

_LIBRARIES = ("torch", "numpy", "pydantic", "safetensors", "typer", "rich", "scikit-learn", "transformers")


def examine() -> dict[str, Any]:
    """Versions, cores, memory and its limits, accelerators, ways to emulate a cluster."""
    memory = psutil.virtual_memory()
    return {
        "spanwise": spanwise.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory.total,
        "available_memory_bytes": memory.available,
        "memory_limit_bytes": _memory_limit(),
        "accelerators": _accelerators(),
        "emulation": {
            "portable": "yes: compute is slowed and messages are paced, no root needed",
            "lab": f"no: {reason}" if (reason := reason_against()) else "yes, see docs/lab.md",
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def _accelerators() -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
