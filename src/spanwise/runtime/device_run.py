"""One device's side of a run: stages, parameters, optimizer and executor, built from plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from spanwise.core.cluster import Cluster, DataShare
from spanwise.core.errors import InputError
from spanwise.core.faults import Fault, slowdown, stretch
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.observed import ComputeTime, DeviceStep
from spanwise.core.plan import Plan
from spanwise.core.profile import StageTimes
from spanwise.core.program import Action, Program
from spanwise.lowering import lower
from spanwise.ops.opgraph import OpGraph
from spanwise.ops.stage_module import StageModule
from spanwise.runtime import optimize
from spanwise.runtime.calibrate import undisturbed_times
from spanwise.runtime.emulate import PacedTransport, Throttle, Unthrottled, Work
from spanwise.runtime.executor import Executor, StepResult
from spanwise.runtime.feed import Feed, Rows, Sampler, held_rows
from spanwise.runtime.message_times import TimedTransport
from spanwise.runtime.parts import DeviceParts
from spanwise.runtime.recorder import Recorder
from spanwise.runtime.trained import TrainedPart, check_masked
from spanwise.runtime.transport import Transport


@dataclass(frozen=True)
class Assignment:
    """Everything that a run is, the same for all devices.

    ``dataset_rows``: of the training set. ``observe``: devices tell of every step how long compute and
    messages took. ``faults``: what an emulated cluster suffers; of the kind ``slow`` only. ``tight``: devices
    that hand freed memory back at once, as all do under a sparse plan; they do so under later plans, too.
    """

    job: Job
    cluster: Cluster
    graph: ModelGraph
    ops: OpGraph
    plan: Plan
    program: Program
    dataset_rows: int
    emulate: bool = False
    observe: bool = False
    faults: tuple[Fault, ...] = ()
    tight: tuple[str, ...] = ()

    def under(self, plan: Plan) -> Assignment:
        """The same run by another plan."""
        program = lower(plan, self.graph, clip=self.job.clip_norm is not None)
        return replace(self, plan=plan, program=program)

    @property
    def shares(self) -> tuple[DataShare, ...]:
        """Shares of the sources, in plan order; empty if every device has all of the data."""
        return source_shares(self.job, self.cluster, self.plan)

    def held_by(self, device: str) -> Tensor:
        """Indices of the rows of the training set that a source reads from."""
        return held_rows(self.dataset_rows, self.shares, device)

    @cached_property
    def sampler(self) -> Sampler:
        """Which rows are read in which step."""
        return Sampler.of(self.plan, self.shares, self.dataset_rows, self.job.seed)

    def buffers_of(self, device: str) -> set[str]:
        """Names of the buffers of a device's stages."""
        own = [stage for stage in self.plan.stages if device in stage.devices]
        return {b for s in own for layer in self.graph.layers[s.start : s.stop] for b in layer.buffers}


def source_shares(job: Job, cluster: Cluster, plan: Plan) -> tuple[DataShare, ...]:
    """Who holds which share of the data, in the order of the plan's sources; empty if all hold all of it."""
    by_device = {share.device: share for share in cluster.data_devices(job.data_devices)}
    if not by_device:
        return ()
    missing = [s.device for s in plan.sources if s.device not in by_device]
    if missing:
        raise InputError(
            f"plan '{plan.strategy}': source '{missing[0]}' holds no data; data is on "
            f"{', '.join(by_device)}; plan again"
        )
    return tuple(by_device[source.device] for source in plan.sources)


@dataclass
class Snapshot:
    """State of one device or of a whole run, independent of the plan: what a checkpoint holds."""

    parameters: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    buffers: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    optimizer: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    scheduler: dict[str, Any] = field(default_factory=dict[str, Any])


OnStep = Callable[[StepResult, DeviceStep | None], None]


class DeviceRun:
    """Holds one device's part of the model and steps it."""

    def __init__(
        self,
        assignment: Assignment,
        device: str,
        transport: Transport,
        *,
        tensors: dict[str, Tensor],
        data: Rows | None,
        held: bool = False,
    ) -> None:
        """Builds the device's part.

        Args:
            assignment: the run.
            device: which device this is.
            transport: its end of the network.
            tensors: at least the parameters and buffers that its stages use, by the model's names.
            data: rows to read if it is a source; the whole set, or with ``held`` only those it reads from.
            held: see ``data``.
        """
        job, plan = assignment.job, assignment.plan
        spec = assignment.cluster.device(device)
        self.device, self._assignment = device, assignment
        own = [(i, s) for i, s in enumerate(plan.stages) if device in s.devices]
        held_names = set(assignment.program.held.get(device, ()))
        target = torch.device(spec.torch_device)
        self.parameters = {
            p.name: nn.Parameter(tensors[p.name].detach().clone().to(target))
            for p in assignment.graph.parameters
            if p.name in held_names
        }
        self.buffers = {
            name: tensors[name].detach().clone().to(target) for name in sorted(assignment.buffers_of(device))
        }
        check_masked(plan, job)
        self.trained = trained = TrainedPart(plan, assignment.graph, device, self.parameters)
        stages = {
            index: StageModule(
                assignment.ops, assignment.graph, stage.start, stage.stop,
                parameters=self.parameters, buffers=self.buffers, device=spec.torch_device,
                recompute=stage.recompute, sparse=trained.sparse(plan, stage, device),
            )
            for index, stage in own
        }  # fmt: skip
        names = assignment.program.updated.get(device, ())
        self._updated = {name: leaf for name, leaf in trained.leaves.items() if name in set(names)}
        self.optimizer = optimize.make_optimizer(job.optimizer, self._updated) if self._updated else None
        self.scheduler = optimize.make_scheduler(job.scheduler, self.optimizer) if self.optimizer else None
        self.recorder = Recorder(device)
        self._paced = transport if isinstance(transport, PacedTransport) else None
        if self._paced is not None:
            self._paced.on_passed = self.recorder.passed
        self._timed = TimedTransport(transport) if assignment.observe else None
        emulation = assignment.cluster.emulation
        self._throttle = (
            Throttle(spec.speed * emulation.core_share) if assignment.emulate and emulation else None
        )
        self._stages = stages
        self._undisturbed_s: Mapping[Work, float] | None = None
        self.executor = Executor(
            DeviceParts(device, stages, self.parameters, self.optimizer, spec.torch_device, trained),
            plan,
            assignment.graph,
            assignment.program,
            self._timed or transport,
            recorder=self.recorder,
            pace=self._throttle or Unthrottled(),
            feed=_feed(assignment, device, data, held),
            clip_norm=job.clip_norm,
            timeout_s=job.transfer_timeout_s,
        )

    def calibrate(self) -> Mapping[Work, float]:
        """Seconds of each kind of its compute, timed once, while the other devices rest.

        An emulated device is slowed by them from then on.
        """
        if self._undisturbed_s is None:
            self._undisturbed_s = undisturbed_times(
                self._assignment.plan, self._assignment.graph, self._assignment.program, self.device,
                self._stages, self.parameters, self.buffers,
            )  # fmt: skip
            for leaf in self.trained.leaves.values():  # channels that train are parameters of their own
                leaf.grad = None
            if self._throttle is not None:
                self._throttle.undisturbed_s = self._undisturbed_s
        return self._undisturbed_s

    def stage_times(self) -> tuple[StageTimes, ...]:
        """The same of whole forwards and backwards, as a profile has them."""
        seconds, digest = self.calibrate(), self._assignment.plan.digest
        return tuple(
            StageTimes(
                plan=digest, device=self.device, stage=stage,
                forward_s=seconds["forward", stage], backward_s=seconds["backward", stage],
            )
            for stage in self._stages
            if ("backward", stage) in seconds
        )  # fmt: skip

    def run(self, first: int, count: int, on_step: OnStep) -> None:
        """Steps ``first .. first + count - 1``."""
        per_epoch = self._assignment.sampler.steps_per_epoch
        every_step = self._assignment.job.scheduler_every == "step"
        place = self._assignment.cluster.ids.index(self.device)
        for index in range(first, first + count):
            seed = self._assignment.job.seed * 7_919 + index * 613 + place
            torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
            self._suffer(index)
            result = self.executor.step(index, more=index + 1 < first + count)
            if self.scheduler is not None and (every_step or (index + 1) % per_epoch == 0):
                self.scheduler.step()
            on_step(result, self._observed(result))

    def _suffer(self, step: int) -> None:
        """Puts the faults of an emulated cluster in force."""
        faults = self._assignment.faults
        if self._throttle is not None:
            self._throttle.slowdown = slowdown(faults, self.device, step)
        if self._paced is not None and faults:
            peers = (d for d in self._assignment.cluster.ids if d != self.device)
            self._paced.stretch = {peer: stretch(faults, self.device, peer, step) or 1.0 for peer in peers}

    def _observed(self, result: StepResult) -> DeviceStep | None:
        if self._timed is None:
            return None
        seconds: dict[tuple[str, int], list[float]] = {}
        for lane, kind, text, start, end in result.record.spans:
            if lane == self.device and kind not in ("wait", "step", "update"):
                stage = Action.parse(text).stage
                seconds.setdefault((kind, stage), []).append(end - start)
        compute = tuple(ComputeTime(kind, stage, fmean(found)) for (kind, stage), found in seconds.items())
        sent, received = self._timed.taken()
        return DeviceStep(self.device, compute, sent, received)

    def state(self) -> Snapshot:
        """A copy of all that is needed to go on elsewhere.

        Raises:
            PeerError: parameters that a server sent in the last step did not arrive.
        """
        self.executor.settle()
        state = Snapshot(
            {k: v.detach().cpu().clone() for k, v in self.parameters.items()},
            {k: v.detach().cpu().clone() for k, v in self.buffers.items()},
        )
        if self.optimizer is not None:
            state.optimizer = self.trained.widened(optimize.optimizer_state(self.optimizer, self._updated))
            state.options = optimize.group_options(self.optimizer)
            state.scheduler = optimize.scheduler_state(self.scheduler)
        return state

    def resume(
        self, optimizer: dict[str, Tensor], options: dict[str, Any], scheduler: dict[str, Any]
    ) -> None:
        """Puts optimizer and scheduler where a checkpoint left them."""
        if self.optimizer is None:
            return
        optimize.load_optimizer_state(self.optimizer, self._updated, self.trained.narrowed(optimizer))
        optimize.load_scheduler_state(self.scheduler, scheduler)
        optimize.load_group_options(self.optimizer, options)

    def close(self) -> None:
        """Ends its threads."""
        self.executor.close()


def _feed(assignment: Assignment, device: str, data: Rows | None, held: bool) -> Feed | None:
    sources = [source.device for source in assignment.plan.sources]
    if device not in sources:
        return None
    if data is None:
        raise InputError(f"device '{device}' is a data source but has no data; check the job's 'data'")
    sampler = assignment.sampler
    place = sources.index(device)
    indices = torch.arange(len(data)) if held else assignment.held_by(device)
    if len(indices) != sampler.counts[place]:
        raise InputError(
            f"device '{device}' holds {len(indices)} rows, the run expects {sampler.counts[place]}; "
            "give every device the same data factory"
        )
    return Feed(data, indices, sampler, place, assignment.graph)
