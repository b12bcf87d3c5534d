"""A small net and random plans whose devices train some parameters or channels."""

from __future__ import annotations

import random
from collections.abc import Callable

import equality
from equality import Case
from torch import Tensor, nn

from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan, Ranking, Replica, Stage, Trained
from spanwise.core.trained import GroupSync
from spanwise.lowering import group_syncs, natural_syncs
from spanwise.zoo.data import synthetic_images

LR, MOMENTUM, DECAY, STEPS = 0.05, 0.9, 0.01, 3
Layout = tuple[tuple[int, int, str], ...]  # layers and devices of each stage


class Net(nn.Module):
    """Convolutions of all kinds, norms, a residual, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8))
        self.narrow = nn.Conv2d(8, 6, 1, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.narrow(self.depth(self.wide(x)))
        return self.head(x.mean((2, 3)))


CASE = Case(
    "sparse", Net, nn.CrossEntropyLoss(),
    lambda: synthetic_images(rows=96, shape=(3, 6, 6), classes=4, seed=0)[0],
    optimizer=(("name", "SGD"), ("lr", LR), ("momentum", MOMENTUM), ("weight_decay", DECAY)),
)  # fmt: skip


def trains(graph: ModelGraph, rng: random.Random, start: int, stop: int) -> tuple[Trained, ...] | None:
    """All, nothing, or some parameters and channels."""
    kind = rng.random()
    if kind < 0.15:
        return None
    out: list[Trained] = []
    for parameter in graph.parameters_of(start, stop):
        if kind < 0.3 or rng.random() < 0.5:
            continue
        channels = graph.sliceable.get(parameter.name, (0, 0))[1]
        count = rng.randint(1, channels - 1) if channels > 1 and rng.random() < 0.6 else None
        out.append(Trained(parameter=parameter.name, channels=count))
    return tuple(out)


def sparse_plan(graph: ModelGraph, seed: int, layout: Layout, *, stored: bool = True) -> Plan:
    rng = random.Random(seed)
    stages: list[Stage] = []
    for start, stop, devices in layout:
        rows = equality.deal(rng, list(devices), 6)
        own = tuple(r.model_copy(update={"trains": trains(graph, rng, start, stop)}) for r in rows)
        if not any(replica.trains is not None for replica in own):
            own = (own[0].model_copy(update={"trains": ()}), *own[1:])
        stages.append(Stage(start=start, stop=stop, replicas=own, warmup=2))
    rankings: list[Ranking] = []
    for name, (_, channels) in graph.sliceable.items():
        order = rng.sample(range(channels), channels)
        rankings.append(Ranking(parameter=name, order=" ".join(map(str, order))))
    plan = Plan(
        strategy="test", graph_digest=graph.digest, micro_batches=2, micro_batch_rows=6,
        sources=tuple(Replica(device=r.device, rows=r.rows) for r in stages[0].replicas),
        stages=tuple(stages), rankings=tuple(rankings), stored_statistics=stored or None,
    )  # fmt: skip
    syncs = (*natural_syncs(plan.stages, graph), *group_syncs(plan, graph))
    return Plan.parse(plan.model_copy(update={"syncs": syncs}).to_data())


def with_groups(plan: Plan, change: Callable[[int, GroupSync], GroupSync]) -> Plan:
    syncs = tuple(change(i, s) if isinstance(s, GroupSync) else s for i, s in enumerate(plan.syncs))
    return plan.model_copy(update={"syncs": syncs})


WAYS: dict[str, Callable[[int, GroupSync], GroupSync]] = {
    "grouped": lambda _, s: s,
    "masked": lambda _, s: s.model_copy(update={"way": "masked"}),
    "mixed": lambda i, s: s.model_copy(update={"way": "masked" if i % 2 else "grouped", "segments": 3}),
}
LAYOUTS: dict[str, Layout] = {
    "replicas": ((0, -1, "abcd"),), "hybrid": ((0, 2, "ab"), (2, -1, "cdb")),
}  # fmt: skip


def layout_of(name: str, graph: ModelGraph) -> Layout:
    return tuple((a, len(graph) if b < 0 else b, devices) for a, b, devices in LAYOUTS[name])
