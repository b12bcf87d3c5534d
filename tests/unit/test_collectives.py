from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spanwise.core.errors import PeerError
from spanwise.runtime.collectives import exchange_sum, ring_all_reduce, ring_tags
from spanwise.runtime.local import LocalFabric, LocalTransport

TIMEOUT_S = 20.0


def everywhere(members: list[str], work: Callable[[str, LocalTransport], Tensor]) -> dict[str, Tensor]:
    """Runs the work of every member on a thread of its own."""
    fabric, found, errors = LocalFabric(), dict[str, Tensor](), list[BaseException]()

    def run(me: str) -> None:
        try:
            found[me] = work(me, fabric.transport(me))
        except BaseException as error:
            errors.append(error)
            fabric.fail(str(error))

    threads = [threading.Thread(target=run, args=(me,)) for me in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
    assert not errors, errors
    assert not fabric.mail  # nothing was sent that nobody wanted
    return found


@pytest.mark.parametrize("devices", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 8, 16, 17])
def test_a_ring_sums_exactly_and_leaves_the_same_bits_everywhere(devices: int, size: int) -> None:
    members = [f"d{i}" for i in range(devices)]
    generator = torch.Generator().manual_seed(devices * 100 + size)
    whole = {me: torch.randint(-1000, 1000, (size,), generator=generator).float() for me in members}
    rough = {me: torch.randn(size, generator=generator) for me in members}

    def work(me: str, transport: LocalTransport) -> Tensor:
        flats = whole[me].clone(), rough[me].clone()
        for number, flat in enumerate(flats):
            tag = 7 + number * ring_tags(devices)
            ring_all_reduce(transport, members, me, flat, tag=tag, timeout_s=TIMEOUT_S)
        return torch.stack(flats)

    found = everywhere(members, work)
    first = found[members[0]]
    assert torch.equal(first[0], torch.stack(list(whole.values())).sum(0))
    assert torch.allclose(first[1].double(), torch.stack(list(rough.values())).double().sum(0), atol=1e-5)
    assert all(torch.equal(first, other) for other in found.values())


def test_one_member_keeps_its_own() -> None:
    flat = torch.arange(3.0)
    ring_all_reduce(LocalFabric().transport("a"), ["a"], "a", flat, tag=0, timeout_s=1)
    assert torch.equal(flat, torch.arange(3.0))
    assert ring_tags(1) == 0


def test_the_order_of_the_ring_is_that_of_the_members() -> None:
    members = ["c", "a", "b"]

    class Noting(LocalTransport):
        def send(self, peer: str, tag: int, tensors):  # type: ignore[no-untyped-def]
            assert (self.device, peer) in (("c", "a"), ("a", "b"), ("b", "c"))
            return super().send(peer, tag, tensors)

    def work(me: str, transport: LocalTransport) -> Tensor:
        flat = torch.ones(7)
        ring_all_reduce(Noting(transport.fabric, me), members, me, flat, tag=0, timeout_s=TIMEOUT_S)
        return flat

    assert all(torch.equal(flat, torch.full((7,), 3.0)) for flat in everywhere(members, work).values())


@pytest.mark.parametrize("devices", [1, 2, 5])
def test_an_exchange_sums_in_member_order(devices: int) -> None:
    members = [f"d{i}" for i in range(devices)]
    rough = (1e16, 1.0, -1e16, 3.0, 0.5)[:devices]  # whose sum in another order has other bits
    values = {me: torch.tensor([x, 1.0], dtype=torch.float64) for me, x in zip(members, rough, strict=True)}

    def work(me: str, transport: LocalTransport) -> Tensor:
        return exchange_sum(transport, members, me, values[me], tag=3, timeout_s=TIMEOUT_S)

    expected = torch.zeros(2, dtype=torch.float64)
    for me in members:
        expected += values[me]
    assert all(torch.equal(total, expected) for total in everywhere(members, work).values())


def test_a_peer_that_is_silent_is_an_error() -> None:
    fabric = LocalFabric()
    with pytest.raises(PeerError, match=r"'b': nothing within 0\.01 s") as caught:
        ring_all_reduce(fabric.transport("a"), ["a", "b"], "a", torch.ones(4), tag=0, timeout_s=0.01)
    assert caught.value.device == "b"
