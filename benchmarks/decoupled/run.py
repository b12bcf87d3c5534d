"""Class-decoupled sub-models: compute a device saves, and what it costs in accuracy, against honest rivals.

A cell is one network on one task under one seed, trained one way. Everything trains on this machine, one
net after the other: compute is counted by formula, accuracy is measured.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from comparison import draw, show
from harness import Cells, keep, parser, redrawn
from rivals import Cell, apart, central, fedavg, single_width
from tasks import MODELS, WORDS, Sets, Task, tasks

from spanwise.core.decoupling import Negatives

HERE = Path(__file__).resolve().parent
GROUPS = (2, 4, 5, 10)
ALL, NONE, POOL = Negatives(), Negatives(policy="none"), Negatives(policy="pool", per_class=20)
SPEEDS = (1.0, 3.0, 5.0, 8.0)
FEDAVG_GROUPS = (5,)
LONGER_GROUPS = (5,)
LONGER = 1.5  # times the epochs: a part of the compute that is saved, given back

Way = Callable[[str, Task, Sets, int], Cell]


def ways(groups: tuple[int, ...], classes: int, *, short: bool) -> Iterator[tuple[str, int, Way]]:
    """(name, groups, what to run), the most telling first."""
    yield "central", 1, central
    for count in groups:
        yield "apart", count, lambda *a, g=count: apart(*a, g, ALL)
        yield "single_width", count, lambda *a, g=count: single_width(*a, g)
        if count < classes:  # a group of one class has nothing to tell apart without negatives
            yield "no_negatives", count, lambda *a, g=count: apart(*a, g, NONE)
    if short:
        return
    for count in LONGER_GROUPS:
        yield "apart_longer", count, lambda m, t, s, seed, g=count: apart(m, longer(t), s, seed, g, ALL)
    yield "central_longer", 1, lambda m, t, s, seed: central(m, longer(t), s, seed)
    yield "by_speed", len(SPEEDS), lambda *a: apart(*a, len(SPEEDS), ALL, SPEEDS)
    for count in FEDAVG_GROUPS:
        yield "pool", count, lambda *a, g=count: apart(*a, g, POOL)
        yield "fedavg", count, lambda *a, g=count: fedavg(*a, g)


def longer(task: Task) -> Task:
    """The same task with half more epochs."""
    return replace(task, epochs=int(LONGER * task.epochs))


def measure(args: argparse.Namespace, found: dict[str, Task], models: list[str]) -> list[Cell]:
    """All cells that are not there yet."""
    cells = Cells(args)
    done = {_key(cell) for cell in cells.found}
    for seed in range(args.seeds):
        for task in found.values():
            sets: Sets | None = None
            for model in models:
                for way, groups, run in ways(args.groups, task.classes, short=args.short):
                    about = {"task": task.name, "model": model, "seed": seed, "way": way, "groups": groups}
                    if _key(about) in done or (args.ways and way not in args.ways):
                        continue
                    sets = sets or task.load(seed)
                    start = time.perf_counter()
                    cell = {**about, **run(model, task, sets, seed)}
                    cells.add(cell)
                    print(
                        f"{task.name} {model} seed {seed} {way} {groups}: {cell['accuracy']:.1%}, "
                        f"{time.perf_counter() - start:.0f} s",
                        flush=True,
                    )
    return cells.found


def _key(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("task", "model", "seed", "way", "groups"))


def arguments() -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--tasks", nargs="+", default=None, help="digits, keywords, cifar10, cifar100")
    options.add_argument("--models", nargs="+", default=list(MODELS)[:4], choices=list(MODELS))
    options.add_argument("--groups", nargs="+", type=int, default=list(GROUPS))
    options.add_argument("--ways", nargs="+", default=None, help="only these: central, apart, ...")
    options.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    options.add_argument("--words", type=Path, default=WORDS, help="folder of the generated keywords")
    options.add_argument("--cifar", type=Path, default=None, help="folder of the CIFAR files, if there")
    return options.parse_args()


def main() -> None:
    args = arguments()
    if redrawn(args, HERE, "decoupled", draw):
        return
    found = tasks(args.words, args.cifar)
    models = list(args.models)
    if args.short:
        found = {"digits": replace(found["digits"], epochs=8)}
        models, args.groups = ["alexnet_11"], [5]
    elif args.tasks is not None:
        found = {name: found[name] for name in args.tasks}
    if "keywords" in found and not args.words.is_dir() and shutil.which("espeak-ng") is None:
        print("keywords not run: espeak-ng is not installed (apt-get install espeak-ng)")
        del found["keywords"]
    result = {"speeds": list(SPEEDS), "cells": measure(args, found, models)}
    print(show(result))
    keep(args, HERE, "decoupled", result, quiet=True, draw=draw)


if __name__ == "__main__":
    main()
