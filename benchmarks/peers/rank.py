"""One device of the peers: obeys JSON commands on standard input, one a line, with one JSON line each.

``{"do": "hello", "models": [...], "peers": [...]}`` imports what they need and answers with versions.
``{"do": "run", ...}`` (fields: :class:`engines.Run`) joins the process group, warms up, times the steps, and
leaves the group, so that the next run may have other ranks. An exception is answered as ``{"error": ...}``;
the process stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from engines import PEERS, Engine, Run, engine
from models import RECIPES, make

from spanwise.ops.allocator import keep_freed_memory

# What the engines would import at their first use, on a slow device for seconds.
_IMPORTS = {
    "ddp": ("torch._dynamo",),
    "cloud_only": ("torch._dynamo",),
    "fsdp2": ("torch.distributed.fsdp", "torch._dynamo"),
    "gpipe": ("torch.distributed.pipelining",),
    "1f1b": ("torch.distributed.pipelining",),
}
_FIELDS = {f.name for f in dataclasses.fields(Run)}


def main() -> None:
    answers = _private_stdout()
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    # spanwise's workers keep freed memory, which makes a step up to 30 % shorter. So do the peers: all
    # systems have the same allocator.
    keep_freed_memory()
    # torch 2.13 warns about its own use of names that it deprecated.
    warnings.simplefilter("ignore", FutureWarning)
    for line in sys.stdin:
        try:
            answer = obey(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _private_stdout() -> TextIO:
    """The real standard output; whatever libraries print goes to standard error, not between answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def obey(command: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one command."""
    if command.get("do") == "hello":
        return hello(command.get("models", ()), command.get("peers", PEERS))
    if command.get("do") == "run":
        fields = {key: value for key, value in command.items() if key in _FIELDS}
        for key in ("ranks", "data_devices"):
            fields[key] = tuple(fields.get(key, ()))
        return run(Run(**fields), save=command.get("save"))
    raise ValueError(f"unknown command {command.get('do')!r}; known: 'hello', 'run'")


def hello(models: Sequence[str], peers: Sequence[str]) -> dict[str, Any]:
    """Imports what ``peers`` need and builds ``models`` once, so that no run pays for it."""
    for name in sorted({module for peer in peers for module in _IMPORTS.get(peer, ())}):
        importlib.import_module(name)
    for name in models:
        make(name)
    gc.collect()
    return {"ready": True, "python": sys.version.split()[0], "torch": torch.__version__, "models": [*RECIPES]}


def run(run: Run, save: str | None = None) -> dict[str, Any]:
    """Joins, trains, leaves; frees what it used whatever happened."""
    os.environ["GLOO_SOCKET_IFNAME"] = run.interface
    _reset_peak()
    try:
        if run.peer != "single":
            dist.init_process_group(
                "gloo",
                init_method=f"tcp://{run.address}:{run.port}",
                rank=run.rank,
                world_size=run.world,
                timeout=timedelta(seconds=run.timeout_s),
            )
        return _train(run, save)
    finally:
        # A device mesh keeps groups of its own; without argument all of them go.
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
        with contextlib.suppress(AttributeError):  # not in every C library
            ctypes.CDLL(None).malloc_trim(0)


def _train(run: Run, save: str | None) -> dict[str, Any]:
    began = time.perf_counter()
    made = engine(run)
    grouped = dist.is_initialized()
    if grouped:
        dist.barrier()
    setup_s = time.perf_counter() - began
    for k in range(run.warmup):
        made.step(k)
    if grouped and not made.continuous:
        dist.barrier()
    result = {**_timed(run, made), "peak_bytes": _peak_bytes()}
    # Only where it is asked for: FSDP2 gathers all parameters for it, which costs memory and traffic.
    if save is not None:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in made.state().items()}, Path(save))
    if grouped:
        dist.barrier()  # nobody leaves while others still need its connection
    return {
        "device": run.me, "rank": run.rank, "rows": made.rows, "setup_s": setup_s, **result,
        "parameters_bytes": made.parameters_bytes(), "facts": made.facts,
    }  # fmt: skip


def _timed(run: Run, made: Engine) -> dict[str, Any]:
    step_s: list[float] = []
    loss: float | None = None
    sent, cpu, start = _sent_bytes(run.interface), time.process_time(), time.perf_counter()
    before = start
    for k in range(run.warmup, run.warmup + run.steps):
        loss = made.step(k)
        now = time.perf_counter()
        step_s.append(now - before)
        before = now
    return {
        "step_s": step_s, "elapsed_s": before - start, "loss": loss, "cpu_s": time.process_time() - cpu,
        "sent_bytes": _sent_bytes(run.interface) - sent,
    }  # fmt: skip


def _sent_bytes(interface: str) -> int:
    """Bytes that this network namespace has sent on the interface, headers included; 0 if there is none."""
    try:
        lines = Path("/proc/self/net/dev").read_text().splitlines()
    except OSError:
        return 0
    return next(
        (int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith(interface + ":")), 0
    )


def _reset_peak() -> None:
    """Starts the kernel's count of peak resident memory again; where it may not, the peak is of all runs."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("peak memory cannot be reset; it is of all runs so far", file=sys.stderr)


def _peak_bytes() -> int:
    """Peak resident memory since the reset."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
