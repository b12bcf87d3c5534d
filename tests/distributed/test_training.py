"""Training like people expect: resume under another plan, checkpoints, NaN, the model's own names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cases import MLP
from equality import DEVICES, cluster
from torch import nn
from torch.utils.data import TensorDataset

import spanwise
from spanwise import api
from spanwise.api.prepare import prepare_live
from spanwise.api.run import Outcome, TrainOptions, run_job
from spanwise.core.cluster import Cluster
from spanwise.core.errors import CheckpointError, InputError, PlanError, TrainingError
from spanwise.core.job import Job
from spanwise.core.profile import DeviceTimes, Profile
from spanwise.profiler.scale import analytic_table
from spanwise.zoo import mlp, mobilenet_v2
from spanwise.zoo.data import synthetic_images, synthetic_vectors


def job(**changes: Any) -> Job:
    return Job.parse(
        {
            "model": {"name": "spanwise.zoo:mlp", "sizes": [8, 16, 16, 4]},
            "data": {"name": "spanwise.zoo.data:synthetic_vectors", "rows": 96, "features": 8, "classes": 4},
            "batch": 12, "steps": 8, "dtype": "float64", "checkpoint_every": 4,
            "optimizer": {"name": "AdamW", "lr": 0.01},
            "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 0.5},
            "scheduler_every": "step", "clip_norm": 1.0,
            **changes,
        }
    )  # fmt: skip


def run(task: Job, folder: Path, machines: Cluster | None = None, **options: Any) -> Outcome:
    options.setdefault("strategy", "pipeline")
    return run_job(task, machines or cluster(("a",)), TrainOptions(run=folder, backend="threads", **options))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "weights.safetensors")


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(a[k], b[k], rtol=1e-10, atol=1e-12) for k in a) and a.keys() == b.keys()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run that nothing disturbs."""
    return run(job(), tmp_path_factory.mktemp("whole") / "r")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run that ends at the half of it; to be read only."""
    return run(job(steps=4), tmp_path_factory.mktemp("half") / "r").folder.path


@pytest.fixture
def spoilt(whole: Outcome, tmp_path: Path) -> Path:
    """A copy of the whole run's folder, to do harm to."""
    return shutil.copytree(whole.folder.path, tmp_path / "spoilt")


def test_run_folder_is_complete_and_weights_load_into_the_original_model(whole: Outcome) -> None:
    outcome, folder = whole, whole.folder.path
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "job.json", "cluster.json", "graph.json", "ops.json", "profile.json", "plan.json", "program.txt",
        "timelines", "metrics.jsonl", "summary.json", "weights.safetensors", "report.html",
        "trace.json", "env.json",
    }  # fmt: skip
    fresh = mlp(sizes=(8, 16, 16, 4)).double()
    fresh.load_state_dict(weights(folder), strict=True)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(fresh.eval()(x), outcome.model.eval()(x))
    steps = [m for m in outcome.folder.read_metrics() if m["event"] == "step"]
    assert [m["step"] for m in steps] == list(range(8))
    assert outcome.summary["accuracy"] is not None
    assert outcome.summary["predicted"]["step_time_s"] > 0


@pytest.mark.parametrize("other", ["single", "data_parallel", "hpp"])
def test_resume_under_another_plan_gives_the_same_parameters(
    whole: Outcome, half: Path, tmp_path: Path, other: str
) -> None:
    run(job(), tmp_path / "rest", resume=half, strategy=other)
    assert close(weights(tmp_path / "rest"), weights(whole.folder.path))


def test_resume_on_another_cluster(whole: Outcome, half: Path, tmp_path: Path) -> None:
    smaller = Cluster.parse({"name": "one", "devices": [{"id": "a"}], "data": ["a"]})
    run(job(), tmp_path / "rest", smaller, resume=half, strategy="single")
    assert close(weights(tmp_path / "rest"), weights(whole.folder.path))


def test_without_the_optimizer_state_resume_would_differ(whole: Outcome, half: Path, tmp_path: Path) -> None:
    """Negative control: starting anew from the checkpoint's weights alone is another run."""
    shutil.copytree(half, tmp_path / "half")
    manifest = next((tmp_path / "half" / "checkpoints").iterdir()) / "manifest.json"
    data = json.loads(manifest.read_text())
    empty = safetensors.torch.save({})
    (manifest.parent / "optimizer.safetensors").write_bytes(empty)
    import hashlib

    data["sha256"]["optimizer.safetensors"] = hashlib.sha256(empty).hexdigest()
    manifest.write_text(json.dumps(data))
    run(job(), tmp_path / "rest", resume=tmp_path / "half")
    assert not close(weights(tmp_path / "rest"), weights(whole.folder.path))


def test_same_seed_same_weights(tmp_path: Path) -> None:
    first, second, other = (run(job(seed=s), tmp_path / str(i)) for i, s in enumerate((1, 1, 2)))
    assert close(weights(first.folder.path), weights(second.folder.path))
    assert not close(weights(first.folder.path), weights(other.folder.path))


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    task = job(
        model={"name": "spanwise.zoo:mlp", "sizes": [8, 16, 16, 4], "activation": "relu"}, clip_norm=None,
        optimizer={"name": "SGD", "lr": 1e120}, scheduler=None, checkpoint_every=1, steps=8,
    )  # fmt: skip
    with pytest.raises(
        TrainingError, match=r"loss is (nan|inf) at step \d+; the last good checkpoint is kept"
    ):
        run(task, tmp_path / "r")
    kept = sorted((tmp_path / "r" / "checkpoints").iterdir())
    assert kept
    assert not (tmp_path / "r" / "weights.safetensors").exists()


def test_corrupt_checkpoint_is_refused(spoilt: Path, tmp_path: Path) -> None:
    newest = sorted((spoilt / "checkpoints").iterdir())[-1]
    file = newest / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: is corrupt \(SHA-256 .*remove step-00000008"
    ):
        run(job(), tmp_path / "again", resume=spoilt)


def test_resume_with_another_model_is_refused(half: Path, tmp_path: Path) -> None:
    wider = job(model={"name": "spanwise.zoo:mlp", "sizes": [8, 20, 16, 4]})
    with pytest.raises(CheckpointError, match=r"belongs to model .*, this job's model is"):
        run(wider, tmp_path / "again", resume=half)


def test_resume_without_a_checkpoint(spoilt: Path, tmp_path: Path) -> None:
    for folder in (spoilt / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: is missing"):
        run(job(), tmp_path / "again", resume=spoilt)
    with pytest.raises(InputError, match="holds no run"):
        run(job(), tmp_path / "again", resume=tmp_path / "nowhere")


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    run(job(checkpoint_every=1), tmp_path / "r")
    assert sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir()) == [
        "step-00000007",
        "step-00000008",
    ]


def test_data_shorter_than_a_batch(tmp_path: Path) -> None:
    short = job(data={"name": "spanwise.zoo.data:synthetic_vectors", "rows": 10, "features": 8, "classes": 4})
    with pytest.raises(InputError, match="the training set has 10 rows, fewer than one batch of 12"):
        run(short, tmp_path / "r")


def test_running_statistics_are_averaged_over_replicas(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mobilenet_v2(num_classes=5, width=0.25)
    train, test = synthetic_images(rows=48, shape=(3, 8, 8), classes=5, seed=0)
    task = Job.parse({"model": "live", "data": "live", "loss": "live", "batch": 24, "steps": 2})
    prepared = prepare_live(task, model, nn.CrossEntropyLoss(), train, test)
    graph = prepared.traced.graph
    times = Profile(
        graph_digest=graph.digest, tables=(analytic_table(graph, 1e9),),
        devices=tuple(DeviceTimes(device=d) for d in DEVICES),
    )  # fmt: skip
    options = {"prepared": prepared, "times": times, "strategy": "data_parallel"}
    outcome = run(prepared.job, tmp_path / "r", **options)
    state = weights(outcome.folder.path)
    assert state.keys() == model.state_dict().keys()
    counts = [v for k, v in state.items() if k.endswith("num_batches_tracked")]
    assert all(int(v) == 2 * outcome.plan.micro_batches for v in counts)
    assert all(bool(torch.isfinite(v).all()) for v in state.values())


def test_trainer_with_live_objects_on_worker_processes(tmp_path: Path) -> None:
    """The eight-line example: a live module, a data set, a cluster."""
    torch.manual_seed(0)
    model = mlp(sizes=(8, 16, 4))
    train, test = synthetic_vectors(rows=240, features=8, classes=4, seed=0)
    two = [{"id": d, "site": "lab"} for d in ("a", "b")]
    machines = {**cluster(("a", "b")).to_data(), "devices": two, "emulation": {"core_share": 0.5}}
    trainer = spanwise.Trainer(
        model, nn.CrossEntropyLoss(), cluster=Cluster.parse(machines), strategy="data_parallel",
        run=tmp_path / "r", batch=24, epochs=2, optimizer={"name": "SGD", "lr": 0.1},
    )  # fmt: skip
    outcome = trainer.fit(train, test)
    assert outcome.model is model
    assert outcome.summary["accuracy"] is not None
    assert set(outcome.plan.devices) == {"a", "b"}
    assert outcome.measured.device("b").peak_memory_bytes >= 0


def test_plan_without_training() -> None:
    torch.manual_seed(0)
    train = TensorDataset(torch.randn(48, 8), torch.randint(0, 4, (48,)))
    trainer = spanwise.Trainer(
        mlp(sizes=(8, 16, 4)), nn.CrossEntropyLoss(), cluster=cluster(("a",)), batch=24
    )
    plan, evaluations = trainer.plan(train)
    assert plan.batch == 24
    assert {e.strategy for e in evaluations} >= {"single", "data_parallel", "gpipe", "pipeline", "hpp"}


def test_api_verbs_agree(tmp_path: Path) -> None:
    task = job(batch=12)
    machines = cluster(("a",))
    graph, times = api.profile(task, machines, cache=tmp_path)
    again, times_again = api.profile(task, machines, cache=tmp_path)
    assert (graph, times) == (again, times_again)
    plan, _ = api.plan(task, machines, strategy="gpipe", cache=tmp_path)
    timeline = api.simulate(plan, graph, times, machines, job=task)
    assert timeline.step_time_s > 0
    assert MLP.batch == 12


def test_a_plan_from_elsewhere_must_keep_the_rules(tmp_path: Path) -> None:
    """A plan made without ``private`` is refused by a private job."""
    machines = cluster(("a", "b"))
    free = job()
    plan, _ = api.plan(free, machines, strategy="single")
    with pytest.raises(PlanError, match=r"raw data on a and b must not leave; plan again"):
        run(job(private=True), tmp_path / "r", machines, plan=plan)


def test_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    """A shorter run into the same folder must not take the longer one's checkpoints for its own."""
    run(job(), tmp_path / "r")
    run(job(steps=2), tmp_path / "r")
    assert (tmp_path / "r.1" / "summary.json").is_file()
    kept = [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()]
    assert kept == ["step-00000002"]


def test_devices_elsewhere_need_an_endpoint(tmp_path: Path) -> None:
    placed = Cluster.parse({"name": "far", "devices": [{"id": "pi", "address": "192.0.2.7"}], "data": ["pi"]})
    with pytest.raises(InputError, match=r"device 'pi' has an address.*--listen HOST:PORT"):
        run_job(job(), placed, TrainOptions(run=tmp_path / "r"))
