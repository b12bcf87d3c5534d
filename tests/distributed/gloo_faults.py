"""Messages that gloo gets twice, or never; prints what came of it as JSON.

A process of its own, started by ``test_server_faults.py``: a send that nobody takes stays with gloo, whose
threads would end whoever tries to leave them in an orderly way.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from cases import MLP
from equality import assignment, of
from test_servers import STEPS, Harmed, in_layers, lose
from torch import Tensor

from spanwise.runtime.threads import ThreadSession
from spanwise.runtime.torch_dist import DistTransport
from spanwise.runtime.transport import Pending, Tensors, Transport

LATE_S, UNTAKEN_S = (
    1.5,
    0.5,
)  # a doubled send is given up before anybody misses what its device would send next
KEPT: list[object] = []  # what gloo still holds must not be freed

Values = dict[str, Tensor]


@dataclass
class Both:
    """Two sends of one message."""

    first: Pending
    second: Pending

    def wait(self, timeout_s: float) -> None:
        self.first.wait(timeout_s)
        self.second.wait(UNTAKEN_S)


def twice(inner: Transport) -> Transport:
    """Sends its first message twice."""

    def send(peer: str, tag: int, tensors: Tensors) -> Pending:
        return Both(inner.send(peer, tag, tensors), inner.send(peer, tag, tensors))

    return Harmed(inner, send, 0)


def once_less(inner: Transport) -> Transport:
    """Does not send its first message."""
    return Harmed(inner, lose, 0)


def met(devices: Sequence[str]) -> dict[str, DistTransport]:
    """Transports of a process group whose members are threads of this process."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    with ThreadPoolExecutor(len(devices)) as threads:
        ends = threads.map(lambda device: DistTransport(store, device, devices, timeout_s=10.0), devices)
        found = dict(zip(devices, ends, strict=True))
    KEPT.append(found)
    return found


def run(name: str) -> tuple[dict[str, str], Values]:
    """What each device says at the end of its steps, and the server's parameters."""
    plan = in_layers(as_aggregated=False)
    work = replace(assignment(MLP, of(MLP)[1], plan), job=MLP.job(transfer_timeout_s=LATE_S))
    found: dict[str, Transport] = dict(met(plan.devices))
    what, _, device = name.partition(" by ")
    if device:
        found[device] = {"doubled": twice, "lost": once_less}[what](found[device])
    source = of(MLP)[1]
    tensors = source.parameters | source.buffers
    session = ThreadSession(work, tensors, MLP.data(), wrap=lambda device, _: found[device])
    KEPT.append(session)
    runs = session._runs  # pyright: ignore[reportPrivateUsage]
    with ThreadPoolExecutor(len(runs)) as threads:
        ended = {d: threads.submit(run.run, 0, STEPS, lambda *_: None) for d, run in runs.items()}
        said = {d: str(future.exception() or "") for d, future in ended.items()}
    return said, dict(runs["d"].parameters)


def whole_steps() -> Iterator[Values]:
    """The server's parameters before the first step and after each, in a run without gloo."""
    plan, source = in_layers(as_aggregated=False), of(MLP)[1]
    session = ThreadSession(assignment(MLP, source, plan), source.parameters | source.buffers, MLP.data())
    server = session._runs["d"]  # pyright: ignore[reportPrivateUsage]
    for step in range(STEPS + 1):
        yield {name: value.detach().clone() for name, value in server.parameters.items()}
        if step < STEPS:
            list(session.run(step, 1))
    session.close()


def equal(known: Values, found: Values) -> bool:
    """Bit for bit."""
    return all(torch.equal(known[name], value) for name, value in found.items())


def replayed() -> dict[str, list[float]]:
    """What comes of three messages, the first sent twice: under numbers of their own, or all under one."""
    out: dict[str, list[float]] = {}
    for name, step in (("own", 1), ("shared", 0)):
        ends = met(("a", "b"))
        sent = [(0, 1.0), (0, 9.0), (step, 2.0), (2 * step, 3.0)]
        KEPT.append([ends["a"].send("b", tag, [torch.tensor([value])]) for tag, value in sent])
        out[name] = []
        for number in range(3):
            buffer = torch.zeros(1)
            ends["b"].recv("a", number * step, [buffer]).wait(10.0)
            out[name].append(float(buffer))
    return out


def main(names: Sequence[str]) -> None:
    """Runs all at once."""
    steps = list(whole_steps())
    with ThreadPoolExecutor(len(names)) as threads:
        found = dict(zip(names, threads.map(run, names), strict=True))
    out = {
        name: {"said": said, "steps": [n for n, known in enumerate(steps) if equal(known, values)]}
        for name, (said, values) in found.items()
    }
    print(json.dumps({"replayed": replayed(), "runs": out}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
