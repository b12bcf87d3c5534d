"""The public verbs: thin, and the only place where profiler, planner, simulator, runtime and report meet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spanwise.core.cluster import Cluster
from spanwise.core.defaults import default_cluster
from spanwise.core.job import LIVE, Job, Recipe
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.core.run_folder import RunFolder
from spanwise.core.timeline import Timeline

if TYPE_CHECKING:
    from torch import nn

    from spanwise.api.decoupled import Decoupled
    from spanwise.api.prepare import Prepared
    from spanwise.api.run import Outcome, Watcher
    from spanwise.core.faults import Fault
    from spanwise.core.importance import Importance
    from spanwise.planner import Evaluation


def load_job(path: Path | str, overrides: tuple[str, ...] = ()) -> Job:
    """A job from TOML or JSON; ``overrides`` are ``key=value`` with TOML values, dots for nested keys."""
    from spanwise.api.overrides import apply

    return apply(Path(path), overrides)


def load_cluster(path: Path | str | None = None) -> Cluster:
    """A cluster from TOML or JSON; the embedded three-tier example without a path."""
    return default_cluster() if path is None else Cluster.load(Path(path))


def profile(job: Job, cluster: Cluster, *, cache: Path | None = None) -> tuple[ModelGraph, Profile]:
    """Layers of the model and their times on every device; measured once, then read from ``cache``.

    For an emulated cluster the layers are timed on this machine and scaled by speed and core share.

    Raises:
        ExportError: the model cannot be traced; names the op and what to do.
    """
    from spanwise.api.times import graph_and_profile

    return graph_and_profile(job, cluster, cache)


def plan(
    job: Job, cluster: Cluster, *, strategy: str = "auto", cache: Path | None = None
) -> tuple[Plan, tuple[Evaluation, ...]]:
    """The plan of one strategy, and what every strategy that was tried is predicted to give.

    Raises:
        InfeasibleError: no plan fits memory or data constraints; says by how much and where.
    """
    from spanwise.api.planning import choose

    graph, times = profile(job, cluster, cache=cache)
    graph, importance = scored(job, graph, strategy)
    return choose(job, cluster, graph, times, strategy, importance)


def scored(job: Job, graph: ModelGraph, strategy: str) -> tuple[ModelGraph, Importance | None]:
    """Scores of the parameters, if the strategy chooses what each device trains, and the whole graph.

    A probe on this machine; other strategies need none, and their graph is returned as it is.
    """
    from spanwise.api.scores import needs_scores

    if not needs_scores(strategy):
        return graph, None
    from spanwise.api.prepare import prepare
    from spanwise.api.scores import scores

    prepared = prepare(job)
    return prepared.traced.graph, scores(prepared, strategy)


def simulate(
    chosen: Plan, graph: ModelGraph, times: Profile, cluster: Cluster, *,
    job: Job, steps: int = 3, faults: tuple[Fault, ...] = (),
) -> Timeline:  # fmt: skip
    """The predicted Timeline of a plan, also for machines that one does not have."""
    from spanwise.api.planning import predict

    return predict(chosen, graph, times, cluster, job, steps=steps, faults=faults)


def replan(
    running: Plan, graph: ModelGraph, times: Profile, cluster: Cluster, *, job: Job, strategy: str = "hpp"
) -> Plan:
    """The plan to go over to where devices and links are now as ``times`` and ``cluster`` say.

    Raises:
        InfeasibleError: neither the running plan nor any change of it can run there.
    """
    from spanwise.planner.adapting.replan import replan as find

    return find(running, graph, times, cluster, job, strategy=strategy)


def train(
    job: Job,
    cluster: Cluster | None = None,
    *,
    run: Path | str = "runs/latest",
    strategy: str = "auto",
    resume: Path | str | None = None,
    cache: Path | None = None,
    chosen: Plan | None = None,
    watcher: Watcher | None = None,
    **options: Any,
) -> Outcome:
    """Profiles, plans, predicts, trains and writes the run folder.

    Args:
        job: what to train.
        cluster: on what; the embedded example by default.
        run: the run folder to write.
        strategy: who plans; ``auto`` takes the plan with the least predicted step time.
        resume: a run folder whose newest checkpoint to go on from, under any plan or cluster.
        cache: folder of profiles.
        chosen: a plan to run as it is, in place of ``strategy``.
        watcher: what to tell while the run goes on.
        **options: see ``api.run.TrainOptions``: address, port and token for workers started by hand.
    """
    from spanwise.api.run import TrainOptions, run_job

    settings = TrainOptions(
        run=Path(run), strategy=strategy, resume=None if resume is None else Path(resume),
        cache=cache, plan=chosen, watcher=watcher, **options,
    )  # fmt: skip
    return run_job(job, cluster or default_cluster(), settings)


def decouple(
    job: Job, cluster: Cluster | None = None, *, run: Path | str = "runs/latest", **options: Any
) -> Decoupled:
    """Divides a classifier by classes into narrow sub-models, trains each on its device, merges them exactly.

    No message passes between devices while they train, and one that is lost costs its classes only. See
    docs/decoupled.md.

    Args:
        job: what to train; a classification by class number with the loss ``cross_entropy``.
        cluster: on what; the embedded example by default.
        run: the folder to write; the sub-models are runs in ``sub-0``, ``sub-1`` and so on.
        **options: see ``api.decoupled.DecoupleOptions``: groups, shares, negatives, shared first layers.

    Raises:
        InputError: the model does not divide, classes are missing or doubled, or options do not go together.
        InfeasibleError: the devices have no memory for the sub-models.
    """
    from spanwise.api.decoupled import DecoupleOptions, run_decoupled

    return run_decoupled(job, cluster or default_cluster(), DecoupleOptions(run=Path(run), **options))


def report(run: Path | str) -> Path:
    """Writes ``report.html`` and ``trace.json`` into a run folder; returns the report's path."""
    from spanwise.reporting import write_report

    return write_report(RunFolder.open(Path(run)))


class Trainer:
    """Trains a live ``nn.Module`` on a cluster; the weights come back into the same object.

    Example:
        >>> trainer = spanwise.Trainer(model, nn.CrossEntropyLoss(), cluster="cluster.toml", batch=128)
        >>> result = trainer.fit(train_set, test_set)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        *,
        cluster: Cluster | Path | str | None = None,
        strategy: str = "auto",
        run: Path | str = "runs/latest",
        cache: Path | None = None,
        **job: Any,
    ) -> None:
        """Keeps what to train.

        Args:
            model: any module that ``torch.export`` can trace.
            loss_fn: (outputs, labels) to the mean over rows.
            cluster: a Cluster, its file, or none for the embedded example.
            strategy: who plans.
            run: the run folder to write.
            cache: folder of profiles.
            **job: further fields of Job: batch, optimizer, scheduler, epochs, seed and so on.
        """
        self.model, self.loss_fn = model, loss_fn
        self.cluster = cluster if isinstance(cluster, Cluster) else load_cluster(cluster)
        self.strategy, self.run, self.cache = strategy, run, cache
        live = Recipe(name=LIVE)
        self.job = Job.parse({"loss": LIVE, **job, "model": live, "data": live}, "Trainer")

    def plan(self, dataset: Any) -> tuple[Plan, tuple[Evaluation, ...]]:
        """What ``fit`` would run, and what every strategy is predicted to give."""
        from spanwise.api.planning import choose
        from spanwise.api.scores import scores
        from spanwise.api.times import profile_prepared

        prepared = self._prepared(dataset, None)
        times = profile_prepared(prepared, self.cluster, self.cache)
        found = scores(prepared, self.strategy)
        return choose(prepared.job, self.cluster, prepared.traced.graph, times, self.strategy, found)

    def fit(
        self, dataset: Any, test: Any = None, *, resume: Path | str | None = None,
        watcher: Watcher | None = None,
    ) -> Outcome:  # fmt: skip
        """Trains on a map-style data set of (inputs, label) rows and loads the weights into the model.

        The rows are shared out to the cluster's data devices; a device gets its own rows and no others. Where
        the data is everywhere each source gets all of them.
        """
        return train(
            self.job, self.cluster, run=self.run, strategy=self.strategy, resume=resume,
            cache=self.cache, watcher=watcher, prepared=self._prepared(dataset, test),
        )  # fmt: skip

    def _prepared(self, dataset: Any, test: Any) -> Prepared:
        from spanwise.api.prepare import prepare_live

        return prepare_live(self.job, self.model, self.loss_fn, dataset, test)
