"""A stage of the model as a module: the operations of some layers as one generated function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from spanwise.core.errors import InputError
from spanwise.core.model import ModelGraph
from spanwise.ops.arguments import Argument, Ref, TorchName
from spanwise.ops.deferred import Deferred, deferrable
from spanwise.ops.flow import is_random, written
from spanwise.ops.opgraph import Op, OpGraph
from spanwise.ops.recompute import Forward, Recomputed, Scratch, Tensors, run_parts
from spanwise.ops.resolve import resolve, torch_value, unpack_constant
from spanwise.ops.sparse import Places, Sparse

# Position of the flag that lets batch_norm use cuDNN, which a trace on a CPU leaves off.
_CUDNN_FLAG = {"aten.batch_norm.default": 8}


class StageModule(nn.Module):
    """Layers ``[start, stop)`` of a traced model.

    It holds the given parameter and buffer objects, no copies, under the model's own names: two stages
    on one device that are given the same mapping share tied weights.

    Args:
        ops: the traced operations.
        graph: their layers.
        start, stop: half-open range of layers.
        parameters, buffers: at least those that these layers use, on ``device``.
        device: where it runs, ``cpu`` or ``cuda:0``.
        recompute: ranges of its layers whose forward runs again in backward (see ``Stage.recompute``).
        sparse: if given, layers keep only what those parameters need that want a gradient. Neither layers run
            again nor a backward in halves go with it.

    Raises:
        InputError: the range or the graph does not fit, or a tensor is missing or of another shape, dtype
            or device.
    """

    def __init__(
        self,
        ops: OpGraph,
        graph: ModelGraph,
        start: int,
        stop: int,
        *,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        device: str = "cpu",
        recompute: tuple[tuple[int, int], ...] = (),
        sparse: Sparse | None = None,
    ) -> None:
        super().__init__()
        if sparse is not None and recompute:
            raise InputError(
                f"stage [{start}:{stop}): runs layers again and trains some parameters only; choose one"
            )
        _check_range(ops, graph, start, stop)
        self.start, self.stop, self._sparse = start, stop, sparse
        self.device = torch.device(device)
        self._last = stop == len(graph)
        self._nodes = ops.flow.stage(graph.layers[start].ops[0], graph.layers[stop - 1].ops[1])
        if start == 0:
            self._inputs = tuple(Ref("input", slot.name) for slot in ops.inputs)
        else:
            self._inputs = tuple(Ref("node", spec.name) for spec in graph.cut_before(start))
        self._labels = tuple(Ref("label", slot.name) for slot in ops.labels) if self._last else ()
        if self._last:
            self._results = (ops.loss, *ops.outputs)
        else:
            self._results = tuple(Ref("node", spec.name) for spec in graph.layers[stop - 1].outputs)
        used = {ref for i in self._nodes for ref in ops.nodes[i].references()} | set(self._results)
        self._hold(ops, used, parameters, buffers)
        self._halved: Forward | None = None  # made when it is first asked for
        self._make_halved = lambda: self._generate(ops, graph, used, deferring=True)
        if recompute:
            edges = sorted({start, stop, *chain(*recompute)})
            parts = [self._part(ops, graph, a, b, (a, b) in recompute) for a, b in pairwise(edges)]
            self._whole = self._halved = partial(run_parts, parts)
        else:
            self._whole = self._generate(ops, graph, used, deferring=False)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The model's own names of the parameters it trains, in the order of the trace."""
        return tuple(self._parameters)

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """The model's own names of the buffers (and frozen parameters) it uses."""
        return tuple(self._buffers)

    def forward(self, inputs: Tensors, labels: Tensors = (), later: Deferred | None = None) -> Tensors:
        """Runs the layers on one micro-batch.

        Args:
            inputs: the model's inputs if this is the first stage, else the tensors of the cut before it, in
                order; the first dimension is the rows, at least one.
            labels: of the same rows; only the last stage reads them.
            later: if given, backward leaves the weight gradients of the products to it.

        Returns:
            The tensors of the cut behind it in order, or ``(loss, *model outputs)`` from the last stage. A
            tensor that only passes through is returned as it came.
        """
        if len(inputs) != len(self._inputs) or len(labels) < len(self._labels):
            raise InputError(
                f"stage [{self.start}:{self.stop}) takes {len(self._inputs)} inputs and {len(self._labels)} "
                f"labels, got {len(inputs)} and {len(labels)}; pass the tensors of the cut before it in order"
            )
        if later is None:
            return self._whole(inputs, labels, None)
        if self._sparse is not None:
            raise InputError(
                f"stage [{self.start}:{self.stop}) trains some parameters only and cannot go back in halves"
            )
        if self._halved is None:
            self._halved = self._make_halved()
        return self._halved(inputs, labels, later)

    def _part(self, ops: OpGraph, graph: ModelGraph, start: int, stop: int, again: bool) -> Forward:
        """Some of its layers; run again on copies of the buffers that they overwrite."""

        def module(buffers: Mapping[str, Tensor]) -> StageModule:
            parameters = {k: p for k, p in self._parameters.items() if p is not None}
            return StageModule(
                ops, graph, start, stop, parameters=parameters, buffers=buffers, device=str(self.device)
            )

        buffers = {k: b for k, b in self._buffers.items() if b is not None}
        first = module(buffers)
        if not again:
            return first
        scratch = first._scratch(ops)
        copies = {name: copied.own for name, copied in scratch.items()}
        outputs = graph.layers[stop - 1].outputs
        return Recomputed(
            first=first,
            again=module(buffers | copies),
            passed=tuple(
                first._inputs.index(ref) if ref in first._inputs else None for ref in first._results
            ),
            fixed=tuple(index for index, spec in enumerate(outputs) if not spec.differentiable),
            scratch=tuple(scratch.values()),
            draws=any(is_random(ops.nodes[i].op) for i in first._nodes),
            device=self.device,
        )

    def _scratch(self, ops: OpGraph) -> dict[str, Scratch]:
        """The buffers that its operations overwrite, by name."""
        groups = ops.flow.groups
        writers: dict[int, list[str]] = {}
        for node in (ops.nodes[i] for i in self._nodes):
            for ref in written(node):
                writers.setdefault(groups[ref], []).append(node.op)
        found: dict[str, Scratch] = {}
        for name, shared in self._buffers.items():
            by = writers.get(groups[Ref("buffer", name)])
            if by is not None and shared is not None:
                # In training batch_norm only adds to its running statistics and never reads them.
                reads = any(op != "aten.batch_norm.default" for op in by)
                found[name] = Scratch(shared, shared.detach().clone(), reads)
        return found

    def _hold(
        self,
        ops: OpGraph,
        used: set[Ref],
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
    ) -> None:
        # register_parameter refuses dots; the dictionaries do not, and so names stay the model's own.
        for slot in ops.parameters:
            if Ref("parameter", slot.name) in used:
                tensor = parameters.get(slot.name)
                self._check(slot.name, "parameter", slot.shape, slot.dtype, tensor)
                self._parameters[slot.name] = tensor
        for slot in ops.buffers:
            if Ref("buffer", slot.name) in used:
                tensor = buffers.get(slot.name)
                self._check(slot.name, "buffer", slot.shape, slot.dtype, tensor)
                self._buffers[slot.name] = tensor

    def _check(self, name: str, kind: str, shape: tuple[int, ...], dtype: str, value: Tensor | None) -> None:
        stage = f"stage [{self.start}:{self.stop})"
        if value is None:
            raise InputError(f"{stage}: {kind} '{name}' is missing; pass all that its layers use")
        # A run may be in another precision than the trace; the shape is what the operations rely on.
        if tuple(value.shape) != shape:
            raise InputError(
                f"{stage}: {kind} '{name}' has shape {tuple(value.shape)}, the traced model has {shape}; "
                "use the weights of the traced model"
            )
        if value.is_floating_point() != torch_value(TorchName("dtype", dtype), self.device).is_floating_point:
            raise InputError(f"{stage}: {kind} '{name}' is {value.dtype}, the traced model has {dtype}")
        if value.device.type != self.device.type:
            raise InputError(
                f"{stage}: {kind} '{name}' is on {value.device}, the stage on {self.device}; move it first"
            )

    def _generate(self, ops: OpGraph, graph: ModelGraph, used: set[Ref], *, deferring: bool) -> Forward:
        """Python source of the whole stage; every value is dropped right after its last use."""
        scope: dict[str, Any] = {}
        names: dict[Ref, str] = {}
        for number, slot in enumerate(ops.parameters):
            names[Ref("parameter", slot.name)] = f"p{number}"
            scope[f"p{number}"] = self._parameters.get(slot.name)
        for number, slot in enumerate(ops.buffers):
            names[Ref("buffer", slot.name)] = f"b{number}"
            scope[f"b{number}"] = self._buffers.get(slot.name)
        for number, constant in enumerate(ops.constants):
            ref = Ref("constant", constant.name)
            names[ref] = f"c{number}"
            if ref in used:
                scope[f"c{number}"] = unpack_constant(constant, self.device)
        writer = _Source(scope, names, self.device, deferring=deferring, sparse=self._sparse)
        nodes, layers = [ops.nodes[i] for i in self._nodes], [graph.layer_of(i) for i in self._nodes]
        text = writer.function(nodes, self._inputs, self._labels, self._results, layers)
        exec(compile(text, f"<stage [{self.start}:{self.stop})>", "exec"), scope)
        return scope["forward"]


class _Source:
    """Writes the function. Nothing from the graph enters the source but numbers and quoted text."""

    def __init__(
        self, scope: dict[str, Any], names: dict[Ref, str], device: torch.device, *, deferring: bool,
        sparse: Sparse | None = None,
    ) -> None:  # fmt: skip
        self.scope, self.names, self.device, self.deferring = scope, names, device, deferring
        self.sparse = sparse
        self.bound: dict[Any, str] = {}
        self.places = Places((), ())

    def function(
        self,
        nodes: list[Op],
        inputs: tuple[Ref, ...],
        labels: tuple[Ref, ...],
        results: tuple[Ref, ...],
        layers: list[int],
    ) -> str:
        """Source text; ``layers`` has the layer of each node."""
        lines = ["def forward(inputs, labels, later):"]
        for index, ref in enumerate(inputs):
            self.names[ref] = f"x{index}"
            lines.append(f"    x{index} = inputs[{index}]")
        for index, ref in enumerate(labels):
            self.names[ref] = f"y{index}"
            lines.append(f"    y{index} = labels[{index}]")
        self.names[Ref("batch", "")] = "batch"
        lines += ["    batch = x0.shape[0]", "    del inputs, labels"]
        last = {ref: index for index, node in enumerate(nodes) for ref in node.references()}
        own = {*inputs, *labels}
        self.places = Places(nodes, results)
        for index, node in enumerate(nodes):
            self.names[Ref("node", node.name)] = f"v{index}"
            lines.append(f"    v{index} = {self.call(node, layers[index])}")
            own.add(Ref("node", node.name))
            read = dict.fromkeys((*node.references(), Ref("node", node.name)))
            dead = [
                self.names[r] for r in read if last.get(r, index) == index and r in own and r not in results
            ]
            if dead:
                lines.append(f"    del {', '.join(dead)}")
        lines.append(f"    return ({''.join(self.names[ref] + ', ' for ref in results)})")
        return "\n".join(lines) + "\n"

    def call(self, node: Op, layer: int) -> str:
        args = list(node.args)
        flag = _CUDNN_FLAG.get(node.op)
        if flag is not None and len(args) > flag and self.device.type == "cuda":
            args[flag] = True
        parts = [self.text(arg) for arg in args]
        parts += [f"{self.keyword(key)}={self.text(value)}" for key, value in node.kwargs]
        function = resolve(node.op)
        if node.op == "aten.batch_norm.default":
            function = batch_norm
        replacement = None if self.sparse is None else self.sparse.function(node, self.places.of(node))
        if replacement is not None:
            function = replacement
        waits = deferrable(node) if self.deferring else None
        if waits is not None:
            function = waits
            parts = ["later", str(layer), *parts]
        return f"{self.bind(function, 'f')}({', '.join(parts)})"

    def keyword(self, key: str) -> str:
        if not key.isidentifier():
            raise InputError(f"operations: '{key}' is no argument name; trace the model again")
        return key

    def text(self, argument: Argument) -> str:
        if isinstance(argument, Ref):
            if argument not in self.names:
                raise InputError(
                    f"operations: {argument.kind} '{argument.name}' is used by a stage that lacks it; "
                    "the layers belong to another trace"
                )
            return self.names[argument]
        if isinstance(argument, TorchName):
            return self.bind(torch_value(argument, self.device), "t")
        if isinstance(argument, tuple):
            return f"[{', '.join(self.text(item) for item in argument)}]"
        if isinstance(argument, float):
            return repr(argument) if math.isfinite(argument) else f"float({str(argument)!r})"
        return repr(argument)

    def bind(self, value: Any, prefix: str) -> str:
        name = self.bound.get(value)
        if name is None:
            name = self.bound[value] = f"{prefix}_{len(self.bound)}"
            self.scope[name] = value
        return name


def batch_norm(x: Tensor, *args: Any) -> Tensor:
    """ATen's batch_norm with the check that ``torch.nn.functional`` makes before it.

    Without it one value per channel gives zeros and a running variance that is not a number.
    """
    training = args[4]
    if training and x.numel() == x.shape[1]:
        raise InputError(
            f"BatchNorm: {x.shape[0]} row of shape {tuple(x.shape[1:])} has 1 value per channel, at least 2 "
            "are needed in training; give every replica of this layer 2 rows or more of a micro-batch"
        )
    return torch.ops.aten.batch_norm.default(x, *args)


def _check_range(ops: OpGraph, graph: ModelGraph, start: int, stop: int) -> None:
    if not 0 <= start < stop <= len(graph):
        raise InputError(
            f"stage [{start}:{stop}): model '{graph.name}' has layers [0:{len(graph)}); choose a range inside"
        )
    if graph.source_digest != ops.digest:
        raise InputError(
            f"stage [{start}:{stop}): layers of trace {graph.source_digest[:16]}, operations of "
            f"{ops.digest[:16]}; pass both of one trace"
        )
