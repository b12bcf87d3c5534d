from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from spanwise.core.cluster import Cluster
from spanwise.core.errors import PeerError
from spanwise.runtime import emulate
from spanwise.runtime.emulate import Ledger, PacedTransport, Throttle, ledger_path
from spanwise.runtime.local import LocalFabric, LocalTransport
from spanwise.runtime.transport import Pending, Tensors

LONG_S = 20.0
CLUSTER = Cluster.parse(
    {
        "devices": [
            {"id": "a1", "site": "a"}, {"id": "a2", "site": "a"}, {"id": "a3", "site": "a"},
            {"id": "b1", "site": "b"}, {"id": "b2", "site": "b", "down": 1e5}, {"id": "alone", "site": "c"},
        ],
        "links": [
            {"between": ["a", "b"], "up": 1e6, "down": 4e6, "latency": 0.5},
            {"between": ["a", "a"], "bandwidth": 2e6, "latency": 0.001},
        ],
    }
)  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    found = Ledger(tmp_path / "ledger", CLUSTER)
    yield found
    found.close()


class TestLedger:
    def book(self, ledger: Ledger, a: str, b: str, nbytes: int, at: float) -> float:
        return ledger.book(CLUSTER.route(a, b), nbytes, at)

    def test_messages_over_one_pipe_follow_each_other(self, ledger: Ledger) -> None:
        assert self.book(ledger, "a1", "b1", 500_000, 10.0) == pytest.approx(10.5)
        assert self.book(ledger, "a2", "b1", 250_000, 10.0) == pytest.approx(10.75)
        assert self.book(ledger, "a3", "b1", 250_000, 20.0) == pytest.approx(20.25)  # idle in between

    def test_the_way_back_is_another_pipe(self, ledger: Ledger) -> None:
        self.book(ledger, "a1", "b1", 10**9, 10.0)
        assert self.book(ledger, "b1", "a1", 400_000, 10.0) == pytest.approx(10.1)

    def test_in_a_switch_only_ports_are_shared(self, ledger: Ledger) -> None:
        assert self.book(ledger, "a1", "a2", 200_000, 10.0) == pytest.approx(10.1)
        assert self.book(ledger, "a2", "a3", 200_000, 10.0) == pytest.approx(10.1)  # other ports
        assert self.book(ledger, "a1", "a3", 200_000, 10.0) == pytest.approx(10.2)  # both ports once used
        assert self.book(ledger, "a2", "a1", 200_000, 10.0) == pytest.approx(10.2)  # a2 has sent once

    def test_the_slowest_capacity_decides_but_each_is_booked_for_itself(self, ledger: Ledger) -> None:
        assert self.book(ledger, "a1", "b2", 100_000, 10.0) == pytest.approx(11.0)  # the port of b2
        assert self.book(ledger, "a1", "b1", 100_000, 10.0) == pytest.approx(10.2)  # the pipe is free again
        assert self.book(ledger, "a1", "b2", 100_000, 10.0) == pytest.approx(12.0)

    def test_two_ledgers_on_one_file_see_each_other(self, ledger: Ledger, tmp_path: Path) -> None:
        other = Ledger(tmp_path / "ledger", CLUSTER)
        self.book(ledger, "a1", "b1", 500_000, 10.0)
        assert self.book(other, "a2", "b1", 500_000, 10.0) == pytest.approx(11.0)
        assert self.book(ledger, "a3", "b1", 500_000, 10.0) == pytest.approx(11.5)
        other.close()

    def test_bookings_of_many_threads_add_up(self, ledger: Ledger, tmp_path: Path) -> None:
        """Through one ledger and through another on the same file."""
        other = Ledger(tmp_path / "ledger", CLUSTER)

        def work(mine: Ledger) -> None:
            for _ in range(100):
                self.book(mine, "a1", "b1", 1000, 10.0)

        threads = [threading.Thread(target=work, args=(x,)) for x in (ledger, ledger, other, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self.book(ledger, "a1", "b1", 0, 10.0) == pytest.approx(10.4)
        other.close()

    def test_a_cluster_without_links(self, tmp_path: Path) -> None:
        Ledger(tmp_path / "empty", Cluster.parse({"devices": [{"id": "a"}]})).close()

    def test_every_emulated_cluster_has_its_own_file(self) -> None:
        first, second = ledger_path(), ledger_path()
        assert first != second
        assert first.stat().st_size == second.stat().st_size == 0
        first.unlink()
        second.unlink()


@dataclass
class Clock:
    """Stands for the module ``time`` in the module under test; everything else goes by the real one."""

    now: float = 100.0
    cpu: float = 7.0
    slept: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.cpu

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def compute(self, cpu: float, wall: float) -> None:
        self.cpu += cpu
        self.now += wall


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(emulate, "time", found)
    return found


class TestThrottle:
    def test_compute_takes_as_long_as_on_the_slower_device(self, clock: Clock) -> None:
        with Throttle(0.25):
            clock.compute(cpu=1.0, wall=1.0)
        assert clock.slept == [pytest.approx(3.0)]
        assert clock.now == pytest.approx(104.0)

    def test_a_whole_core_never_rests(self, clock: Clock) -> None:
        with Throttle(1.0):
            clock.compute(cpu=1.0, wall=1.0)
        assert clock.slept == []

    def test_time_on_a_busy_machine_counts_once(self, clock: Clock) -> None:
        with Throttle(0.25):
            clock.compute(cpu=1.0, wall=3.0)
        assert clock.slept == [pytest.approx(1.0)]

    def test_lateness_is_made_up_for(self, clock: Clock) -> None:
        throttle = Throttle(0.5)
        with throttle:
            clock.compute(cpu=1.0, wall=5.0)  # 2 s were due: 3 s late
        with throttle:
            clock.compute(cpu=1.0, wall=1.0)  # 1 s of rest is due: 2 s late
        with throttle:
            clock.compute(cpu=4.0, wall=4.0)  # 4 s of rest are due, 2 are left
        assert clock.slept == [pytest.approx(2.0)]
        assert clock.now == pytest.approx(100.0 + 12.0)

    def test_not_over_a_wait(self, clock: Clock) -> None:
        throttle = Throttle(0.5)
        with throttle:
            clock.compute(cpu=1.0, wall=5.0)
        throttle.idle()
        with throttle:
            clock.compute(cpu=1.0, wall=1.0)
        assert clock.slept == [pytest.approx(1.0)]

    def test_a_pause_is_not_credit(self, clock: Clock) -> None:
        """A device that was free before its next work began may not begin in the past for it."""
        throttle = Throttle(0.5)
        with throttle:
            clock.compute(cpu=1.0, wall=1.0)
        clock.now += 50.0
        throttle.idle()
        with throttle:
            clock.compute(cpu=1.0, wall=1.0)
        assert clock.slept == [pytest.approx(1.0), pytest.approx(1.0)]

    def test_an_error_passes_at_once(self, clock: Clock) -> None:
        with pytest.raises(KeyError), Throttle(0.1):  # noqa: PT012
            clock.compute(cpu=1.0, wall=1.0)
            raise KeyError
        assert clock.slept == []


@dataclass(frozen=True)
class Noting(LocalTransport):
    """Notes in which order messages are handed to the real transport."""

    noted: list[tuple[str, int]] = field(default_factory=list)

    def send(self, peer: str, tag: int, tensors: Tensors) -> Any:
        self.noted.append((peer, tag))
        return super().send(peer, tag, tensors)


class Rig:
    """A PacedTransport of a1 under a clock that stands still while messages are queued, then jumps."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self.clock = clock
        self.fabric = LocalFabric()
        self.inner = Noting(self.fabric, "a1")
        self.paced = PacedTransport(self.inner, "a1", CLUSTER, ledger)
        self.passed: list[tuple[str, float, float, int]] = []
        self.paced.on_passed = lambda *entry: self.passed.append(entry)
        self.pending: list[Pending] = []

    def send(self, peer: str, tag: int, nbytes: int) -> None:
        data = torch.full((nbytes,), tag, dtype=torch.uint8)
        self.pending.append(self.paced.send(peer, tag, [data]))

    def run(self) -> dict[str, list[tuple[float, float, int]]]:
        """(started, passed, bytes) per peer, in seconds after the clock's first reading."""
        self.clock.now = 1e6
        with self.paced._wake:
            self.paced._wake.notify()
        for pending in self.pending:
            pending.wait(LONG_S)
        found: dict[str, list[tuple[float, float, int]]] = {}
        for peer, start, end, nbytes in self.passed:
            found.setdefault(peer, []).append((start - 100.0, end - 100.0, nbytes))
        return found


@pytest.fixture
def rig(ledger: Ledger, clock: Clock) -> Iterator[Rig]:
    found = Rig(ledger, clock)
    yield found
    found.paced.close()


class TestPacedTransport:
    def test_a_message_takes_bytes_over_rate(self, rig: Rig) -> None:
        rig.send("b1", 1, 300_000)
        ((start, end, nbytes),) = rig.run()["b1"]
        assert (start, end, nbytes) == (pytest.approx(0.0), pytest.approx(0.3), 300_000)

    def test_messages_to_one_peer_follow_each_other_in_order(self, rig: Rig) -> None:
        for tag, nbytes in ((1, 300_000), (2, 1), (3, 200_000)):
            rig.send("b1", tag, nbytes)
        found = rig.run()["b1"]
        assert [n for _, _, n in found] == [300_000, 1, 200_000]
        assert [end for _, end, _ in found] == pytest.approx([0.3, 0.300001, 0.500001])
        assert [start for start, _, _ in found] == pytest.approx([0.0, 0.3, 0.300001])
        assert rig.inner.noted == [("b1", 1), ("b1", 2), ("b1", 3)]

    def test_messages_to_two_peers_share_the_pipe_fairly(self, rig: Rig) -> None:
        """b1 and b2 lie behind one pipe of 1 MB/s; the port of b2 holds its message back."""
        rig.send("b1", 1, 300_000)
        rig.send("b2", 2, 30_000)
        found = rig.run()
        assert found["b2"][0][1] == pytest.approx(0.3, abs=0.1)  # at 0.1 MB/s, plus turns it waited for
        assert found["b1"][0][1] == pytest.approx(0.33, abs=1e-3)  # the pipe was never idle

    def test_a_short_message_need_not_wait_for_a_long_one_to_another_peer(self, rig: Rig) -> None:
        rig.send("a2", 1, 400_000)
        rig.send("a3", 2, 40_000)
        found = rig.run()
        assert found["a3"][0][1] == pytest.approx(2 * 40_000 / 2e6, abs=0.005)
        assert found["a2"][0][1] == pytest.approx(440_000 / 2e6, abs=0.005)

    def test_latency_delays_arrival_and_not_the_next_message(self, rig: Rig) -> None:
        """To b1: 10 ms on the wire and 500 ms of latency; to a2: 100 ms on the wire and 1 ms."""
        rig.send("b1", 1, 10_000)
        rig.send("a2", 2, 200_000)
        rig.send("b1", 3, 10_000)
        found = rig.run()
        assert [end for _, end, _ in found["b1"]] == pytest.approx([0.01, 0.02])
        assert rig.inner.noted == [("a2", 2), ("b1", 1), ("b1", 3)]

    def test_what_arrives_is_what_was_sent(self, rig: Rig) -> None:
        rig.send("b1", 5, 10_000)
        rig.send("b1", 6, 0)
        rig.run()
        for tag, size in ((5, 10_000), (6, 0)):
            buffer = torch.zeros(size, dtype=torch.uint8)
            rig.fabric.transport("b1").recv("a1", tag, [buffer]).wait(LONG_S)
            assert torch.equal(buffer, torch.full((size,), tag, dtype=torch.uint8))

    def test_receives_go_straight_through(self, rig: Rig) -> None:
        rig.fabric.transport("b1").send("a1", 9, [torch.ones(3)])
        buffer = torch.zeros(3)
        rig.paced.recv("b1", 9, [buffer]).wait(LONG_S)
        assert torch.equal(buffer, torch.ones(3))

    def test_no_link(self, rig: Rig) -> None:
        with pytest.raises(PeerError, match="the cluster has no link a1 -> alone"):
            rig.send("alone", 1, 1)

    def test_a_message_that_is_still_on_its_way(self, rig: Rig) -> None:
        rig.send("b1", 1, 300_000)
        with pytest.raises(PeerError, match=r"'b1': not sent within 0\.01 s") as caught:
            rig.pending[0].wait(0.01)
        assert caught.value.device == "b1"

    def test_an_error_of_the_network_reaches_whoever_waits(self, rig: Rig) -> None:
        rig.fabric.fail("device 'b1' died")
        rig.send("b1", 1, 100)
        with pytest.raises(PeerError, match="'b1' died"):
            rig.run()
