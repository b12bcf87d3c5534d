"""Whether a lab does what its cluster file says: latency, bandwidth, compute and memory, measured in it."""

from __future__ import annotations

import json
import select
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from spanwise.core.errors import ResourceError
from spanwise.core.units import format_bytes, format_rate, format_seconds
from spanwise.lab.lab import LIBRARY_BYTES, Lab

TOLERANCE = 0.10
RTT_SLACK_S = 1e-3
_SECONDS = 2.0
_TIMEOUT_S = 60.0
_OVERFLOW_BYTES = 64 * 2**20

What = Literal["rtt", "bandwidth", "compute", "memory"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One number of the file held against the lab. Seconds, bytes per second, cores, or bytes."""

    what: What
    where: str
    expected: float
    measured: float
    ok: bool

    @property
    def line(self) -> str:
        """Verdict, what, where and numbers, for a table of them."""
        return f"{'ok ' if self.ok else 'OFF'} {self.what:<9} {self.where:<24} {self.text}"

    @property
    def text(self) -> str:
        """In words."""
        shows: dict[str, Callable[[float], str]] = {
            "rtt": format_seconds, "bandwidth": format_rate, "memory": format_bytes, "compute": _format_cores,
        }  # fmt: skip
        show = shows[self.what]
        if self.what == "memory":
            return f"{'killed' if self.ok else 'NOT killed'} beyond {show(self.expected)}"
        return f"file {show(self.expected)}, measured {show(self.measured)}"


def _format_cores(cores: float) -> str:
    return f"{cores:.3f} cores"


def check(lab: Lab) -> Iterator[Finding]:
    """Measures a lab that is up and otherwise idle; yields findings as they are made.

    Round trips of every pair, one transfer each way for every kind of route, the compute of all devices at
    once, and a process on the smallest device that takes more memory than the device has.
    """
    with lab.eased(), _servers(lab) as ports:
        yield from _round_trips(lab, ports)
        yield from _transfers(lab, ports)
    yield from _compute(lab)
    yield _memory(lab)


@contextmanager
def _servers(lab: Lab) -> Generator[dict[str, int]]:
    ids = lab.cluster.ids
    running = {d: _probe(lab, d, "serve", lab.address(d)) for d in ids}
    try:
        yield {d: int(_read(child, f"the probe on '{d}'")["port"]) for d, child in running.items()}
    finally:
        for child in running.values():
            child.kill()
            child.wait()


def _round_trips(lab: Lab, ports: dict[str, int]) -> Iterator[Finding]:
    cluster = lab.cluster
    for index, a in enumerate(cluster.ids):
        for b in cluster.ids[index + 1 :]:
            if not (cluster.connected(a, b) and cluster.connected(b, a)):
                continue
            expected = cluster.route(a, b).latency_s + cluster.route(b, a).latency_s
            found = _ask(lab, a, "rtt", lab.address(b), str(ports[b]))["rtt_s"]
            ok = abs(found - expected) <= TOLERANCE * expected + RTT_SLACK_S
            yield Finding("rtt", f"{a} - {b}", expected, found, ok)


def _transfers(lab: Lab, ports: dict[str, int]) -> Iterator[Finding]:
    """One pair stands for all that use links of the same name and have ports of the same width."""
    cluster = lab.cluster
    seen: set[tuple[object, ...]] = set()
    for a in cluster.ids:
        for b in cluster.ids:
            if a == b or not cluster.connected(a, b):
                continue
            one, two, route = cluster.device(a), cluster.device(b), cluster.route(a, b)
            links = tuple(name for name, _ in route.resources if name.startswith("link:"))
            kind = (links or (one.site,), one.up_bytes_per_s, two.down_bytes_per_s)
            if kind in seen:
                continue
            seen.add(kind)
            expected = route.bandwidth_bytes_per_s
            found = _ask(lab, a, "rate", lab.address(b), str(ports[b]), str(_SECONDS))["bytes_per_s"]
            yield Finding("bandwidth", f"{a} > {b}", expected, found, abs(found / expected - 1) <= TOLERANCE)


def _compute(lab: Lab) -> Iterator[Finding]:
    """All at once, as in training. A core's own speed drops out: shares are held against each other."""
    ids = lab.cluster.ids
    running = {d: _probe(lab, d, "work", str(2 * _SECONDS)) for d in ids}
    rates = {d: float(_read(child, f"the probe on '{d}'")["work_per_s"]) for d, child in running.items()}
    for child in running.values():
        child.wait(_TIMEOUT_S)
    core = statistics.median(rates[d] / lab.share(d) for d in ids)
    for device in ids:
        expected, found = lab.share(device), rates[device] / core
        yield Finding("compute", device, expected, found, abs(found / expected - 1) <= TOLERANCE)


def _memory(lab: Lab) -> Finding:
    smallest = min(lab.cluster.devices, key=lambda device: device.memory_bytes)
    limit = smallest.memory_bytes + LIBRARY_BYTES
    with lab.eased():
        child = _probe(lab, smallest.id, "fill", str(limit + _OVERFLOW_BYTES))
        try:
            child.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    killed = child.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    return Finding("memory", smallest.id, limit, lab.peak_memory_bytes(smallest.id), killed)


def _probe(lab: Lab, device: str, *words: str) -> subprocess.Popen[bytes]:
    argv: Sequence[str] = [sys.executable, "-m", "spanwise.lab.probe", *words]
    return lab.start(device, argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)


def _ask(lab: Lab, device: str, *words: str) -> dict[str, Any]:
    child = _probe(lab, device, *words)
    try:
        return _read(child, f"the probe on '{device}'")
    finally:
        child.kill()
        child.wait()


def _read(child: subprocess.Popen[bytes], who: str) -> dict[str, Any]:
    assert child.stdout is not None
    ready, _, _ = select.select([child.stdout], [], [], _TIMEOUT_S)
    line = child.stdout.readline() if ready else b""
    child.stdout.close()  # one line is all that a probe says
    if not line:
        raise ResourceError(f"lab check: {who} gave no answer within {_TIMEOUT_S:g} s")
    return json.loads(line)
