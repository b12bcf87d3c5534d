"""Pipes of the relay: order, rate, sharing, and what does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.lab.metering import LEAST_QUEUE_BYTES, Pipe, departure, queue_bytes


def test_a_packet_takes_its_bytes_over_the_rate() -> None:
    pipe = Pipe(1000.0)
    assert departure([pipe], 500, 10.0) == pytest.approx(10.5)
    assert departure([pipe], 500, 10.0) == pytest.approx(11.0)  # waits for the first
    assert departure([pipe], 500, 20.0) == pytest.approx(20.5)  # the pipe was idle since
    assert pipe.sent_bytes == 1500


def test_a_chain_takes_as_long_as_its_slowest_pipe() -> None:
    fast, slow = Pipe(1e6), Pipe(1e3)
    assert departure([fast, slow], 100, 0.0) == pytest.approx(0.1)
    assert fast.free_at_s == pytest.approx(1e-4)


def test_what_does_not_fit_the_queue_is_dropped_and_takes_no_time() -> None:
    pipe = Pipe(1000.0, queue_bytes=1000)
    assert departure([pipe], 800, 0.0) is not None
    assert departure([pipe], 800, 0.0) is not None  # 800 bytes wait: room
    before = pipe.free_at_s
    assert departure([pipe], 800, 0.0) is None
    assert (pipe.free_at_s, pipe.dropped) == (before, 1)


def test_a_queue_holds_two_of_the_largest_packets_and_a_round_trip() -> None:
    assert queue_bytes(1000.0, 0.0) == LEAST_QUEUE_BYTES >= 2 * 65535
    assert queue_bytes(12.5e6, 0.02) >= 12.5e6 * 0.04


@given(st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 65535)), min_size=1, max_size=60))
def test_no_more_than_the_rate_leaves_and_order_is_kept(packets: list[tuple[float, int]]) -> None:
    pipe, now, last = Pipe(1e6, queue_bytes=1e12), 0.0, 0.0
    begin, total = packets[0][0], 0
    for gap, nbytes in packets:
        now += gap
        at = departure([pipe], nbytes, now)
        assert at is not None
        assert at >= last
        last, total = at, total + nbytes
    assert last - begin >= total / 1e6 - 1e-9
