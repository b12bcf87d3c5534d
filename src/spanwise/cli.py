"""The command line: parses and prints, no logic."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spanwise import __version__, cli_lab
from spanwise.core.errors import InputError, SpanwiseError

if TYPE_CHECKING:
    from spanwise.core.cluster import Cluster
    from spanwise.lab import Lab

app = typer.Typer(
    help="Train one PyTorch model across whatever devices you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(cli_lab.app, name="lab")

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file (TOML or JSON).")]
ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", "-c", help="Cluster file; default: an embedded emulated example.")
]
Strategy = Annotated[str, typer.Option("--strategy", "-s", help="Who plans; see docs/strategies.md.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the job; repeatable.")
]
Cache = Annotated[Path | None, typer.Option("--cache", help="Folder of profiles.", envvar="SPANWISE_CACHE")]


def main() -> None:
    """Runs the command line; a user's mistake is one line and a documented exit code."""
    try:
        status: object = app(standalone_mode=False)  # what a command exits with, or returns
        if isinstance(status, int) and status:
            sys.exit(status)
    except SpanwiseError as error:
        typer.echo(f"spanwise: {error}", err=True)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("spanwise: interrupted", err=True)
        sys.exit(130)
    except Exception as error:  # a usage error carries its own way to show itself
        show: Callable[[], None] | None = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(2)


def _cache(folder: Path | None) -> Path:
    from spanwise.api.times import default_cache

    return folder if folder is not None else default_cache()


def _print(data: object) -> None:
    typer.echo(json.dumps(data, indent=1))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train one PyTorch model across whatever devices you have."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, cores, memory and what this machine can emulate."""
    from spanwise.api.doctor import examine
    from spanwise.console import show_doctor

    found = examine()
    if as_json:
        _print(found)
    else:
        show_doctor(found)


@app.command()
def profile(
    job: JobFile,
    cluster: ClusterFile = None,
    sets: Sets = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Time every layer of the model for every device of the cluster."""
    from spanwise import api
    from spanwise.console import show_profile

    task = api.load_job(job, tuple(sets or ()))
    graph, times = api.profile(task, api.load_cluster(cluster), cache=_cache(cache))
    if as_json:
        _print({"graph": graph.to_data(), "profile": times.to_data()})
    else:
        show_profile(graph, times)


@app.command()
def plan(
    job: JobFile,
    cluster: ClusterFile = None,
    strategy: Strategy = "auto",
    sets: Sets = None,
    cache: Cache = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the plan, with all it needs, here.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also plan by the published rules of others, side by side.")
    ] = False,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="What memory, bandwidth or a second device would give.")
    ] = False,
    replans: Annotated[
        int, typer.Option("--replans", min=1, help="How many changes --what-if plans for at most.")
    ] = 12,
    as_json: AsJson = False,
) -> None:
    """Predict every strategy and say which wins, why, and whether distributing pays."""
    from spanwise import api
    from spanwise.api.advice import advice_data, save_plan
    from spanwise.console import show_plans

    task, machines = api.load_job(job, tuple(sets or ())), api.load_cluster(cluster)
    graph, times = api.profile(task, machines, cache=_cache(cache))
    graph, importance = api.scored(task, graph, strategy)
    found = advice_data(
        task, machines, graph, times, strategy, baselines=baselines, replans=replans if what_if else 0,
        importance=importance,
    )  # fmt: skip
    if out is not None:
        save_plan(out, task, machines, graph, times, found.plan)
    if as_json:
        _print(found.to_data())
    else:
        show_plans(found, graph, machines)


@app.command()
def simulate(
    run: Annotated[Path, typer.Argument(metavar="PLAN", help="Run folder, or folder written by plan --out.")],
    fault: Annotated[
        list[str] | None, typer.Option("--fault", help="lose:D@STEP, slow:D*F@STEP, cut:A>B@STEP.")
    ] = None,
    cluster: ClusterFile = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to simulate.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Predict the timeline of a plan, on its own cluster or on another that has the same devices."""
    from spanwise.api.advice import simulate_folder
    from spanwise.console import show_timeline

    timeline = simulate_folder(run, cluster, tuple(fault or ()), steps)
    if as_json:
        _print(timeline.to_data())
    else:
        show_timeline(timeline)


@app.command()
def train(
    job: JobFile,
    cluster: ClusterFile = None,
    strategy: Strategy = "auto",
    run: Annotated[Path, typer.Option("--run", help="Run folder to write.")] = Path("runs/latest"),
    resume: Annotated[Path | None, typer.Option("--resume", help="Run folder to go on from.")] = None,
    sets: Sets = None,
    cache: Cache = None,
    listen: Annotated[
        str | None,
        typer.Option("--listen", metavar="HOST:PORT", help="Wait here for workers started by hand."),
    ] = None,
    token_file: Annotated[Path | None, typer.Option("--token-file", help="Token for those workers.")] = None,
    join_timeout: Annotated[
        float, typer.Option("--join-timeout", min=1, help="Seconds to wait for workers started by hand.")
    ] = 120.0,
    in_lab: Annotated[
        bool, typer.Option("--lab", help="Emulate by namespaces, shaped links and CPU shares; needs root.")
    ] = False,
    tries: Annotated[
        int,
        typer.Option("--tries", min=1, max=8, help="Plans to try in the first steps; the fastest is kept."),
    ] = 1,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Change the plan when devices or links drift.")
    ] = False,
    fault: Annotated[
        list[str] | None,
        typer.Option("--fault", help="slow:D*F@STEP or slow:A>B*F@STEP on a portably emulated cluster."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train: profile, plan, predict, run exactly that plan, report."""
    from spanwise import api
    from spanwise.console import RunConsole, show_outcome
    from spanwise.core.faults import Fault
    from spanwise.runtime.control import parse_endpoint

    task, machines = api.load_job(job, tuple(sets or ())), api.load_cluster(cluster)
    options: dict[str, Any] = {
        "tries": tries, "adapt": adapt, "faults": tuple(map(Fault.of, fault or ())),
    }  # fmt: skip
    if listen is not None:
        options |= {
            "spawn": False,
            "listen": parse_endpoint(listen),
            "token": _token(token_file, make=True),
            "join_timeout_s": join_timeout,
        }
    console = RunConsole(quiet=as_json, show_token=token_file is None)
    with ExitStack() as stack:
        if in_lab:
            options["lab"] = stack.enter_context(_lab(machines, listen))
        stack.enter_context(console)
        outcome = api.train(
            task, machines, run=run, strategy=strategy, resume=resume, cache=_cache(cache),
            watcher=console, **options,
        )  # fmt: skip
    if as_json:
        _print(outcome.summary)
    else:
        show_outcome(outcome.summary, outcome.folder.report)


@app.command()
def decouple(
    job: JobFile,
    cluster: ClusterFile = None,
    groups: Annotated[
        int | None, typer.Option("--groups", min=1, help="Groups of classes; default: one a device.")
    ] = None,
    owner: Annotated[
        list[str] | None,
        typer.Option("--owner", metavar="DEVICE=K,K", help="Classes that a device owns; repeatable."),
    ] = None,
    clustered: Annotated[
        bool, typer.Option("--clustered", help="Classes with like activations together.")
    ] = False,
    shares: Annotated[str, typer.Option("--shares", help="speed, equal, or numbers: 0.5,0.3,0.2.")] = "speed",
    negatives: Annotated[
        str, typer.Option("--negatives", help="none, pool:SAMPLES or all; see docs/decoupled.md.")
    ] = "all",
    shared: Annotated[int, typer.Option("--shared", min=0, help="First layers kept whole and frozen.")] = 0,
    tune: Annotated[int, typer.Option("--tune", min=0, help="Epochs of fine-tuning after merging.")] = 0,
    run: Annotated[Path, typer.Option("--run", help="Run folder to write.")] = Path("runs/latest"),
    sets: Sets = None,
    cache: Cache = None,
    in_lab: Annotated[bool, typer.Option("--lab", help="Devices of a lab train; needs root.")] = False,
    at_once: Annotated[bool, typer.Option("--at-once", help="All devices at the same time.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train narrow sub-models of a classifier apart, one a device, and merge them exactly."""
    from spanwise import api
    from spanwise.api.decoupled import parse_negatives, parse_owners, parse_shares
    from spanwise.console import show_decoupled

    task, machines = api.load_job(job, tuple(sets or ())), api.load_cluster(cluster)
    options: dict[str, Any] = {
        "groups": parse_owners(owner) if owner else groups, "clustered": clustered, "shared": shared,
        "shares": parse_shares(shares), "negatives": parse_negatives(negatives), "tune_epochs": tune,
        "cache": _cache(cache), "at_once": at_once,
    }  # fmt: skip
    with ExitStack() as stack:
        if in_lab:
            options["lab"] = stack.enter_context(_lab(machines, None))
        found = api.decouple(task, machines, run=run, **options)
    if as_json:
        _print(found.summary)
    else:
        show_decoupled(found.summary)


@app.command()
def worker(
    join: Annotated[str, typer.Option("--join", metavar="HOST:PORT", help="Where train listens.")],
    device: Annotated[str, typer.Option("--device", help="Which device of the cluster file this is.")],
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File with the token; else SPANWISE_TOKEN.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Leave it to train to say why a run ended.")] = False,
) -> None:
    """Work as one device: the same process here, on a real device and in the lab."""
    from spanwise.api.services import services
    from spanwise.runtime.worker import join as work

    token = _token(token_file, make=False)
    raise typer.Exit(work(join, device, token, services=services(), quiet=quiet))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    as_json: AsJson = False,
) -> None:
    """Write report.html and trace.json of a run."""
    from spanwise import api

    path = api.report(run)
    if as_json:
        _print({"report": str(path)})
    else:
        typer.echo(path)


@contextmanager
def _lab(machines: Cluster, listen: str | None) -> Generator[Lab | None]:
    """The lab to train in: the one around this command, or one of its own; none where there can be none."""
    from spanwise.lab import Lab, reason_against

    if listen is not None:
        raise InputError("--lab starts its own workers; leave out --listen")
    reason = reason_against()
    if reason and machines.emulation is not None:
        typer.echo(f"spanwise: {reason}; the portable emulation takes its place", err=True)
        yield None
    elif cli_lab.current_lab():
        yield Lab.attach(cli_lab.current_lab())
    else:
        with Lab(machines) as lab:
            yield lab


def _token(path: Path | None, *, make: bool) -> str:
    if path is not None:
        try:
            token = path.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise InputError(f"token file {path}: cannot be read ({error.strerror})") from None
    else:
        token = os.environ.get("SPANWISE_TOKEN", "")
    if not token and not make:
        raise InputError("worker: no token; give --token-file or set SPANWISE_TOKEN to what train printed")
    return token
