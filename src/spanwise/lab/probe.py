"""What ``lab check`` runs inside devices: round trips, transfers, compute and memory. Standard library only.

Run as ``python -m spanwise.lab.probe WHAT ...``; each prints one line of JSON.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence

_PINGS = 21
_PIECE = 1 << 16
_TIMEOUT_S = 60.0


def serve(address: str) -> None:
    """Echoes single bytes and swallows transfers, one connection after the other, until it is ended."""
    with socket.create_server((address, 0)) as server:
        print(json.dumps({"port": server.getsockname()[1]}), flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(_TIMEOUT_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _answer(connection)


def _answer(connection: socket.socket) -> None:
    buffer = bytearray(_PIECE)
    while count := connection.recv_into(buffer):
        if count == 1:
            connection.sendall(b"!")


def round_trip_s(address: str, port: int) -> float:
    """Median of some round trips of one byte."""
    seconds: list[float] = []
    with _connect(address, port) as connection:
        for _ in range(_PINGS):
            start = time.monotonic()
            connection.sendall(b"?")
            connection.recv(1)
            seconds.append(time.monotonic() - start)
    return sorted(seconds)[_PINGS // 2]


def rate_bytes_per_s(address: str, port: int, seconds: float) -> float:
    """Bytes per second that a connection takes, after the first quarter in which it gains speed."""
    piece = bytes(_PIECE - 1)  # never one byte, which would be answered
    with _connect(address, port) as connection:
        start = time.monotonic()
        sent, marks = 0, [(start, 0)]
        while (now := time.monotonic()) < start + seconds:
            sent += connection.send(piece)
            marks.append((now, sent))
    first = next(mark for mark in marks if mark[0] >= start + seconds / 4)
    last = marks[-1]
    return (last[1] - first[1]) / (last[0] - first[0])


def _connect(address: str, port: int) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A small buffer: what the kernel has taken but not sent must not count for much.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    return connection


def work_per_s(seconds: float) -> float:
    """Rounds of arithmetic per second of wall time."""
    rounds, value = 0, 1
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        for _ in range(2000):
            value = (value * 1103515245 + 12345) % 2147483648
        rounds += 1
    return rounds / (time.monotonic() - start)


def fill(nbytes: int) -> int:
    """Takes memory page by page; returns how much it got, if it lives to."""
    held: list[bytearray] = []
    step = 4 * 2**20
    for _ in range(0, nbytes, step):
        held.append(bytearray(step))
        held[-1][:] = b"\1" * step
    return len(held) * step


def main(argv: Sequence[str]) -> None:
    """Runs one probe."""
    match argv:
        case ["serve", address]:
            serve(address)
        case ["rtt", address, port]:
            print(json.dumps({"rtt_s": round_trip_s(address, int(port))}))
        case ["rate", address, port, seconds]:
            print(json.dumps({"bytes_per_s": rate_bytes_per_s(address, int(port), float(seconds))}))
        case ["work", seconds]:
            print(json.dumps({"work_per_s": work_per_s(float(seconds))}))
        case ["fill", nbytes]:
            print(json.dumps({"bytes": fill(int(nbytes))}))
        case _:
            raise SystemExit(
                "serve ADDRESS | rtt ADDRESS PORT | rate ADDRESS PORT SECONDS | work SECONDS | fill N"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
