"""The lab on this machine: real namespaces, links, limits. Skipped where it cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spanwise.api import in_lab
from spanwise.api.run import TrainOptions, run_job
from spanwise.core.cluster import Cluster
from spanwise.core.errors import InputError, PeerError, ResourceError
from spanwise.core.job import Job
from spanwise.core.profile import Profile
from spanwise.lab import LIBRARY_BYTES, Lab, cgroups, check, reason_against, state
from spanwise.lab.cgroups import detect
from spanwise.lab.commands import NAMESPACES, call, require_tools
from spanwise.lab.layout import PREFIX
from spanwise.runtime.training import Silent


def impossible() -> str:
    """Why there can be no lab here, as on machines whose root may not make namespaces."""
    if reason := reason_against():
        return reason
    try:
        require_tools()
        detect("probe")
        call("ip", "netns", "add", "spanwise-probe")
        call("ip", "netns", "del", "spanwise-probe")
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except (ResourceError, OSError) as error:
        return f"no lab here: {error}"
    return ""


IMPOSSIBLE = impossible()
pytestmark = [
    pytest.mark.skipif(bool(IMPOSSIBLE), reason=IMPOSSIBLE or "a lab is possible"),
    pytest.mark.timeout(120),
]

CLUSTER = """\
name = "three"
data = ["end"]
[emulation]
core_share = 0.5
[[devices]]
id = "cloud"
site = "datacenter"
[[devices]]
id = "edge"
site = "plant"
speed = 0.6
[[devices]]
id = "end"
site = "plant"
speed = 0.4
memory = "128 MiB"
[[links]]
between = ["datacenter", "plant"]
bandwidth = "80 Mbit/s"
latency = "10 ms"
[[links]]
between = ["plant", "plant"]
bandwidth = "200 Mbit/s"
latency = "0.2 ms"
"""


def three() -> Cluster:
    return Cluster.from_toml(CLUSTER)


def traces() -> list[str]:
    """Whatever of any lab exists on this machine."""
    found = [p.name for p in NAMESPACES.glob(f"{PREFIX}*")] if NAMESPACES.is_dir() else []
    return [*found, *state.left_behind()]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if traces():
        pytest.skip("another lab is up on this machine")
    with Lab(three()) as one:
        yield one


def soon(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def ask(lab: Lab, device: str | None, code: str, *args: str) -> str:
    child = lab.start(device, [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True)
    return child.communicate(timeout=30)[0].strip()


def job(**changes: Any) -> Job:
    return Job.parse(
        {
            "model": {"name": "spanwise.zoo:mlp", "sizes": [16, 64, 64, 4]},
            "data": {"name": "spanwise.zoo.data:synthetic_vectors", "rows": 96, "features": 16, "classes": 4},
            "batch": 24, "steps": 4, "checkpoint_every": 0, "transfer_timeout_s": 5.0, **changes,
        }
    )  # fmt: skip


def test_latency_and_bandwidth_are_the_files(lab: Lab) -> None:
    """The check of ``spanwise lab check``, without its compute: this machine may be busy."""
    with lab.eased(), check._servers(lab) as ports:
        found = [*check._round_trips(lab, ports), *check._transfers(lab, ports)]
    assert {f.what for f in found} == {"rtt", "bandwidth"}
    for finding in found:  # wider than the check's 10 %: tests share the machine
        slack = 0.4 * finding.expected + (3e-3 if finding.what == "rtt" else 0.0)
        assert abs(finding.measured - finding.expected) < slack, finding


def test_memory_beyond_the_limit_ends_the_process_and_no_other(lab: Lab) -> None:
    other = lab.start("end", ["sleep", "30"])
    assert check._memory(lab).ok
    assert other.poll() is None
    other.kill()
    other.wait()
    inside = str(LIBRARY_BYTES // 4)
    child = lab.start("end", [sys.executable, "-m", "spanwise.lab.probe", "fill", inside])
    assert child.wait(30) == 0


def test_devices_are_apart_from_this_machines_network(lab: Lab) -> None:
    addresses = ask(lab, "edge", "import subprocess as s; print(s.getoutput('ip -o -4 addr'))")
    assert lab.address("edge") in addresses
    assert lab.control_address("edge") in addresses
    assert lab.address("cloud") not in addresses
    assert not [p for p in Path("/sys/class/net").iterdir() if p.name in ("cloud", "edge", "end")]


def test_a_cut_link_passes_nothing_until_it_is_set_again(lab: Lab) -> None:
    code = (
        "import socket,sys\n"
        "s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.bind((sys.argv[1], 0)); s.settimeout(10); print(s.getsockname()[1], flush=True)\n"
        "print(s.recv(10).decode())"
    )
    send = (
        "import socket,sys; socket.socket(2, 2).sendto(sys.argv[3].encode(), (sys.argv[1], int(sys.argv[2])))"
    )
    for a, b in (("edge", "cloud"), ("edge", "end")):  # by the relay, and over a bridge
        server = lab.start(b, [sys.executable, "-c", code, lab.address(b)], stdout=subprocess.PIPE, text=True)
        port = server.stdout.readline().strip()
        lab.cut(a, b)
        ask(lab, a, send, lab.address(b), port, "lost")
        time.sleep(0.3)
        lab.set_link(a, b, latency="1 ms")
        ask(lab, a, send, lab.address(b), port, "found")
        assert server.communicate(timeout=20)[0].strip() == "found"


def test_killed_and_paused_processes(lab: Lab) -> None:
    child = lab.start("edge", ["sleep", "60"])
    time.sleep(0.2)
    lab.pause("edge")
    assert soon(lambda: Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    lab.resume("edge")
    assert child.poll() is None
    lab.kill("edge")
    assert child.wait(5) == -signal.SIGKILL


def test_unknown_names_are_refused(lab: Lab) -> None:
    with pytest.raises(InputError, match="unknown device 'nobody'"):
        lab.start("nobody", ["true"])
    with pytest.raises(InputError, match="no device or site 'nowhere'"):
        lab.cut("nowhere", "plant")
    with pytest.raises(InputError, match="must be above 0"):
        lab.set_speed("edge", 0)


def test_a_second_lab_is_refused_while_one_is_up(lab: Lab) -> None:
    before = sorted(traces())
    with pytest.raises(ResourceError, match=f"lab {lab.id} .* is up"):
        Lab(three()).up()
    assert sorted(traces()) == before


class Cutter(Silent):
    """Cuts a link when the first step is done."""

    def __init__(self, lab: Lab, a: str, b: str) -> None:
        self.lab, self.ends, self.cut_at = lab, (a, b), 0.0

    def on_step(self, *_: Any) -> None:
        if not self.cut_at:
            self.cut_at = time.monotonic()
            self.lab.cut(*self.ends)

    def on_stage(self, text: str) -> None: ...

    def on_plan(self, *_: Any) -> None: ...

    def on_meeting(self, *_: Any) -> None: ...


def test_training_runs_and_a_cut_link_ends_it_with_the_documented_error(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Times as exact as benchmarks need them take long; here the way they are measured counts.
    monkeypatch.setattr(in_lab, "_PACE_S", 1.0)
    outcome = run_job(job(), three(), TrainOptions(run=tmp_path / "a", strategy="gpipe", lab=lab))
    assert outcome.summary["steps"] == 4
    assert len(outcome.plan.devices) == 3
    sent = lab.sent_bytes()
    assert all(sent[device] > 0 for device in outcome.plan.devices)
    ends = outcome.plan.stages[0].devices[0], outcome.plan.stages[1].devices[0]
    cutter = Cutter(lab, *ends)
    times = Profile.load(outcome.folder.profile)
    with pytest.raises(PeerError, match=r"nothing within 5 s|not sent within 5 s|connection broke"):
        run_job(
            job(steps=500), three(),
            TrainOptions(run=tmp_path / "b", plan=outcome.plan, times=times, lab=lab, watcher=cutter),
        )  # fmt: skip
    assert cutter.cut_at
    assert time.monotonic() - cutter.cut_at < 5.0 + 15.0  # the job's deadline of a transfer, and the way out
    lab.set_link(*ends, bandwidth="80 Mbit/s")


def test_a_lab_leaves_nothing_behind_even_if_its_owner_is_killed(tmp_path: Path, lab: Lab) -> None:
    """Last in this file: it ends the module's lab first, as there is one at a time."""
    lab.down()
    assert traces() == []
    (tmp_path / "c.toml").write_text(CLUSTER)
    argv = [sys.executable, "-m", "spanwise", "lab", "run", str(tmp_path / "c.toml"), "--", "sleep", "60"]
    owner = subprocess.Popen(argv)
    try:
        assert soon(lambda: any(folder.control.exists() for folder in state.known()), 20)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert soon(lambda: not traces())


def test_a_process_that_enters_a_group_while_it_is_removed_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It happened: the owner's last child wrote itself into the group after the others were killed."""
    groups = detect("late")
    groups.create("hub", None, None)
    child = subprocess.Popen(["sleep", "60"])
    seen, real = [], cgroups._processes
    try:
        for entry in groups.entries("hub"):
            entry.write_text(str(child.pid))
        # The first look at each group is taken to be before the child came.
        monkeypatch.setattr(
            cgroups, "_processes", lambda f: (seen.append(f), real(f) if len(seen) > 1 else ())[1]
        )
        groups.remove()
        assert child.wait(5) == -signal.SIGKILL
        assert "late" not in state.left_behind()
    finally:
        child.kill()
        child.wait()


def test_commands(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(CLUSTER)

    def spanwise(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "spanwise", "lab", *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    if traces():
        pytest.skip("another lab is up on this machine")
    assert "no lab is up" in spanwise("status").stdout
    made = json.loads(spanwise("up", str(tmp_path / "c.toml"), "--json").stdout)
    try:
        assert made["devices"]["edge"]["cores"] == pytest.approx(0.3)
        assert made["lab"] in spanwise("status").stdout
        done = spanwise("exec", "edge", "--", "ip", "-o", "-4", "addr", "show", "eth0")
        assert made["devices"]["edge"]["address"] in done.stdout
        assert spanwise("exec", "edge", "--", "sh", "-c", "exit 7").returncode == 7
        done = spanwise("up", str(tmp_path / "c.toml"))
        assert done.returncode == ResourceError.exit_code
        assert "is up" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        done = spanwise("down", "--all")
    assert f"lab {made['lab']} is down" in done.stdout
    assert traces() == []
    inside = spanwise("run", str(tmp_path / "c.toml"), "--", "sh", "-c", "echo $SPANWISE_LAB; exit 3")
    assert inside.returncode == 3
    assert len(inside.stdout.strip()) == 6
    assert traces() == []
    assert os.path.isdir("/run/spanwise")
