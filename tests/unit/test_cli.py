"""The command line: what it prints, and one line with a documented exit code for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spanwise.cli import main
from spanwise.planner import BASELINES

JOB = """\
batch = 16
steps = 2
model = { name = "spanwise.zoo:mlp", sizes = [8, 16, 4] }
data = { name = "spanwise.zoo.data:synthetic_vectors", rows = 64, features = 8, classes = 4 }
"""
CLUSTER = """\
name = "two"
data = ["a"]
[emulation]
core_share = 0.5
[[devices]]
id = "a"
site = "lab"
memory = "1 GiB"
[[devices]]
id = "b"
site = "lab"
speed = 0.5
[[links]]
between = ["lab", "lab"]
bandwidth = "100 Mbit/s"
latency = "1 ms"
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    return str(tmp_path / "job.toml"), str(tmp_path / "cluster.toml"), str(tmp_path / "cache")


def call(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """Exit code of ``spanwise ARGS``."""
    monkeypatch.setattr(sys, "argv", ["spanwise", *args])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_version_and_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
    assert call(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("doctor", "profile", "plan", "simulate", "train", "worker", "report"))


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cores"] >= 1
    assert found["libraries"]["torch"].startswith("2.")
    assert call(monkeypatch, "doctor") == 0
    assert "cores" in capsys.readouterr().out


def test_profile_plan_simulate(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: tuple[str, str, str],
    tmp_path: Path,
) -> None:
    job, cluster, cache = files
    common = (job, "--cluster", cluster, "--cache", cache)
    assert call(monkeypatch, "profile", *common, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["profile"]["devices"]) == 2
    out = str(tmp_path / "planned")
    assert call(monkeypatch, "plan", *common, "--json", "--out", out) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["step_time_s"] > 0
    assert answer["advice"]
    assert {"single", "hpp"} <= answer["strategies"].keys()
    assert call(monkeypatch, "plan", *common) == 0
    assert "gain: over the best single device" in capsys.readouterr().out
    assert call(monkeypatch, "simulate", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["step_time_s"] == pytest.approx(answer["step_time_s"])
    assert call(monkeypatch, "simulate", out, "--fault", "slow:a*3@0", "--json") == 0
    assert json.loads(capsys.readouterr().out)["step_time_s"] > answer["step_time_s"]


ISLAND = (
    CLUSTER
    + """\
[[devices]]
id = "island"
site = "sea"
"""
)


def test_plan_says_how_near_it_is_and_what_would_help(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: tuple[str, str, str],
    tmp_path: Path,
) -> None:
    job, _, cache = files
    (tmp_path / "island.toml").write_text(ISLAND)
    common = ("plan", job, "-c", str(tmp_path / "island.toml"), "--cache", cache)
    more = ("--baselines", "--what-if", "--replans", "1")
    assert call(monkeypatch, *common, *more, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bound"]["step_time_s"] <= found["step_time_s"]
    assert found["bound"]["gap"] == pytest.approx(found["step_time_s"] / found["bound"]["step_time_s"] - 1)
    assert found["bound"].keys() == {"step_time_s", "compute_s", "gap", "term"}
    assert found["left_out"]["island"].startswith("no link from island to a")
    assert list(found["baselines"]) == list(BASELINES)
    for entry in found["baselines"].values():
        assert (entry["plan"] is None) == (entry["ratio"] is None) == bool(entry["reason"])
    assert len(found["what_if"]["found"]) == 1
    assert found["what_if"]["found"][0].keys() == {"change", "step_time_s", "ratio", "strategy"}
    assert all(entry.keys() == {"change", "reason"} for entry in found["what_if"]["untried"])
    assert call(monkeypatch, *common, *more) == 0
    out = capsys.readouterr().out
    assert "lower bound: " in out
    assert "left out: island, no link from island to a" in out
    assert "ratio: step time over that of the fastest strategy" in out
    assert "not planned: 1 GiB more on a; memory does not bind" in out
    assert call(monkeypatch, *common, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert not plain.keys() & {"baselines", "what_if"}


def test_a_baseline_plans_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: tuple[str, str, str]
) -> None:
    job, cluster, cache = files
    assert call(monkeypatch, "plan", job, "-c", cluster, "--cache", cache, "-s", "asteroid", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["strategy"] == found["plan"]["strategy"] == "asteroid"
    assert "asteroid" not in found["strategies"]


def test_a_link_without_bandwidth_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: tuple[str, str, str],
    tmp_path: Path,
) -> None:
    (tmp_path / "dead.toml").write_text(CLUSTER.replace("100 Mbit/s", "0 Mbit/s"))
    assert call(monkeypatch, "plan", files[0], "-c", str(tmp_path / "dead.toml")) == 2
    error = capsys.readouterr().err
    assert "bandwidth '0 Mbit/s' must be greater than 0" in error
    assert "remove the link or the device" in error


def test_planning_a_known_job_does_not_import_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: tuple[str, str, str]
) -> None:
    job, cluster, cache = files
    assert call(monkeypatch, "profile", job, "-c", cluster, "--cache", cache) == 0
    capsys.readouterr()
    code = (
        "import sys; sys.argv = ['spanwise', 'plan', *sys.argv[1:]]\n"
        "from spanwise.cli import main\n"
        "main()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, job, "-c", cluster, "--cache", cache, "--json"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step_time_s"] > 0


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("plan", "missing.toml"), 2, "missing.toml: cannot be read"),
        (("plan", "{job}", "--cluster", "missing.toml"), 2, "missing.toml: cannot be read"),
        (("plan", "{job}", "--set", "batch"), 2, "--set 'batch': write it as key=value"),
        (("plan", "{job}", "--set", "batch=0"), 2, "batch"),
        (("plan", "{job}", "--set", "colour=1"), 2, "colour"),
        (("plan", "{job}", "--set", "model.name='nowhere:net'"), 2, "'nowhere:net' cannot be imported"),
        (("plan", "{job}", "--set", "loss=hinge"), 2, "loss 'hinge' is neither cross_entropy nor mse"),
        (("plan", "{job}", "--set", "optimizer.name=Magic"), 2, "optimizer 'Magic' is not in torch.optim"),
        (("plan", "{job}", "--strategy", "magic"), 2, "magic"),
        (("simulate", "{dir}"), 2, "holds no run"),
        (("report", "{dir}"), 2, "holds no run"),
        (("worker", "--join", "nonsense", "--device", "a"), 2, "no token"),
        (("nonsense",), 2, "nonsense"),
        (("train",), 2, "JOB"),
    ],
)
def test_mistakes_are_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: tuple[str, str, str],
    tmp_path: Path,
    args: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    job, cluster, cache = files
    monkeypatch.delenv("SPANWISE_TOKEN", raising=False)
    filled = [a.format(job=job, dir=tmp_path) for a in args]
    if args[0] == "plan":
        filled += ["--cache", cache] + ([] if "--cluster" in args else ["-c", cluster])
    assert call(monkeypatch, *filled) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    if not error.startswith("Usage"):
        assert len(error.strip().splitlines()) == 1


def test_unwritable_run_folder(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: tuple[str, str, str],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("not a folder")
    job, cluster, cache = files
    target = str(tmp_path / "file" / "run")
    assert call(monkeypatch, "train", job, "-c", cluster, "--cache", cache, "--run", target) == 9
    assert "cannot be written" in capsys.readouterr().err


def test_memory_too_small_says_by_how_much_and_where(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: tuple[str, str, str],
    tmp_path: Path,
) -> None:
    job, _, cache = files
    tiny = tmp_path / "tiny.toml"
    tiny.write_text('name = "tiny"\n[emulation]\n[[devices]]\nid = "a"\nmemory = "1 kB"\n')
    assert call(monkeypatch, "plan", job, "-c", str(tiny), "--cache", cache) == 3
    error = capsys.readouterr().err
    assert "a" in error
    assert "1000 B" in error
