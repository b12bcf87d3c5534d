"""``decouple``: sub-models as runs of their own, on threads and processes, and devices that never return."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import spanwise
from spanwise.api.decoupled import parse_negatives, parse_owners, parse_shares
from spanwise.cli import app
from spanwise.core.cluster import Cluster
from spanwise.core.decoupling import Decoupling, Negatives
from spanwise.core.errors import InfeasibleError, InputError
from spanwise.core.job import Job
from spanwise.decoupler.build import sub_model
from spanwise.decoupler.local import Fit, loss_of
from spanwise.decoupler.rows import group_rows
from spanwise.decoupler.walk import walk

CLUSTER = Cluster.parse(
    {
        "name": "three", "emulation": {"core_share": 1.0},
        "devices": [
            {"id": "hub", "site": "room", "speed": 1.0}, {"id": "a", "site": "hall", "speed": 0.5},
            {"id": "b", "site": "hall", "speed": 0.25},
        ],
        "links": [
            {"between": ["room", "hall"], "bandwidth": "1 MB/s", "latency": "10 ms"},
            {"between": ["hall", "hall"], "bandwidth": "10 MB/s"},
        ],
    }
)  # fmt: skip
JOB = Job.parse(
    {"model": "live", "data": "live", "batch": 16, "epochs": 2, "optimizer": {"name": "SGD", "lr": 0.05}}
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
        nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 6),
    )  # fmt: skip


def data(rows: int = 96) -> TensorDataset:
    """Six classes, each a pixel that is bright, in noise."""
    y = torch.arange(rows) % 6
    x = 0.3 * torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x[torch.arange(rows), 0, y, y] += 4.0
    return TensorDataset(x, y)


def run(tmp_path, **options):
    given = {"model": model(), "data": data(), "test": data(60), "backend": "threads", **options}
    return spanwise.decouple(JOB, CLUSTER, run=tmp_path / "run", **given)


def test_every_sub_model_is_a_run_and_equals_the_plain_loop(tmp_path):
    found = run(tmp_path, groups={"a": (4, 1), "b": (0, 3), "hub": (2, 5)})
    summary = found.summary
    target = walk(model(), data().tensors[0][:2])
    for returned in found.returned:
        plain = sub_model(target, found.decoupling, returned.group)
        rows = group_rows(data(), found.decoupling, returned.group)
        Fit(plain, loss_of("softmax"), rows, JOB).run()
        assert all(torch.allclose(returned.state[k], v, atol=1e-5) for k, v in plain.state_dict().items())
    assert [g.device for g in found.decoupling.groups] == ["a", "b", "hub"]
    shares = [g.share for g in found.decoupling.groups]
    assert shares == pytest.approx([2**0.5 / (2**0.5 + 1 + 2), 1 / (2**0.5 + 1 + 2), 2 / (2**0.5 + 1 + 2)])
    assert summary["missing_classes"] == []
    assert summary["form"] == "branches"
    for device in summary["devices"].values():  # predicted: its own steps, then its weights over the links
        assert device["predicted_arrival_s"] >= device["predicted_s"] > 0
    a, b = summary["devices"]["a"], summary["devices"]["b"]
    assert a["predicted_arrival_s"] >= a["predicted_s"] + a["sent_bytes"] / 1e6 + 0.01
    assert summary["predicted"]["seconds"] >= max(a["predicted_arrival_s"], b["predicted_arrival_s"])
    folder = tmp_path / "run"
    assert Decoupling.load(folder / "decoupling.json") == found.decoupling
    assert json.loads((folder / "summary.json").read_text())["accuracy"] == summary["accuracy"]
    whole = model()
    whole.load_state_dict(load_file(folder / "weights.safetensors"))
    x = data(60).tensors[0]
    with torch.no_grad():
        assert torch.allclose(whole.eval()(x), found.merged.module(x), atol=1e-5)
    program = (folder / "sub-0" / "program.txt").read_text()
    assert "send" not in program
    assert "reduce" not in program


def test_a_device_that_never_returns_costs_its_classes(tmp_path):
    broken = data()
    broken.tensors[0][broken.tensors[1] == 3] = float("nan")
    found = run(tmp_path, groups=[(4, 1), (0, 3), (2, 5)], data=broken, negatives=Negatives(policy="none"))
    assert found.merged.missing == (0, 3)
    assert found.summary["missing_classes"] == [0, 3]
    assert "loss is nan" in found.summary["devices"]["a"]["lost"]
    assert found.summary["devices"]["hub"]["lost"] == ""
    scores = found.merged.module(data(12).tensors[0])
    assert torch.isinf(scores[:, [0, 3]]).all()
    assert torch.isfinite(scores[:, [1, 2, 4, 5]]).all()


def test_frozen_first_layers_stay_as_they_are_and_are_not_sent(tmp_path):
    found = run(tmp_path, groups=[(4, 1, 0), (3, 2, 5)], shared=1, form="dense")
    assert torch.equal(found.merged.module.state_dict()["0.weight"], model()[0].weight)
    assert [r.sent_bytes for r in found.returned] == [
        sum(v.numel() * 4 for k, v in r.state.items() if not k.startswith("0.")) for r in found.returned
    ]
    assert found.summary["missing_classes"] == []


def test_worker_processes_one_killed(tmp_path, monkeypatch):
    """At the same time; the worker of one device is killed as soon as it holds its sub-model."""
    from spanwise.api.run import _Run

    session = _Run._session

    def session_then_death(self, assignment, snapshot):
        found = session(self, assignment, snapshot)
        if self.pool.devices == ("a",):
            os.kill(self.pool.process_ids["a"], signal.SIGKILL)
        return found

    monkeypatch.setattr(_Run, "_session", session_then_death)
    found = run(tmp_path, groups=2, backend="processes", at_once=True)
    assert found.merged.missing == (3, 4, 5)
    devices = found.summary["devices"]
    assert "a" in devices["a"]["lost"]
    assert devices["a"]["measured_s"] is None
    assert devices["hub"]["measured_s"] > 0


def test_what_cannot_be_is_refused_before_training(tmp_path):
    for options, message in (
        ({"groups": 4}, "4 groups for the 3 devices of 'three'"),
        ({"groups": {"a": (0, 1, 2), "b": (2, 3, 4, 5)}}, "class 2 is in sub-models 0 and 1"),
        ({"groups": {"a": (0, 1, 2), "c": (3, 4, 5)}}, "unknown device 'c'"),
        ({"shared": 1, "sharing": "averaged"}, "averaged first layers need rounds"),
        ({"groups": 6}, "6 groups for the 3 devices"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path, **options)
    secret = JOB.model_copy(update={"private": True})
    with pytest.raises(InputError, match=r"negatives 'all' means that every sample goes to every device"):
        spanwise.decouple(secret, CLUSTER, run=tmp_path / "run", model=model(), data=data())
    small = Cluster.parse(
        {"name": "small", "devices": [{"id": "a", "memory": "1 kB"}, {"id": "b", "memory": "1 kB"}]}
    )
    with pytest.raises(InfeasibleError, match="memory for"):
        spanwise.decouple(JOB, small, run=tmp_path / "run", model=model(), data=data())
    apart = Cluster.parse({"name": "apart", "devices": [{"id": "a"}, {"id": "b", "site": "far"}]})
    with pytest.raises(InputError, match="no link from 'b'"):
        spanwise.decouple(JOB, apart, run=tmp_path / "run", model=model(), data=data())
    squares = JOB.model_copy(update={"loss": "mse"})
    with pytest.raises(InputError, match="only classifications"):
        spanwise.decouple(squares, CLUSTER, run=tmp_path / "run", model=model(), data=data())


def test_command_line(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(
        'batch = 32\nsteps = 2\nmodel = {name = "spanwise.zoo:mlp", sizes = [8, 12, 6]}\n'
        'data = {name = "spanwise.zoo.data:synthetic_vectors", rows = 120, features = 8, classes = 6}\n'
    )
    clusters = tmp_path / "cluster.toml"
    CLUSTER.save(clusters)
    given = [str(job), "--cluster", str(clusters), "--run", str(tmp_path / "run"), "--cache", str(tmp_path)]
    with pytest.raises(InputError, match="negatives 'some': must be none, all, or pool:SAMPLES"):
        app(["decouple", *given, "--negatives", "some"], standalone_mode=False)
    with pytest.raises(InputError, match="owner 'a=x': write each device once"):
        app(["decouple", *given, "--owner", "a=x"], standalone_mode=False)
    with pytest.raises(InputError, match="shares '1;2': must be speed, equal, or numbers"):
        app(["decouple", *given, "--shares", "1;2"], standalone_mode=False)
    assert parse_negatives("pool:7") == Negatives(policy="pool", per_class=7)
    assert parse_owners(["a=0,3", "b=1,2"]) == {"a": (0, 3), "b": (1, 2)}
    assert parse_shares("0.5,0.3,0.2") == (0.5, 0.3, 0.2)
    with pytest.raises(InputError, match="class 5"):
        app(["decouple", *given, "--owner", "a=0,1,2", "--owner", "b=3,4"], standalone_mode=False)
