"""A worker killed in the middle of a step: exit code, message, whole checkpoint, resume, no orphans."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from spanwise.cli import main

JOB = """\
batch = 12
steps = 1000000
checkpoint_every = 20
model = { name = "spanwise.zoo:mlp", sizes = [8, 16, 16, 4] }
data = { name = "spanwise.zoo.data:synthetic_vectors", rows = 96, features = 8, classes = 4 }
"""
CLUSTER = """\
name = "two"
data = ["a"]
[emulation]
core_share = 0.4
[[devices]]
id = "a"
site = "lab"
[[devices]]
id = "b"
site = "lab"
[[links]]
between = ["lab", "lab"]
bandwidth = "1 Gbit/s"
"""


def wait_until(ready: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def train(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "spanwise", "train", str(tmp_path / "job.toml"), "-c",
            str(tmp_path / "cluster.toml"), "--strategy", "pipeline", "--run", str(tmp_path / "run"),
            "--cache", str(tmp_path / "cache"), "--json",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


@pytest.mark.timeout(180)
def test_killed_mid_step(
    train: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_until(lambda: checkpoints.is_dir() and any(checkpoints.glob("step-*")))
    workers = {
        child.cmdline()[-1]: child
        for child in psutil.Process(train.pid).children()
        if "worker" in child.cmdline()
    }
    assert set(workers) == {"a", "b"}
    workers["b"].kill()
    began = time.monotonic()
    _, err = train.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert train.returncode == 6
    last = err.strip().splitlines()[-1]
    assert last.startswith("spanwise: ")
    assert "'b'" in last or "b" in last.split(":")[1]
    assert not workers["a"].is_running()
    assert "Traceback" not in err

    job = (tmp_path / "job.toml").read_text()
    newest = int(sorted(checkpoints.glob("step-*"))[-1].name.removeprefix("step-"))
    (tmp_path / "job.toml").write_text(job.replace("1000000", str(newest + 3)))
    argv = [
        "spanwise", "train", str(tmp_path / "job.toml"), "-c", str(tmp_path / "cluster.toml"), "--strategy",
        "single", "--run", str(tmp_path / "rest"), "--resume", str(tmp_path / "run"), "--cache",
        str(tmp_path / "cache"), "--json",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    main()  # it exits only if it fails
    assert json.loads(capsys.readouterr().out)["steps"] == 3
