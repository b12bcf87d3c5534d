"""``spanwise lab``: an emulated testbed around a command."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spanwise.core.errors import InputError, SpanwiseError

app = typer.Typer(
    help="An emulated testbed on this machine (needs root): namespaces, shaped links, CPU shares.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Cluster = Annotated[Path, typer.Argument(metavar="CLUSTER", help="Cluster file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Words = Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="What to run.")]
LabId = Annotated[str | None, typer.Option("--lab", help="Which lab; default: the one that is up.")]


@app.command()
def run(cluster: Cluster, command: Words) -> None:
    """Make a lab, run a command at its hub, remove the lab. The command's exit status is returned.

    Inside, 'spanwise lab exec DEVICE -- ...' and 'spanwise train --lab' use this lab; SPANWISE_LAB names it.
    """
    from spanwise import api
    from spanwise.lab import Lab

    with Lab(api.load_cluster(cluster)) as lab:
        child = lab.start(None, command, env=os.environ | {"SPANWISE_LAB": lab.id})
        status = _wait(child)
    raise typer.Exit(status)


@app.command()
def up(cluster: Cluster, as_json: AsJson = False) -> None:
    """Make a lab that stays until 'spanwise lab down'."""
    from spanwise import api
    from spanwise.lab import Lab

    lab = Lab(api.load_cluster(cluster), keep=True).up()
    if as_json:
        typer.echo(json.dumps(_described(lab.id)))
    else:
        _show(lab.id)


@app.command(name="exec")
def exec_(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Device, or 'hub'.")],
    command: Words,
    lab_id: LabId = None,
) -> None:
    """Run a command as a device of the lab, under its limits. The command's exit status is returned."""
    from spanwise.lab import Lab

    lab = Lab.attach(_which(lab_id))
    raise typer.Exit(_wait(lab.start(None if device == "hub" else device, command)))


@app.command()
def status(as_json: AsJson = False) -> None:
    """Labs of this machine."""
    from spanwise.lab import state

    labs = [folder.lab for folder in state.known()]
    if as_json:
        typer.echo(json.dumps([_described(lab) for lab in labs]))
    elif not labs:
        typer.echo("no lab is up")
    for lab in [] if as_json else labs:
        _show(lab)


@app.command()
def down(
    lab_id: Annotated[str | None, typer.Argument(metavar="[LAB]", help="Which lab.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All labs, and whatever any left behind.")
    ] = False,
) -> None:
    """End a lab's processes and remove it."""
    from spanwise.lab import Lab, state

    known = {folder.lab for folder in state.known()}
    labs = state.left_behind() if everything else (_which(lab_id),)
    for lab in labs:
        if lab in known and state.LabFolder.of(lab).description.exists():
            Lab.attach(lab).down()
        else:
            state.remove(lab)
        typer.echo(f"lab {lab} is down")
    if not labs:
        typer.echo("nothing to remove")


@app.command()
def check(cluster: Cluster, as_json: AsJson = False) -> None:
    """Measure latency, bandwidth, compute and memory limit in a lab, and hold them against the file."""
    from spanwise import api
    from spanwise.lab import Lab
    from spanwise.lab.check import Finding
    from spanwise.lab.check import check as examine

    findings: list[Finding] = []
    with Lab(api.load_cluster(cluster)) as lab:
        for finding in examine(lab):
            findings.append(finding)
            if not as_json:
                typer.echo(finding.line)
    wrong = [f for f in findings if not f.ok]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        typer.echo(f"{len(findings) - len(wrong)} of {len(findings)} as the file says")
    if wrong:
        raise SpanwiseError(f"lab check: {len(wrong)} of {len(findings)} are off, first {wrong[0].what} "
                            f"of {wrong[0].where}: {wrong[0].text}; is the machine busy?")  # fmt: skip


def current_lab() -> str:
    """Id of the lab in which this command runs: ``spanwise lab run`` names it; empty outside of labs."""
    return os.environ.get("SPANWISE_LAB", "")


def _which(lab: str | None) -> str:
    from spanwise.lab import state

    if lab or current_lab():
        return lab or current_lab()
    known = [folder.lab for folder in state.known()]
    if len(known) != 1:
        raise InputError(
            "lab: none is up; make one with 'spanwise lab up CLUSTER'" if not known
            else f"lab: which one, {' or '.join(known)}? Name it"
        )  # fmt: skip
    return known[0]


def _described(lab: str) -> dict[str, object]:
    from spanwise.lab import state

    folder = state.LabFolder.of(lab)
    layout, known = folder.layout(), folder.read()
    devices = {
        d: {
            "address": layout.address(d),
            "control_address": layout.control_address(d),
            "cores": layout.share(d),
        }
        for d in layout.cluster.ids
    }
    return {"lab": lab, "cluster": layout.cluster.name, "owner": known["owner"], "devices": devices}


def _show(lab: str) -> None:
    from spanwise.lab import state

    layout = state.LabFolder.of(lab).layout()
    typer.echo(f"lab {lab}: {layout.cluster.name}")
    for device in layout.cluster.devices:
        typer.echo(
            f"  {device.id:<15} {layout.address(device.id):<15} site {device.site:<12} "
            f"{layout.share(device.id):.3f} cores"
        )


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The exit status of a command; an interrupt reaches it too, and it may end in its own time."""
    while True:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            continue
        return status if status >= 0 else 128 - status
