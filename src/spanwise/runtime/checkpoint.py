"""Checkpoints: safetensors and a manifest with hashes, written aside and renamed when whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
from torch import Tensor

from spanwise.core.errors import CheckpointError, ResourceError
from spanwise.runtime.device_run import Snapshot

_FORMAT = 1
_MODEL, _OPTIMIZER, _MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
_FIELDS = {"step": int, "model_digest": str, "sha256": dict, "options": dict, "scheduler": dict}
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A Snapshot and where in the run it was taken: ``step`` optimizer steps are done."""

    step: int
    model_digest: str
    snapshot: Snapshot


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Writes ``folder/step-N`` whole or not at all and removes all but the ``keep`` newest."""
    target = folder / f"step-{checkpoint.step:08d}"
    snapshot = checkpoint.snapshot
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
        try:
            model = {f"parameter/{k}": v for k, v in snapshot.parameters.items()}
            model |= {f"buffer/{k}": v for k, v in snapshot.buffers.items()}
            hashes = {
                _MODEL: _write(aside / _MODEL, _apart(model)),
                _OPTIMIZER: _write(aside / _OPTIMIZER, _apart(snapshot.optimizer)),
            }
            manifest = {
                "format": _FORMAT,
                "step": checkpoint.step,
                "model_digest": checkpoint.model_digest,
                "sha256": hashes,
                "options": snapshot.options,
                "scheduler": snapshot.scheduler,
            }
            _write(aside / _MANIFEST, json.dumps(manifest, indent=1).encode())
            _put(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        for old in _steps(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ResourceError(
            f"checkpoint {target}: cannot be written ({error.strerror}); free space or choose "
            "another run folder"
        ) from None
    return target


def _put(aside: Path, target: Path) -> None:
    """Renames ``aside`` to ``target``; one that is there already goes only when the new one is in place."""
    if not target.exists():
        os.rename(aside, target)
        return
    old = aside.with_name(f"{aside.name}-old")
    os.rename(target, old)
    try:
        os.rename(aside, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, model_digest: str) -> Checkpoint:
    """The newest checkpoint of a run.

    Raises:
        CheckpointError: there is none, a file's hash differs, or it is of another model.
    """
    found = _steps(folder)
    if not found:
        raise CheckpointError(f"{folder}: holds no checkpoint; the run may have ended before the first one")
    path = found[-1]
    manifest = _manifest(path)
    for name, expected in manifest["sha256"].items():
        try:
            actual = hashlib.sha256((path / name).read_bytes()).hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read ({error.strerror})") from None
        if actual != expected:
            older = (
                f"; an older one is {found[-2].name}, remove {path.name} to use it" if len(found) > 1 else ""
            )
            raise CheckpointError(
                f"{path / name}: is corrupt (SHA-256 {actual[:12]}.., the manifest says "
                f"{expected[:12]}..){older}"
            )
    if manifest["model_digest"] != model_digest:
        raise CheckpointError(
            f"{path}: belongs to model {manifest['model_digest']}, this job's model is {model_digest}; "
            "resume with the job it was made by"
        )
    model = _read(path / _MODEL)
    snapshot = Snapshot(
        {k.partition("/")[2]: v for k, v in model.items() if k.startswith("parameter/")},
        {k.partition("/")[2]: v for k, v in model.items() if k.startswith("buffer/")},
        _read(path / _OPTIMIZER),
        manifest["options"],
        manifest["scheduler"],
    )
    return Checkpoint(int(manifest["step"]), str(manifest["model_digest"]), snapshot)


def save_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes weights under the model's own names, whole or not at all."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        _write(aside, _apart(tensors))
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ResourceError(f"{path}: cannot be written ({error.strerror})") from None


def _manifest(path: Path) -> dict[str, Any]:
    try:
        data = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{path / _MANIFEST}: is missing or not JSON; remove {path.name}") from None
    manifest = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    right = manifest.get("format") == _FORMAT and all(
        isinstance(manifest.get(name), kind) for name, kind in _FIELDS.items()
    )
    if not right or manifest["sha256"].keys() != {_MODEL, _OPTIMIZER}:
        raise CheckpointError(f"{path / _MANIFEST}: is not of format {_FORMAT}; remove {path.name}")
    return manifest


def _steps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def _apart(tensors: dict[str, Tensor]) -> bytes:
    """Serialised; tensors that share memory are written apart, as the format wants."""
    return safetensors.torch.save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})


def _read(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)  # pyright: ignore[reportUnknownMemberType]


def _write(path: Path, data: bytes) -> str:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()
