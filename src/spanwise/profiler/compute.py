"""Layer times of one device: forward and backward of every layer, inside one pass over the whole chain."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spanwise.core.errors import InputError
from spanwise.core.profile import LayerTimes, TimeTable
from spanwise.ops.allocator import keep_freed_memory
from spanwise.ops.deferred import Deferred
from spanwise.ops.stage_module import StageModule
from spanwise.profiler.export import Sample, fixed_seed
from spanwise.profiler.traced import Traced, layer_stages, received

ROWS = (1, 2, 4, 8, 16, 32, 64)
WARM_UP = 3
MIN_REPEATS = 3
_PARTS = 6  # of the model, as it is spread over a few devices
_PAUSE_S = 5e-3


class Pass(NamedTuple):
    """One pass: seconds of each layer. ``weight`` is empty, or backward is only the input half."""

    forward: list[float]
    backward: list[float]
    weight: list[float]


def measure_layers(
    traced: Traced,
    *,
    rows: tuple[int, ...] = ROWS,
    device: str = "cpu",
    threads: int = 1,
    sample: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    repeats: int = 7,
    budget_s: float = 60.0,
    max_rows: int | None = None,
) -> TimeTable:
    """Times every layer at several numbers of rows.

    The chain is run layer by layer, forward and then backward, with the clock read at every boundary: each
    layer meets the caches that its neighbours leave, and the backward pass of a layer runs that layer
    alone. What one call costs by itself, measured on an empty layer, is taken off. A few more passes run the
    backward in its two halves.

    Args:
        traced: the model; its weights, gradients and buffers stay untouched.
        rows: numbers of rows, rising.
        device: where to measure.
        threads: torch intra-op threads while measuring; restored afterwards.
        sample: inputs and labels of some rows; repeated to the wanted number.
        repeats: timed passes per number of rows, after three warm-up passes; the median counts.
        budget_s: seconds after which larger numbers of rows are left out (times are extrapolated from the two
            largest measured).
        max_rows: larger numbers of rows are not measured.

    Raises:
        InputError: not a single number of rows can be measured.
    """
    keep_freed_memory()  # as workers do
    start = time.perf_counter()
    wanted = [count for count in rows if max_rows is None or count <= max_rows] or [min(rows)]
    measured: list[int] = []
    passes: list[list[Pass]] = []
    halved: list[list[Pass]] = []
    with _threads(threads), fixed_seed():
        bench = LayerBench(traced, Sample(*sample), device, threads)
        for count in wanted:
            spent = time.perf_counter() - start
            last = _pass_s(passes[-1]) * count / measured[-1] if measured else 0.0
            if len(measured) > 1 and spent + (MIN_REPEATS + 1) * last > budget_s:
                break
            fits = int((budget_s - spent) / last) if last else repeats
            try:
                passes.append(bench.passes(count, max(MIN_REPEATS, min(repeats, fits))))
                halved.append(bench.passes(count, MIN_REPEATS, halved=True))
            except InputError:
                if count > 1:
                    raise
                continue  # one value per channel is too few for BatchNorm
            measured.append(count)
        update, summed = _per_byte(bench.parameters, device)
        overhead = bench.overhead()
    if not measured:
        raise InputError(
            f"profile: model '{traced.graph.name}' cannot be measured with {wanted} rows; measure with more"
        )
    return TimeTable(
        rows=tuple(measured),
        layers=tuple(
            _layer_times(passes, halved if layer.weight_flops else None, index, overhead)
            for index, layer in enumerate(traced.graph.layers)
        ),
        update_s_per_byte=update,
        sum_s_per_byte=summed,
        environment=f"torch {torch.__version__}, {device}, {threads} threads",
    )


class SustainedPasses:
    """Forwards and backwards of a model, timed as a device of a pipeline takes to them.

    A device that has only a part of its processor, as others need the rest, comes back to cold caches in
    every portion that it gets, and so does one that has waited for its next rows: the same work takes more
    processor time than undisturbed. So the model runs in a few parts, with a short pause before each.

    Args:
        traced: the model; its weights stay untouched.
        rows: row counts that passes may be asked for.
        sample: inputs and labels of some rows.
        threads: torch intra-op threads.
    """

    def __init__(
        self, traced: Traced, *, rows: Sequence[int],
        sample: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], threads: int,
    ) -> None:  # fmt: skip
        keep_freed_memory()
        self._threads = threads
        with _threads(threads), fixed_seed():
            self._bench = LayerBench(traced, Sample(*sample), "cpu", threads)
            self._parts = self._bench.parts(_PARTS)
            self._batches = {count: self._bench.rows(count) for count in rows}
            for data in self._batches.values():
                self._bench.layer_pass(data, stages=self._parts)

    def seconds(self, rows: Sequence[int], begin_s: float, last_s: float) -> list[float]:
        """The median pass with each row count, in processor seconds where one thread does it all.

        Args:
            rows: of those given at first, one after the other.
            begin_s: when to begin, by ``time.monotonic``; others on this machine begin then too.
            last_s: how long to go on with each row count; three passes at least.
        """
        with _threads(self._threads), fixed_seed():
            time.sleep(max(0.0, begin_s - time.monotonic()))
            return [
                _sustained_s(self._bench, self._parts, self._batches[count], begin_s + (i + 1) * last_s)
                for i, count in enumerate(rows)
            ]


def _sustained_s(bench: LayerBench, parts: Sequence[StageModule], data: Sample, end: float) -> float:
    """Median seconds of the passes until ``end`` by ``time.monotonic``."""
    found: list[float] = []
    while len(found) < MIN_REPEATS or time.monotonic() < end:
        found.append(_pass_s([bench.layer_pass(data, stages=parts, pause_s=_PAUSE_S)]))
    return median(found)


class LayerBench:
    """The layers of a model on copies of its weights, ready to be timed."""

    def __init__(self, traced: Traced, sample: Sample, device: str, threads: int = 1) -> None:
        self.traced, self.graph, self.sample, self.device = traced, traced.graph, sample, device
        self.one_thread = device == "cpu" and threads == 1
        self.parameters = {
            key: nn.Parameter(value.detach().to(device, copy=True))
            for key, value in traced.parameters.items()
        }
        self.buffers = {key: value.detach().to(device, copy=True) for key, value in traced.buffers.items()}
        self.stages = layer_stages(traced, self.parameters, self.buffers, device)

    def parts(self, count: int) -> list[StageModule]:
        """The model in about equally many layers each; less than ``count`` if it has less layers."""
        ends = sorted({round(i * len(self.graph) / count) for i in range(count + 1)})
        return [
            StageModule(
                self.traced.ops, self.graph, start, stop,
                parameters=self.parameters, buffers=self.buffers, device=self.device,
            )
            for start, stop in pairwise(ends)
        ]  # fmt: skip

    def passes(self, rows: int, repeats: int, *, halved: bool = False) -> list[Pass]:
        """Warm-up passes, then timed ones. Gradients add up, as they do over micro-batches.

        Passes with halved backwards come after whole ones at the same rows, and one warms them up.
        """
        data = self.rows(rows)
        for _ in range(1 if halved else WARM_UP):
            self.layer_pass(data, halved=halved)
        return [self.layer_pass(data, halved=halved) for _ in range(repeats)]

    def rows(self, rows: int) -> Sample:
        """A micro-batch on the device."""
        data = self.sample.resized(rows)
        inputs = tuple(value.to(self.device) for value in data.inputs)
        return Sample(inputs, tuple(value.to(self.device) for value in data.labels))

    def layer_pass(
        self, data: Sample, *, halved: bool = False, stages: Sequence[StageModule] = (), pause_s: float = 0.0
    ) -> Pass:
        """Forward and backward, layer by layer; with ``halved`` the weight halves after all input halves.

        ``stages``: other parts of the model than single layers. ``pause_s`` passes before each.
        """
        forward: list[float] = []
        kept: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
        waiting: list[Deferred] = []
        values = data.inputs
        for stage in stages or self.stages:
            if stage.start:
                values = received(values, self.graph.cut_before(stage.start))
            later = Deferred() if halved else None
            _rest(pause_s)
            start = self.clock()
            outputs = stage(values, data.labels, later)
            forward.append(self.clock() - start)
            kept.append((values, outputs))
            if later is not None:
                waiting.insert(0, later)  # from the last layer to the first, as in a run
            values = outputs
        gradients: tuple[Tensor | None, ...] = (torch.ones_like(values[0]), *[None] * (len(values) - 1))
        del values
        backward: list[float] = []
        while kept:
            inputs, outputs = kept.pop()
            _rest(pause_s)
            start = self.clock()
            gradients = _backward(inputs, outputs, gradients)
            backward.append(self.clock() - start)
            del inputs, outputs
        weight: list[float] = []
        for later in waiting:
            start = self.clock()
            later.run()
            weight.append(self.clock() - start)
        return Pass(forward, backward[::-1], weight[::-1])

    def overhead(self) -> tuple[float, float]:
        """Seconds that the call of a layer takes by itself: forward and backward of an empty one."""
        value = torch.zeros(1, device=self.device, requires_grad=True)
        gradient = torch.zeros(1, device=self.device)
        module = _Empty()
        forward: list[float] = []
        backward: list[float] = []
        for _ in range(50):
            start = self.clock()
            (output,) = module((value,), ())
            middle = self.clock()
            torch.autograd.backward([output], [gradient])
            backward.append(self.clock() - middle)
            forward.append(middle - start)
            value.grad = None
        return median(forward), median(backward)

    def clock(self) -> float:
        """Now, when all that was started on the device is done.

        One thread on a CPU is timed by the processor time it gets: other work on the machine does not
        count, and backward runs in the calling thread.
        """
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        return time.thread_time() if self.one_thread else time.perf_counter()


def _rest(seconds: float) -> None:
    if seconds:
        time.sleep(seconds)


class _Empty(nn.Module):
    def forward(self, inputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del labels
        return (inputs[0].view(1),)


def _backward(
    inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of one layer.

    What only passes through a layer stays out of autograd, which would copy it: inside a stage of
    several layers there is no such copy.
    """
    passing: dict[int, Tensor] = {}
    ends: list[Tensor] = []
    seeds: list[Tensor] = []
    for output, gradient in zip(outputs, gradients, strict=True):
        if gradient is None or not output.requires_grad:
            continue
        if output.is_leaf:
            passing[id(output)] = gradient
        else:
            ends.append(output)
            seeds.append(gradient)
    if ends:
        torch.autograd.backward(ends, seeds)
    back: list[Tensor | None] = []
    for value in inputs:
        own, through = value.grad, passing.get(id(value))
        back.append(through if own is None else own if through is None else own.add_(through))
    return tuple(back)


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pass_s(passes: list[Pass]) -> float:
    return median(sum(p.forward) + sum(p.backward) for p in passes)


def _layer_times(
    passes: list[list[Pass]], halved: list[list[Pass]] | None, layer: int, overhead: tuple[float, float]
) -> LayerTimes:
    """``halved`` is None for a layer where nothing of the backward can wait.

    What its forward takes longer, as it prepares for halves, counts with the input half.
    """
    backward = tuple(_net([p.backward[layer] for p in at], overhead[1]) for at in passes)
    into, weight = backward, (0.0,) * len(passes)
    if halved is not None:
        later = (
            max(0.0, median(p.forward[layer] for p in by) - median(p.forward[layer] for p in at))
            for at, by in zip(passes, halved, strict=True)
        )
        into = tuple(
            extra + _net([p.backward[layer] for p in at], overhead[1])
            for extra, at in zip(later, halved, strict=True)
        )
        weight = tuple(median(p.weight[layer] for p in at) for at in halved)
    return LayerTimes(
        forward_s=tuple(_net([p.forward[layer] for p in at], overhead[0]) for at in passes),
        backward_s=backward,
        backward_input_s=into,
        backward_weight_s=weight,
        spread=_spread([p.forward[layer] + p.backward[layer] for p in passes[-1]]),
    )


def _net(times: list[float], overhead: float) -> float:
    """The median without the cost of the call, of which at most half is taken off."""
    middle = median(times)
    return max(middle - overhead, middle / 2)


def _spread(times: list[float]) -> float:
    if len(times) < 2 or not median(times):
        return 0.0
    low, _, high = quantiles(times, n=4, method="inclusive")
    return (high - low) / median(times)


def _per_byte(parameters: dict[str, nn.Parameter], device: str) -> tuple[float, float]:
    """Seconds per byte of parameters: one SGD step with momentum; a device's own part in a gradient sum."""
    trained = [value for value in parameters.values() if value.grad is not None]
    size = sum(value.numel() * value.element_size() for value in trained)
    if not size:
        return 0.0, 0.0
    gradients = [value.grad for value in trained if value.grad is not None]
    optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)

    def summed() -> None:  # as ``runtime/executor.py`` and ``runtime/collectives.py`` do
        flat = torch.cat([g.reshape(-1) for g in gradients])
        flat.add_(torch.ones_like(flat[:1]).expand_as(flat))
        for gradient, part in zip(
            gradients, flat.split_with_sizes([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    update_s = _median_s(lambda: optimizer.step(), device)  # pyright: ignore
    return update_s / size, _median_s(summed, device) / size


def _median_s(work: Callable[[], object], device: str) -> float:
    times: list[float] = []
    for _ in range(WARM_UP + 5):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[WARM_UP:])
