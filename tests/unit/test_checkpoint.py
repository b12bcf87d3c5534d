from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from spanwise.core.errors import CheckpointError, ResourceError
from spanwise.runtime.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, save_weights
from spanwise.runtime.device_run import Snapshot


def checkpoint(step: int, digest: str = "0123") -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    shared = torch.randn(2, 3, generator=generator)
    return Checkpoint(
        step,
        digest,
        Snapshot(
            parameters={"a.weight": shared, "b.weight": shared, "c": torch.randn(4, 6).t()},
            buffers={"bn.running_mean": torch.randn(3), "bn.num_batches_tracked": torch.tensor(step)},
            optimizer={"a.weight::momentum_buffer": torch.randn(2, 3), "a.weight::step": torch.tensor(3.0)},
            options={"lr": 0.1, "betas": [0.9, 0.99], "nesterov": False},
            scheduler={"last_epoch": step, "_last_lr": [0.1]},
        ),
    )


def assert_equal(found: Checkpoint, expected: Checkpoint) -> None:
    assert (found.step, found.model_digest) == (expected.step, expected.model_digest)
    for part in ("parameters", "buffers", "optimizer"):
        a, b = getattr(found.snapshot, part), getattr(expected.snapshot, part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    assert found.snapshot.options == expected.snapshot.options
    assert found.snapshot.scheduler == expected.snapshot.scheduler


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    expected = checkpoint(7)
    path = save_checkpoint(tmp_path / "checkpoints", expected)
    assert path.name == "step-00000007"
    assert names(path) == ["manifest.json", "model.safetensors", "optimizer.safetensors"]
    assert_equal(load_checkpoint(tmp_path / "checkpoints", "0123"), expected)


def test_an_empty_snapshot(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(0, "0123", Snapshot()))
    assert_equal(load_checkpoint(tmp_path, "0123"), Checkpoint(0, "0123", Snapshot()))


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 9, 15):
        save_checkpoint(tmp_path, checkpoint(step))
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    assert load_checkpoint(tmp_path, "0123").step == 15
    save_checkpoint(tmp_path, checkpoint(20), keep=1)
    assert names(tmp_path) == ["step-00000020"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(5))
    again = Checkpoint(5, "0123", checkpoint(6).snapshot)
    save_checkpoint(tmp_path, again)
    assert_equal(load_checkpoint(tmp_path, "0123"), again)
    assert names(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize("step", [10, 20])
@pytest.mark.parametrize("call", ["os.rename", "os.fsync"])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, step: int
) -> None:
    """Whether it is a new step or one that is saved again."""
    before = checkpoint(10)
    save_checkpoint(tmp_path, before)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        with pytest.raises(ResourceError, match=r"cannot be written \(No space left on device\)"):
            save_checkpoint(tmp_path, Checkpoint(step, "0123", checkpoint(99).snapshot))
    assert names(tmp_path) == ["step-00000010"]
    assert_equal(load_checkpoint(tmp_path, "0123"), before)


def test_a_step_that_is_saved_again_survives_a_failure_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint(10)
    save_checkpoint(tmp_path, before)
    rename, calls = os.rename, list[str]()

    def fail_second(source: Path, target: Path) -> None:
        calls.append(target.name)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("os.rename", fail_second)
    with pytest.raises(ResourceError, match="Input/output error"):
        save_checkpoint(tmp_path, Checkpoint(10, "0123", checkpoint(99).snapshot))
    assert len(calls) == 3
    assert names(tmp_path) == ["step-00000010"]
    assert_equal(load_checkpoint(tmp_path, "0123"), before)


def test_an_interrupt_from_the_keyboard_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, checkpoint(1))
    assert names(tmp_path) == []


def test_half_a_checkpoint_of_a_killed_run_is_ignored(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(3))
    (tmp_path / ".writing-xyz").mkdir()
    (tmp_path / "step-00000009").write_text("not a folder")
    assert load_checkpoint(tmp_path, "0123").step == 3


def test_there_is_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            load_checkpoint(folder, "0123")


def test_of_another_model(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(3, "4567"))
    with pytest.raises(CheckpointError, match="belongs to model 4567, this job's model is 0123"):
        load_checkpoint(tmp_path, "0123")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_one_flipped_bit_is_seen(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    path = save_checkpoint(tmp_path, checkpoint(2))
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name}: is corrupt \(SHA-256 .*older one is step-00000001"):
        load_checkpoint(tmp_path, "0123")


def test_a_missing_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(2))
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: cannot be read \(No such file"):
        load_checkpoint(tmp_path, "0123")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"format": 1}', None])
def test_a_manifest_that_is_none(tmp_path: Path, text: str | None) -> None:
    manifest = save_checkpoint(tmp_path, checkpoint(2)) / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    with pytest.raises(
        CheckpointError, match=r"manifest.json: is (missing or not JSON|not of format 1); remove"
    ):
        load_checkpoint(tmp_path, "0123")


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"step": None}, {"step": "x"}, {"sha256": []}, {"sha256": {}}, {"options": 3},
     {"scheduler": None}, {"sha256": {"../../other": "0"}}],
)  # fmt: skip
def test_a_manifest_of_another_format(tmp_path: Path, change: dict[str, Any]) -> None:
    manifest = save_checkpoint(tmp_path, checkpoint(2)) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(CheckpointError, match="is not of format 1; remove step-00000002"):
        load_checkpoint(tmp_path, "0123")


def test_weights_under_the_names_of_the_model(tmp_path: Path) -> None:
    tensors = checkpoint(1).snapshot.parameters
    save_weights(tmp_path / "weights.safetensors", tensors)
    found = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in found)


def test_weights_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").mkdir()
    (tmp_path / "weights.safetensors" / "x").write_text("")
    with pytest.raises(ResourceError, match=r"weights\.safetensors: cannot be written"):
        save_weights(tmp_path / "weights.safetensors", {"a": torch.ones(1)})
    assert names(tmp_path) == ["weights.safetensors"]
