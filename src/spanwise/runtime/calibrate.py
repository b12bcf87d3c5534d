"""What a device's compute takes on this machine undisturbed.

The base of the portable emulation, and of predictions for devices that train a part of their stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from spanwise.core.model import ModelGraph, TensorSpec
from spanwise.core.plan import Plan
from spanwise.core.program import Action, Program
from spanwise.cost.halves import portions
from spanwise.ops.deferred import Deferred, run_together
from spanwise.ops.stage_module import StageModule
from spanwise.runtime.emulate import Work

_WARM_UP = 3  # first passes grow the heap and prepare kernels: up to 30 % dearer
_REPEATS, _LEAST = 9, 3
_ENOUGH_S = 2.0  # after which the least number of repeats will do


def undisturbed_times(
    plan: Plan,
    graph: ModelGraph,
    program: Program,
    device: str,
    stages: Mapping[int, StageModule],
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
) -> dict[Work, float]:
    """Median seconds of each kind of compute of each stage of a device on its rows of a micro-batch.

    Generated rows go through the stages that will run, before the run begins; gradients, buffers and the
    random state are as before afterwards. Other devices must rest meanwhile.
    """
    kept = {name: tensor.clone() for name, tensor in buffers.items()}
    random_state = torch.get_rng_state()
    found: dict[Work, float] = {}
    for index, stage in stages.items():
        spec = plan.stages[index]
        rows = next(replica.rows for replica in spec.replicas if replica.device == device)
        wanted = {a.work: a for a in program.devices.get(device, ()) if a.stage == index}
        if "backward" in wanted:
            found |= _medians(index, partial(_one_pass, stage, graph, rows, parameters))
        if "backward_input" in wanted:
            weights = [a for a in wanted.values() if a.kind == "backward_weight"]
            several, single = ([a for a in weights if (a.at_once > 1) is many] for many in (True, False))
            if several:
                timed = partial(_one_pass, stage, graph, rows, parameters, several)
                found |= _medians(index, timed)
            found |= _medians(index, partial(_one_pass, stage, graph, rows, parameters, single))
    for parameter in parameters.values():
        parameter.grad = None
    with torch.no_grad():
        for name, tensor in buffers.items():
            tensor.copy_(kept[name])
    torch.set_rng_state(random_state)
    return found


def _medians(stage: int, one_pass: Callable[[], dict[str, float]]) -> dict[Work, float]:
    for _ in range(_WARM_UP):
        one_pass()
    passes: list[dict[str, float]] = []
    end = time.monotonic() + _ENOUGH_S
    while len(passes) < _LEAST or (len(passes) < _REPEATS and time.monotonic() < end):
        passes.append(one_pass())
    return {(work, stage): median(seconds[work] for seconds in passes) for work in passes[0]}


def _one_pass(
    stage: StageModule,
    graph: ModelGraph,
    rows: int,
    parameters: Mapping[str, nn.Parameter],
    weights: Sequence[Action] | None = None,
) -> dict[str, float]:
    """Seconds of each kind of work on one micro-batch.

    ``weights`` are the weight halves to time, in parts or of several micro-batches, for which this one counts
    so many times; None: it goes back whole.
    """
    where = next((p.device for p in parameters.values()), torch.device("cpu"))
    inputs = tuple(_rows(spec, rows, where, stage.start > 0) for spec in graph.cut_before(stage.start))
    last = stage.stop == len(graph)
    labels = tuple(_rows(spec, rows, where, False) for spec in graph.labels) if last else ()
    later = None if weights is None else Deferred()
    began = _clock(where)
    outputs = stage(inputs, labels, later)
    middle = _clock(where)
    ends = outputs[:1] if last else outputs
    targets = [t for t in ends if t.requires_grad]
    if targets:
        torch.autograd.backward(targets, [torch.ones_like(t) for t in targets])
    back = _clock(where)
    if weights is None or later is None:
        return {"forward": middle - began, "backward": back - middle}
    seconds = {"forward": middle - began, "backward_input": back - middle}
    for action in weights:
        waiting = [later.copy() for _ in action.micro_batches]
        sizes = partial(_portions, graph, rows, action.at_once)
        start = _clock(where)
        run_together(waiting, *(action.layers or ()), portions=sizes)
        seconds[action.work] = _clock(where) - start
    return seconds


def _portions(graph: ModelGraph, rows: int, count: int, layer: int) -> tuple[int, ...]:
    return portions(graph.layers[layer], rows, count)


def _clock(where: torch.device) -> float:
    """Processor time where one thread does it all, so that nothing else on the machine counts."""
    if where.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter()


def _rows(spec: TensorSpec, rows: int, where: torch.device, inner: bool) -> Tensor:
    """Rows of noise, or of zeros where they are indices."""
    dtype = getattr(torch, spec.dtype)
    shape = (rows, *spec.shape)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=where)
    values = torch.randn(shape, device=where).to(dtype)
    return values.requires_grad_(inner and spec.differentiable)
