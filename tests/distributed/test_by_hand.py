"""Three workers started separately, as on three machines: token from a file, one endpoint, no spawning."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

JOB = """\
batch = 12
steps = 4
model = { name = "spanwise.zoo:mlp", sizes = [8, 16, 16, 4] }
data = { name = "spanwise.zoo.data:synthetic_vectors", rows = 96, features = 8, classes = 4 }
"""
CLUSTER = """\
name = "three"
data = ["camera"]
[[devices]]
id = "server"
address = "127.0.0.1"
site = "lab"
[[devices]]
id = "box"
address = "127.0.0.1"
site = "lab"
[[devices]]
id = "camera"
address = "127.0.0.1"
site = "lab"
[[links]]
between = ["lab", "lab"]
bandwidth = "1 Gbit/s"
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spanwise(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "spanwise", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(180)
def test_three_workers_started_separately(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    (tmp_path / "token").write_text("a shared secret\n")
    endpoint, token = f"127.0.0.1:{free_port()}", str(tmp_path / "token")
    train = spanwise(
        "train", str(tmp_path / "job.toml"), "--cluster", str(tmp_path / "cluster.toml"), "--strategy",
        "data_parallel", "--listen", endpoint, "--token-file", token, "--run", str(tmp_path / "run"),
        "--cache", str(tmp_path / "cache"), "--json",
    )  # fmt: skip
    workers = [
        spanwise("worker", "--join", endpoint, "--device", device, "--token-file", token)
        for device in ("server", "box", "camera")
    ]
    out, err = train.communicate(timeout=150)
    assert train.returncode == 0, err
    summary = json.loads(out)
    assert summary["steps"] == 4
    assert set(summary["devices_used"]) == {"server", "box", "camera"}
    for worker in workers:
        _, complaint = worker.communicate(timeout=30)
        assert worker.returncode == 0, complaint
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert len(profile["tables"]) == 3
    assert len(profile["links"]) == 6
