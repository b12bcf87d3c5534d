"""``spanwise lab``: mistakes are one line with a documented exit code, and nothing is left behind."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from spanwise.cli import main
from spanwise.core.errors import InputError, ResourceError
from spanwise.lab import lab as lab_module
from spanwise.lab import state

CLUSTER = """\
name = "two"
[emulation]
core_share = {share}
[[devices]]
id = "{id}"
site = "x"
[[devices]]
id = "b"
site = "x"
[[links]]
between = ["x", "x"]
bandwidth = "100 Mbit/s"
"""


@pytest.fixture
def untouched() -> object:
    """What labs exist must be the same afterwards."""
    before = state.left_behind()
    yield before
    assert state.left_behind() == before


def call(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["spanwise", "lab", *args])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def cluster(folder: Path, device: str = "a", share: float = 0.1) -> str:
    path = folder / "c.toml"
    path.write_text(CLUSTER.format(id=device, share=share))
    return str(path)


def possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were root on a machine with TUN."""
    monkeypatch.setattr(lab_module, "reason_against", lambda: "")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("command", ["up", "check"])
def test_not_root_names_the_portable_emulation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert call(monkeypatch, command, cluster(tmp_path)) == ResourceError.exit_code
    said = capsys.readouterr().err
    assert "needs root" in said
    assert "portable emulation" in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("tool", ["ip", "tc"])
def test_a_missing_program_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tool: str
) -> None:
    possible(monkeypatch)
    found = shutil.which
    monkeypatch.setattr("shutil.which", lambda name: None if name == tool else found(name) or "/bin/true")
    assert call(monkeypatch, "up", cluster(tmp_path)) == ResourceError.exit_code
    said = capsys.readouterr().err
    assert f"'{tool}' is not on this machine" in said
    assert "iproute2" in said


@pytest.mark.usefixtures("untouched")
def test_clusters_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    possible(monkeypatch)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert call(monkeypatch, "run", cluster(tmp_path, share=0.9), "--", "true") == InputError.exit_code
    assert "1.8 cores" in capsys.readouterr().err
    long = cluster(tmp_path, device="a-device-with-a-long-name")
    assert call(monkeypatch, "run", long, "--", "true") == InputError.exit_code
    assert "allows 15" in capsys.readouterr().err
    assert call(monkeypatch, "run", str(tmp_path / "no.toml"), "--", "true") == InputError.exit_code
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.usefixtures("untouched")
def test_what_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "exec", "a", "--lab", "ffffff", "--", "true") == InputError.exit_code
    assert "lab 'ffffff': not known" in capsys.readouterr().err


def test_nothing_is_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(state, "HOME", tmp_path)
    assert call(monkeypatch, "status") == 0
    assert "no lab is up" in capsys.readouterr().out
    assert call(monkeypatch, "exec", "a", "--", "true") == InputError.exit_code
    assert "none is up" in capsys.readouterr().err


def test_train_in_a_lab_without_root_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    job = tmp_path / "job.toml"
    job.write_text(
        'batch = 8\nsteps = 2\nmodel = { name = "spanwise.zoo:mlp", sizes = [8, 4] }\n'
        'data = { name = "spanwise.zoo.data:synthetic_vectors", rows = 16, features = 8, classes = 4 }\n'
    )
    argv = ["spanwise", "train", str(job), "--lab", "--cluster", cluster(tmp_path, share=0.5), "--json",
            "--run", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "-s", "single"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    main()
    heard = capsys.readouterr()
    assert "the portable emulation takes its place" in heard.err
    assert '"steps": 2' in heard.out
