"""The systems that the benchmarks compare with are run correctly: they compute what plain PyTorch does."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "peers"))

from engines import Run, micro_batches, pipeline_ranks
from fleet import Answer, Fleet, FleetError, failure, step_s
from fleet import plain as start
from models import RECIPES, batches, cut, even, loss_of, make, units

from spanwise.core.job import Job

STEPS = 3
TOLERANCE = 1e-5
DEVICES = ("a", "b", "c")

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(DEVICES, hello_timeout_s=90) as found:
        yield found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def order(peer: str, ranks: str = "ab", **more: Any) -> dict[str, Any]:
    return {
        "peer": peer, "model": "gpt", "batch": 4, "ranks": [*ranks], "address": "127.0.0.1",
        "port": free_port(), "interface": "lo", "steps": STEPS - 1, "warmup": 1, "timeout_s": 30, **more,
    }  # fmt: skip


@functools.cache
def plain(model: str, batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters by unit before and after the steps, in plain PyTorch on the whole batch."""
    module = make(model)

    def state() -> dict[str, Tensor]:
        named = ((i, *np) for i, unit in enumerate(units(module)) for np in unit.named_parameters())
        return {f"{i}.{name}": p.detach().clone() for i, name, p in named}

    before = state()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for x, y in batches(model, batch, STEPS):
        optimizer.zero_grad()
        loss_of(model)(module(x), y).backward()
        optimizer.step()
    return before, state()


def trained(fleet: Fleet, folder: Path, command: dict[str, Any]) -> tuple[list[Answer], dict[str, Tensor]]:
    """The answers, and the parameters of all ranks; where several have one, it must be the same."""
    answers = fleet.run({**command, "save": str(folder / "{rank}.safetensors")}, deadline_s=60)
    assert failure(answers) is None
    found: dict[str, Tensor] = {}
    for rank in range(len(answers)):
        for name, value in safetensors.torch.load_file(folder / f"{rank}.safetensors").items():
            assert torch.equal(found.setdefault(name, value), value), name
    return answers, found


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", RECIPES)
def test_units_in_sequence_are_the_model(name: str) -> None:
    x, _ = batches(name, 4, 1)[0]
    whole, apart = make(name), units(make(name))
    assert len(apart) == RECIPES[name].units
    assert torch.equal(whole(x), nn.Sequential(*apart)(x))
    owned = [id(p) for unit in units(whole) for p in unit.parameters()]
    assert sorted(owned) == sorted(id(p) for p in whole.parameters())


def test_recipes_are_tables_of_jobs() -> None:
    for recipe in RECIPES.values():
        job = Job.parse(
            {**recipe.tables(), "batch": 32, "steps": 1, "optimizer": {"name": "SGD", "lr": 0.01}}
        )
        assert job.loss == recipe.loss


def test_cuts_and_shares_are_even() -> None:
    assert [len(part) for part in cut(20, 7)] == [3, 3, 3, 3, 3, 3, 2]
    assert [i for part in cut(20, 7) for i in part] == list(range(20))
    assert even(32, 7) == [5, 5, 5, 5, 4, 4, 4]
    with pytest.raises(ValueError, match="9 parts of 8 units"):
        cut(8, 9)
    assert pipeline_ranks("gpt", [*"abcdefghij"]) == [*"abcdefgh"]


@pytest.mark.parametrize(
    ("peer", "batch", "stages", "expected"),
    [("gpipe", 32, 7, 8), ("1f1b", 128, 7, 8), ("1f1b", 32, 10, 16), ("gpipe", 4, 2, 4), ("gpipe", 36, 2, 9)],
)
def test_micro_batches_divide_the_batch(peer: str, batch: int, stages: int, expected: int) -> None:
    ranks = tuple(str(i) for i in range(stages))
    run = Run(peer, "vgg11", batch, ranks, "0", 0, "127.0.0.1", 1, "lo", steps=1)
    assert micro_batches(run) == expected


CASES = {
    "single": order("single", "a"),
    "ddp": order("ddp"),
    "ddp-uneven": order("ddp", "abc"),
    "ddp-rows": order("ddp", options={"rows": [3, 1]}),
    "ddp-vgg": order("ddp", model="vgg11"),
    "fsdp2": order("fsdp2"),
    "fsdp2-uneven-few-groups": order("fsdp2", "abc", options={"groups": 2, "reshard_after_forward": False}),
    "fsdp2-vgg": order("fsdp2", model="vgg11"),
    "gpipe": order("gpipe", options={"micro_batches": 2}),
    "1f1b": order("1f1b", "abc"),
    "1f1b-vgg": order("1f1b", model="vgg11"),
    "cloud-one": order("cloud_only", "abc", data_devices=["b", "c"]),
    "cloud-two": order("cloud_only", "abc", data_devices=["c"]),
    "cloud-two-uneven": order("cloud_only", "bca", data_devices=["c"], batch=5),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", CASES)
def test_peer_computes_what_plain_pytorch_does(name: str, fleet: Fleet, tmp_path: Path) -> None:
    command = {**CASES[name], "port": free_port()}
    answers, found = trained(fleet, tmp_path, command)
    before, after = plain(command["model"], command["batch"])
    assert furthest(found, after) < TOLERANCE
    assert furthest(before, after) > 10 * TOLERANCE  # else any result would do
    assert len(step_s(answers)) == STEPS - 1
    assert [answer["device"] for answer in answers] == command["ranks"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("peer", ["ddp", "fsdp2", "gpipe", "1f1b", "cloud_only"])
def test_batch_normalisation_runs(peer: str, fleet: Fleet) -> None:
    more = {"data_devices": ["b"]} if peer == "cloud_only" else {}
    assert failure(fleet.run(order(peer, model="mobilenet_v2", **more), deadline_s=50)) is None


@pytest.mark.timeout(60)
def test_parameters_are_counted_where_they_are_held(fleet: Fleet) -> None:
    whole = sum(p.nbytes for p in make("gpt").parameters())
    held = {
        peer: [a["parameters_bytes"] for a in fleet.run(order(peer), deadline_s=50)]
        for peer in ("ddp", "fsdp2", "gpipe")
    }
    assert held["ddp"] == [whole, whole]
    assert sum(held["fsdp2"]) == sum(held["gpipe"]) == whole
    assert max(held["fsdp2"]) < 0.6 * whole


@pytest.mark.timeout(60)
def test_a_wrong_command_is_answered_and_the_next_one_runs(fleet: Fleet) -> None:
    restarts = fleet.restarts
    assert "unknown peer 'nothing'" in (failure(fleet.run(order("nothing"), deadline_s=40)) or "")
    too_few = order("1f1b", "abc", options={"micro_batches": 2})
    assert "must be greater than" in (failure(fleet.run(too_few, deadline_s=40)) or "")
    assert failure(fleet.run(order("ddp"), deadline_s=40)) is None
    assert fleet.restarts == restarts


@pytest.mark.timeout(90)
def test_a_killed_process_is_reported_and_the_fleet_starts_again(fleet: Fleet) -> None:
    restarts = fleet.restarts
    killer = threading.Timer(2, os.kill, (fleet.pid("b"), signal.SIGKILL))
    killer.start()
    answers = fleet.run(order("ddp", steps=10_000), deadline_s=40)
    killer.join()
    assert "error" in answers[0]
    assert answers[1]["error"] == "device 'b': its process ended with status -9"
    assert fleet.restarts == restarts + 1
    assert failure(fleet.run(order("ddp"), deadline_s=40)) is None


@pytest.mark.timeout(60)
def test_an_endless_run_is_ended_at_its_deadline() -> None:
    with Fleet(["c"], peers=["single"], hello_timeout_s=25) as fleet:
        answers = fleet.run(order("single", "c", steps=100_000), deadline_s=1)
        assert answers == [{"error": "device 'c': no answer within 1 s"}]
        assert fleet.restarts == 1
        assert [*fleet.versions] == ["c"]


@pytest.mark.timeout(30)
def test_a_process_that_says_no_hello_is_named() -> None:
    with pytest.raises(FleetError, match=r"device 'd' said no hello: .*ended with status 3"):
        Fleet(["d"], lambda device, argv, env: start(device, [argv[0], "-c", "raise SystemExit(3)"], env))
