"""Flower's processes, as its engine documents them and in its resident form, and their environment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from places import HERE, Place, free_port

REQUIREMENTS = HERE / "requirements-flower.txt"
_INSTALL_S = 1800.0
_SUBMIT_S = 60.0
_CONNECTION = """\
[superlink]
default = "lab"

[superlink.lab]
address = "{address}"
insecure = true
"""


def ensure_environment(folder: Path) -> Path:
    """The virtual environment with Flower; made from the requirements file if it is not there."""
    command = folder / "bin" / "flower-superlink"
    if not command.exists():
        print(f"installing {REQUIREMENTS.name} into {folder.name}", flush=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
        for argv in (
            [sys.executable, "-m", "venv", str(folder)],
            [*pip, "install", "-r", str(REQUIREMENTS)],
        ):
            subprocess.run(argv, check=True, timeout=_INSTALL_S)
            (folder / ".gitignore").write_text("*\n", encoding="utf-8")  # as newer versions of venv write it
    return folder


def run_engine(found: Place, venv: Path) -> None:
    """SuperLink on the first device, a SuperNode on each, and ``flwr run``: Flower's documented deployment.

    Every device has a FLWR_HOME of its own, as real ones have. Telemetry, the look for newer versions and
    the installation of an app's dependencies are off: they would ask the internet.
    """
    task, first = found.task, found.task.devices[0]
    port = free_port()
    address = f"{found.address(first)}:{port}"
    with found.eased():
        found.start(
            first, "superlink",
            ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
             "--host", found.address(first), "--port", str(port)],
            _env(found, venv, "superlink"),
        )  # fmt: skip
        _submit(found, venv, address)
        for index, device in enumerate(task.devices):
            found.start(
                device, f"supernode-{index}",
                ["flower-supernode", "--insecure", "--superlink", address, "--port", str(free_port()),
                 "--node-config", f"partition-id={index} num-partitions={len(task.devices)}"],
                _env(found, venv, f"supernode-{index}"),
            )  # fmt: skip
        found.wait_ready("server")
    found.let_go()


def _submit(found: Place, venv: Path, address: str) -> None:
    """``flwr run`` as soon as the SuperLink answers."""
    env = _env(found, venv, "flwr-run")
    home = Path(env["FLWR_HOME"])
    (home / "config.toml").write_text(_CONNECTION.format(address=address), encoding="utf-8")
    argv = ["flwr", "run", str(HERE / "flower_app"), "lab", "--run-config", f'folder="{found.task.folder}"']
    end = time.monotonic() + _SUBMIT_S
    while True:
        found.start(found.task.devices[0], "flwr-run", argv, env)
        while (status := found.finished("flwr-run")) is None and time.monotonic() < end:
            time.sleep(0.05)
        if status == 0:
            return
        if time.monotonic() > end or found.finished("superlink") is not None:
            raise RuntimeError(
                f"flwr run: {found.last_words('flwr-run')}\nsuperlink: {found.last_words('superlink')}"
            )
        time.sleep(0.5)


def _env(found: Place, venv: Path, name: str) -> dict[str, str]:
    home = found.task.folder / "flwr" / name
    home.mkdir(parents=True, exist_ok=True)
    return {
        "PATH": os.pathsep.join((str(venv / "bin"), os.environ.get("PATH", ""))),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def run_resident(found: Place, venv: Path) -> None:
    """``start_server`` on the first device and ``start_client`` on each; see ``resident.py``."""
    task, first = found.task, found.task.devices[0]
    address = f"{found.address(first)}:{free_port()}"
    argv = [str(venv / "bin" / "python"), "resident.py"]
    with found.eased():
        found.start(
            first, "server", [*argv, "server", str(task.folder), address], _env(found, venv, "server")
        )
        found.wait_ready("listening")
        for index, device in enumerate(task.devices):
            found.start(
                device, f"client-{index}", [*argv, "client", str(task.folder), address, str(index)],
                _env(found, venv, f"client-{index}"),
            )  # fmt: skip
        found.wait_ready("server")
    found.let_go()
