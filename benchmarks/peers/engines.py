"""PyTorch's own engines, each set up by its documented API and otherwise as it is.

Every engine trains the same model on the same rows with the same SGD. DDP, FSDP2 and the pipelines take
their rows from their own memory: unlike spanwise, whose rows start at the devices that hold the data, they
do not pay for bringing rows to where they are computed. Only ``cloud_only`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from models import RECIPES, batches, cut, even, loss_of, make, units
from torch import Tensor, nn

PEERS = ("ddp", "fsdp2", "gpipe", "1f1b", "single", "cloud_only")
_BATCHES = 4  # different global batches, drawn before the clock runs
_LR, _MOMENTUM = 0.01, 0.9


@dataclass(frozen=True)
class Run:
    """One ``run`` command: what this rank does in which group."""

    peer: str
    model: str
    batch: int
    ranks: tuple[str, ...]
    me: str
    rank: int
    address: str
    port: int
    interface: str
    steps: int
    warmup: int = 2
    timeout_s: float = 120.0
    seed: int = 0
    data_devices: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def world(self) -> int:
        """Ranks in the process group."""
        return len(self.ranks)


class Engine(Protocol):
    """What ``rank.py`` drives."""

    continuous: bool  # steps overlap with the next, so nothing may stop between warm-up and timing
    rows: int  # of the global batch that this rank computes
    facts: dict[str, Any]  # settings in use, for the record

    def step(self, k: int) -> float | None:
        """Optimizer step k; the mean loss over this rank's rows where it is known."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Parameters that this rank trains as ``"unit.name"``; FSDP2 gathers, so every rank must call it."""
        ...

    def parameters_bytes(self) -> int:
        """Bytes of the parameters that this rank keeps between steps."""
        ...


def engine(run: Run) -> Engine:
    """The engine that the command names; the process group exists already, except for ``single``."""
    if run.peer == "cloud_only":
        from cloud import cloud_only

        return cloud_only(run)
    if run.peer in ("gpipe", "1f1b"):
        return Pipeline(run)
    makers: dict[str, Callable[[Run], Engine]] = {"ddp": ddp, "fsdp2": fsdp2, "single": single}
    if run.peer not in makers:
        raise ValueError(f"unknown peer '{run.peer}'; known: {', '.join(PEERS)}")
    return makers[run.peer](run)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of every peer."""
    return torch.optim.SGD(parameters, lr=_LR, momentum=_MOMENTUM)


def my_rows(run: Run, ranks: int, index: int) -> range:
    """Rows of the global batch that compute rank ``index`` has: as even as possible, or option ``rows``."""
    sizes = run.options.get("rows") or even(run.batch, ranks)
    if len(sizes) != ranks or sum(sizes) != run.batch or min(sizes) < 1:
        raise ValueError(f"{run.peer}: rows {sizes} must be {ranks} counts from 1 that add up to {run.batch}")
    start = sum(sizes[:index])
    return range(start, start + sizes[index])


@dataclass
class Replica:
    """A whole model, or what FSDP2 makes of it, on this rank's rows."""

    model: nn.Module
    parts: list[nn.Module]
    loss: Callable[[Any, Any], Tensor]
    rows: int
    weight: float
    facts: dict[str, Any]
    data: list[tuple[Tensor, Tensor]]
    continuous: bool = False

    def __post_init__(self) -> None:
        self.optimizer = sgd(self.model.parameters())

    def step(self, k: int) -> float | None:
        """One optimizer step."""
        x, y = self.data[k % len(self.data)]
        return self.train(x, y)

    def train(self, x: Tensor, y: Tensor) -> float:
        """Forward, backward and the optimizer on these rows."""
        self.optimizer.zero_grad()
        loss = self.loss(self.model(x), y)
        # DDP and FSDP2 take the plain mean over ranks; with uneven rows the mean over rows needs a weight.
        (loss * self.weight).backward()
        self.optimizer.step()
        return loss.item()

    def parameters_bytes(self) -> int:
        """Of the whole model, or of this rank's shards."""
        return sum(_as(p, "to_local").nbytes for p in self.model.parameters())

    def state(self) -> dict[str, Tensor]:
        """Parameters by unit; FSDP2's are gathered."""
        return {
            f"{i}.{name}": _as(p, "full_tensor").detach()
            for i, part in enumerate(self.parts)
            for name, p in part.named_parameters()
        }


def _as(parameter: nn.Parameter, how: str) -> Tensor:
    """A DTensor by ``to_local`` or ``full_tensor``; its class would be 50 MB to import where none is used."""
    return getattr(parameter, how)() if hasattr(parameter, how) else parameter


def replica(
    run: Run, model: nn.Module, parts: list[nn.Module], share: range, ranks: int, **facts: Any
) -> Replica:
    """A replica on ``share`` of the rows, one of ``ranks`` whose gradients are averaged."""
    window = slice(share.start, share.stop)
    data = [(x[window].clone(), y[window].clone()) for x, y in batches(run.model, run.batch, _BATCHES)]
    weight = len(share) * ranks / run.batch
    return Replica(model, parts, loss_of(run.model), len(share), weight, facts, data)


def single(run: Run) -> Replica:
    """Plain PyTorch on one device."""
    model = make(run.model, run.seed)
    return replica(run, model, units(model), range(run.batch), 1)


def ddp(run: Run) -> Replica:
    """``DistributedDataParallel`` over all ranks."""
    share = my_rows(run, run.world, run.rank)
    model = make(run.model, run.seed)
    parts = units(model)
    wrapped, facts = data_parallel(model, run.options, None)
    return replica(run, wrapped, parts, share, run.world, **facts)


def data_parallel(
    model: nn.Module, options: dict[str, Any], group: dist.ProcessGroup | None
) -> tuple[nn.Module, dict[str, Any]]:
    """DDP at its best settings: gradients as views of the buckets, a static graph, buffers left local.

    Without ``broadcast_buffers`` batch statistics stay each rank's own, as in FSDP2; with it every forward
    would begin with a broadcast.
    """
    from torch.nn.parallel import DistributedDataParallel

    facts = {
        "bucket_cap_mb": options.get("bucket_cap_mb", 25),
        "gradient_as_bucket_view": options.get("gradient_as_bucket_view", True),
        "static_graph": options.get("static_graph", True),
        "broadcast_buffers": options.get("broadcast_buffers", False),
    }
    return DistributedDataParallel(model, process_group=group, **facts), facts


def fsdp2(run: Run) -> Replica:
    """``fully_shard`` on each unit, then on the root, over a mesh of CPUs.

    gloo sums and averages on CPU tensors, so nothing has to be changed for it. ``reshard_after_forward``
    False keeps the parameters from forward to backward: one all-gather less, more memory. ``groups`` shards
    so many runs of units instead of every unit, for links whose latency costs more than their bandwidth.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    share = my_rows(run, run.world, run.rank)
    mesh = init_device_mesh("cpu", (run.world,))
    parts = units(make(run.model, run.seed))
    count = int(run.options.get("groups", len(parts)))
    reshard = bool(run.options.get("reshard_after_forward", True))
    groups = [nn.Sequential(*(parts[i] for i in run_of)) for run_of in cut(len(parts), count)]
    for group in groups:
        fully_shard(group, mesh=mesh, reshard_after_forward=reshard)
    root = nn.Sequential(*groups)
    fully_shard(root, mesh=mesh)
    return replica(run, root, parts, share, run.world, groups=count, reshard_after_forward=reshard)


class Pipeline:
    """``ScheduleGPipe`` or ``Schedule1F1B``: one stage a rank, equal numbers of units, in ranks' order."""

    continuous = False

    def __init__(self, run: Run) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        count = micro_batches(run)
        parts = units(make(run.model, run.seed))
        self.mine = cut(len(parts), run.world)[run.rank]
        self.parts = [parts[i] for i in self.mine]
        module = nn.Sequential(*self.parts)
        stage = PipelineStage(module, run.rank, run.world, torch.device("cpu"))
        kind = Schedule1F1B if run.peer == "1f1b" else ScheduleGPipe
        self.schedule = kind(stage, n_microbatches=count, loss_fn=loss_of(run.model))
        self.optimizer = sgd(module.parameters())
        self.first, self.last = run.rank == 0, run.rank == run.world - 1
        self.data = batches(run.model, run.batch, _BATCHES)
        self.rows = run.batch
        self.facts: dict[str, Any] = {"micro_batches": count, "units": [self.mine.start, self.mine.stop]}

    def step(self, k: int) -> float | None:
        """One whole batch through the schedule, then the optimizer."""
        x, y = self.data[k % len(self.data)]
        losses: list[Tensor] = []
        self.optimizer.zero_grad()
        target: dict[str, Any] = {"target": y, "losses": losses} if self.last else {}
        self.schedule.step(*((x,) if self.first else ()), **target, return_outputs=False)
        self.optimizer.step()
        return torch.stack(losses).mean().item() if losses else None

    def parameters_bytes(self) -> int:
        """Of this stage."""
        return sum(value.nbytes for value in self.state().values())

    def state(self) -> dict[str, Tensor]:
        """Parameters of this stage by the whole model's units."""
        named = zip(self.mine, self.parts, strict=True)
        return {f"{i}.{name}": p.detach() for i, part in named for name, p in part.named_parameters()}


def micro_batches(run: Run) -> int:
    """Option ``micro_batches``, or the smallest divisor of the batch from 8 up that the schedule takes.

    The schedules cut a batch into equal micro-batches; 1F1B refuses fewer of them than stages.
    """
    if "micro_batches" in run.options:
        return int(run.options["micro_batches"])
    least = max(8, run.world) if run.peer == "1f1b" else 8
    found = [m for m in range(min(least, run.batch), run.batch + 1) if run.batch % m == 0]
    return found[0]


def pipeline_ranks(model: str, devices: list[str]) -> list[str]:
    """As many of the devices, in their order, as the model has units for."""
    return devices[: RECIPES[model].units]
