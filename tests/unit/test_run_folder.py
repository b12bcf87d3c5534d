from __future__ import annotations

from pathlib import Path

import pytest

from spanwise.core.errors import InputError, ResourceError
from spanwise.core.run_folder import RunFolder


def test_a_new_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "deep" / "run")
    assert folder.timelines.is_dir()
    assert folder.checkpoints.is_dir()
    assert sorted(p.name for p in folder.path.iterdir()) == ["checkpoints", "timelines"]
    assert RunFolder.create(folder.path) == folder  # again is no error


@pytest.mark.parametrize("inside", ["run", "run/timelines", "run/.writable"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, inside: str) -> None:
    """Root may write anywhere, so something else stands in the way."""
    if inside == "run/.writable":
        (tmp_path / inside).mkdir(parents=True)
    else:
        (tmp_path / inside).parent.mkdir(exist_ok=True)
        (tmp_path / inside).write_text("")
    with pytest.raises(ResourceError, match=r"run: cannot be written \(.+\); choose another with --run"):
        RunFolder.create(tmp_path / "run")


def test_opening_needs_a_job(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no run \(no job\.json\)"):
        RunFolder.open(tmp_path)
    folder = RunFolder.create(tmp_path)
    folder.write_json(folder.job, {"a": 1})
    assert RunFolder.open(tmp_path) == folder
    assert folder.job.read_text() == '{\n "a": 1\n}\n'


def test_every_file_has_its_own_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = [n for n, v in vars(RunFolder).items() if isinstance(v, property)]
    paths = [getattr(folder, name) for name in names]
    assert len(set(paths)) == len(names) == 18
    assert all(path.is_relative_to(tmp_path) for path in paths)


def test_metrics_are_whole_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_metrics() == []
    metrics = [{"event": "step", "loss": 0.5}, {"event": "epoch"}]
    for metric in metrics:
        folder.append_metric(metric)
    assert folder.read_metrics() == metrics
    with folder.metrics.open("a") as file:
        file.write('{"event": "st')  # the run died here
    assert folder.read_metrics() == metrics


def test_metrics_that_cannot_be_written(tmp_path: Path) -> None:
    RunFolder(tmp_path).metrics.mkdir()
    with pytest.raises(ResourceError, match=r"metrics\.jsonl: cannot be written"):
        RunFolder(tmp_path).append_metric({})


def test_a_failed_write_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path)
    folder.write_json(folder.summary, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ResourceError, match=r"summary\.json: cannot be written \(No space left on device\)"):
        folder.write_json(folder.summary, {"a": 2})
    assert folder.summary.read_text() == '{\n "a": 1\n}\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "summary.json", "timelines"]
