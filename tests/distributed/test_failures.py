"""What goes wrong between machines: every wait is bounded, every error names the device and the action."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import psutil
import pytest
from cases import GPT, MLP
from equality import assignment, cluster, of, plan_of

from spanwise.core.errors import JoinError, PeerError, ResourceError
from spanwise.core.plan import Replica, Stage
from spanwise.runtime import coordinator as coordinator_module
from spanwise.runtime import pool as pool_module
from spanwise.runtime.control import Channel, introduce, listen
from spanwise.runtime.coordinator import Coordinator
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.joining import versions
from spanwise.runtime.pool import Meeting, WorkerPool
from spanwise.runtime.processes import ProcessSession
from spanwise.runtime.threads import ThreadSession
from spanwise.runtime.transport import Pending, Tensors, Transport

END_S = 10.0  # survivors must have ended by then


def two_stages(timeout_s: float = 30.0) -> tuple[Assignment, dict, object]:
    _, source = of(MLP)
    half = len(source.graph) // 2
    rows = (Replica(device="a", rows=6),)
    stages = (
        Stage(start=0, stop=half, replicas=rows, warmup=2),
        Stage(start=half, stop=len(source.graph), replicas=(Replica(device="b", rows=6),), warmup=1),
    )
    work = assignment(MLP, source, plan_of(source.graph, stages, rows, 2))
    work = replace(work, job=MLP.job(transfer_timeout_s=timeout_s))
    return work, source.parameters | source.buffers, MLP.data()


@pytest.fixture
def own_pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(cluster(), ("a", "b"), Meeting(), emulate=False)
    yield pool
    pool.close()


def run_until_it_fails(pool: WorkerPool, harm: int) -> tuple[PeerError, float]:
    """Steps for ever; after the first step sends the signal ``harm`` to b."""
    work, tensors, data = two_stages()
    session = ProcessSession(pool, work, tensors, data)
    steps = session.run(0, 1_000_000)
    next(steps)
    began = time.monotonic()
    os.kill(pool.process_ids["b"], harm)
    with pytest.raises(PeerError) as caught:
        deque(steps, maxlen=0)
    return caught.value, time.monotonic() - began


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_ends_the_run_everywhere(
    own_pool: WorkerPool, harm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "_SILENT_S", 3.0)  # else the same, but later
    monkeypatch.setattr(pool_module, "_ENDING_S", 2.0)
    error, _ = run_until_it_fails(own_pool, harm)
    assert "'b'" in str(error) or "b:" in str(error)
    survivor = psutil.Process(own_pool.process_ids["a"])
    own_pool.close()
    assert not survivor.is_running() or survivor.status() == psutil.STATUS_ZOMBIE


def test_a_probe_that_times_out_names_the_link_and_the_way_out(own_pool: WorkerPool) -> None:
    """The other end never takes part, as if nothing came through."""
    own_pool.coordinator.tell("a", "probe", peer="b", first=True, sizes=(1000,), timeout_s=0.5)
    with pytest.raises(PeerError, match=r"link with 'b': .*nothing within 0\.5 s; .* the cluster file"):
        own_pool.coordinator.gather("probed", ("a",), 30.0)


def test_a_message_that_never_comes_names_device_and_action() -> None:
    @dataclass
    class Lossy:
        inner: Transport

        def send(self, peer: str, tag: int, tensors: Tensors) -> Pending:
            class Done:
                def wait(self, timeout_s: float) -> None:
                    return

            return Done()

        def recv(self, peer: str, tag: int, buffers: Tensors) -> Pending:
            return self.inner.recv(peer, tag, buffers)

        def close(self) -> None:
            self.inner.close()

    work, tensors, data = two_stages(timeout_s=0.3)
    session = ThreadSession(work, tensors, data, wrap=lambda device, t: Lossy(t) if device == "a" else t)
    with pytest.raises(PeerError, match=r"step 0, 'recv .* from (a|b) .*nothing within 0\.3 s"):
        list(session.run(0, 1))
    session.close()


def test_another_device_s_failure_wakes_those_who_wait() -> None:
    work, tensors, data = two_stages()
    session = ThreadSession(work, tensors, data)

    def boom() -> None:
        raise RuntimeError("kernel fault")

    session._runs["b"].optimizer.step = boom
    with pytest.raises(RuntimeError, match="kernel fault"):
        list(session.run(0, 3))
    session.close()


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    one = Coordinator(listen("127.0.0.1", 0), "right token", ("a", "b"), versions())
    yield one
    one.close()
    one.drop()


def knock(coordinator: Coordinator, token: str, device: str, **greeting: object) -> Channel:
    channel = Channel(socket.create_connection(("127.0.0.1", coordinator.port), timeout=5), "coordinator")
    try:
        introduce(channel, token, device, {"versions": versions(), **greeting})
    except JoinError:
        channel.close()
        raise
    return channel


def test_handshake(coordinator: Coordinator) -> None:
    member = knock(coordinator, "right token", "a")
    with pytest.raises(JoinError, match="wrong token"):
        knock(coordinator, "wrong token", "b")
    with pytest.raises(JoinError, match="not a device of this cluster; known: a, b"):
        knock(coordinator, "right token", "z")
    with pytest.raises(JoinError, match=r"runs torch 1\.0, the coordinator 2\.13"):
        knock(coordinator, "right token", "b", versions={**versions(), "torch": "1.0"})
    with pytest.raises(JoinError, match=r"b did not join 127.0.0.1:\d+ within 0.2 s.*wrong token"):
        coordinator.wait_for_all(0.2)
    member.close()


def test_a_second_worker_for_a_device_is_refused(coordinator: Coordinator) -> None:
    first = knock(coordinator, "right token", "a")
    second = knock(coordinator, "right token", "a")
    frame = second.receive()
    assert frame.kind == "abort"
    assert "joined already" in frame.head["reason"]
    first.close()
    second.close()


def test_a_worker_does_not_obey_an_impostor() -> None:
    server = listen("127.0.0.1", 0)

    def pretend() -> None:
        connection, _ = server.accept()
        channel = Channel(connection, "worker")
        channel.send("challenge", nonce="00")
        channel.receive()
        channel.send("welcome", proof="made up")
        channel.close()

    thread = threading.Thread(target=pretend, daemon=True)
    thread.start()
    channel = Channel(socket.create_connection(server.getsockname(), timeout=5), "coordinator")
    with pytest.raises(JoinError, match="does not know the token"):
        introduce(channel, "right token", "a", {})
    channel.close()
    thread.join(5)
    server.close()


def test_a_large_frame_before_the_handshake_is_not_read(coordinator: Coordinator) -> None:
    raw = socket.create_connection(("127.0.0.1", coordinator.port), timeout=5)
    raw.sendall(struct.pack(">IQ", 5000, 2**40))
    raw.settimeout(5)
    while raw.recv(4096):  # the challenge, then the end
        pass
    raw.close()


def test_port_in_use() -> None:
    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(ResourceError, match=f"listen on 127.0.0.1:{port}: .*choose another port"):
        listen("127.0.0.1", port)
    taken.close()


def test_listens_only_where_asked(coordinator: Coordinator) -> None:
    mine = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in mine if address.port == coordinator.port} == {"127.0.0.1"}


def test_a_worker_ends_when_its_coordinator_is_gone() -> None:
    one = Coordinator(listen("127.0.0.1", 0), "t", ("a",), versions())
    command = [sys.executable, "-m", "spanwise", "worker", "--join", f"127.0.0.1:{one.port}", "--device", "a"]
    worker = subprocess.Popen(
        command, env=os.environ | {"SPANWISE_TOKEN": "t"}, stderr=subprocess.PIPE, text=True
    )
    one.wait_for_all(60)
    one._server.close()
    one.drop()
    assert worker.wait(END_S) == 6
    assert worker.stderr is not None
    assert "the coordinator is gone" in worker.stderr.read()
    worker.stderr.close()


def test_gpt_case_has_a_tie() -> None:
    """The cases that the ladder relies on are what they claim to be."""
    assert of(GPT)[1].graph.ties
