"""From torch.export's graph to an OpGraph: own names, sub-graphs inlined, checks dropped, sizes formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from spanwise.core.errors import ExportError
from spanwise.ops.arguments import Argument, Ref, TorchName, replaced
from spanwise.ops.flow import is_random, written
from spanwise.ops.opgraph import Constant, Op, OpGraph, Slot
from spanwise.ops.resolve import OPERATORS, name_of, pack_constant, schema
from spanwise.profiler.export import ModelWithLoss, Sample, traced_place

MAX_CONSTANT_BYTES = 2**20

_OPERATOR_NAMES = {function: name for name, function in OPERATORS.items()}
_CHECKS = frozenset({
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range",
    "sym_constrain_range_for_size", "_functional_assert_async",
})  # fmt: skip
_SWITCHES = frozenset({"wrap_with_set_grad_enabled"})


@dataclass(frozen=True)
class Normalized:
    """An OpGraph, the model's own tensors for it, and the module path of each node."""

    ops: OpGraph
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    paths: tuple[str, ...]


def normalize(
    program: torch.export.ExportedProgram, wrapper: ModelWithLoss, sample: Sample, name: str
) -> Normalized:
    """Translates an exported program.

    Raises:
        ExportError: an operation is unknown or cannot be part of a stage; names it and what to do.
    """
    return _Normalizer(program, wrapper, sample, name).run()


@dataclass
class _Normalizer:
    program: torch.export.ExportedProgram
    wrapper: ModelWithLoss
    sample: Sample
    name: str
    nodes: list[Op] = field(default_factory=list[Op])
    paths: list[str] = field(default_factory=list[str])
    env: dict[fx.Node, Argument] = field(default_factory=dict[fx.Node, Argument])
    parameters: dict[str, nn.Parameter] = field(default_factory=dict[str, nn.Parameter])
    buffers: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    constants: dict[str, Constant] = field(default_factory=dict[str, Constant])
    inputs: list[Slot] = field(default_factory=list[Slot])
    labels: list[Slot] = field(default_factory=list[Slot])
    batch: Any = None

    def run(self) -> Normalized:
        self._placeholders()
        graph = self.program.graph
        for node in graph.nodes:
            if node.op == "call_function":
                self._call(node, self.program.graph_module)
            elif node.op not in ("placeholder", "output", "get_attr"):
                raise self._refusal(node, "cannot be part of a stage")
        (results,) = graph.output_node().args
        kinds = [spec.kind for spec in self.program.graph_signature.output_specs]
        wanted = (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)
        loss, *outputs = [
            self._argument(value)
            for value, kind in zip(_items(results), kinds, strict=True)
            if kind in wanted
        ]
        return self._finish(loss, outputs)

    def _finish(self, loss: Argument, outputs: list[Argument]) -> Normalized:
        if not isinstance(loss, Ref) or loss.kind != "node":
            raise ExportError(
                f"model '{self.name}': the loss does not come from an operation; compute it from the outputs"
            )
        results = tuple(ref for ref in outputs if isinstance(ref, Ref))
        keep = _alive(self.nodes, {loss, *results})
        nodes = tuple(self.nodes[i] for i in keep)
        used = {ref for node in nodes for ref in node.references()} | {loss, *results}
        ops = self._checked(
            OpGraph(
                nodes=nodes,
                parameters=tuple(
                    _slot(n, t) for n, t in self.parameters.items() if Ref("parameter", n) in used
                ),
                buffers=tuple(_slot(n, t) for n, t in self.buffers.items() if Ref("buffer", n) in used),
                constants=tuple(c for c in self.constants.values() if Ref("constant", c.name) in used),
                inputs=tuple(self.inputs),
                labels=tuple(self.labels),
                loss=loss,
                outputs=results,
            )
        )
        added = len(ops.nodes) - len(nodes)
        return Normalized(
            ops,
            {slot.name: self.parameters[slot.name] for slot in ops.parameters},
            {slot.name: self.buffers[slot.name] for slot in ops.buffers},
            ("",) * added + tuple(self.paths[i] for i in keep),
        )

    def _placeholders(self) -> None:
        own = {id(p): n for n, p in self.wrapper.model.named_parameters()}
        own.update({id(b): n for n, b in self.wrapper.model.named_buffers()})
        persistent = set(self.wrapper.model.state_dict(keep_vars=True))
        given = iter((*self.sample.inputs, *self.sample.labels))
        nodes = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind == InputKind.USER_INPUT:
                self.env[node] = self._user_input(node, next(given))
                continue
            if not node.users:
                continue
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                raise self._refusal(
                    node, f"is a {spec.kind.name.lower()}, which cannot travel to another device"
                )
            self.env[node] = self._state(str(spec.target), own, persistent)

    def _user_input(self, node: fx.Node, value: Tensor) -> Ref:
        kind, slots = (
            ("input", self.inputs) if len(self.inputs) < len(self.sample.inputs) else ("label", self.labels)
        )
        if self.batch is None:
            self.batch = _expression(node.meta["val"].shape[0])
        name = f"{kind}_{len(slots)}"
        slots.append(Slot(name, tuple(value.shape[1:]), name_of(value.dtype)))
        return Ref(kind, name)

    def _state(self, target: str, own: Mapping[int, str], persistent: set[str]) -> Ref:
        value = self._tensor(target)
        name = own.get(id(value))
        if isinstance(value, nn.Parameter) and name is None:
            raise ExportError(
                f"model '{self.name}': the loss has a parameter of its own ('{target}'); put it in the model"
            )
        if name is None or name not in persistent:
            return self._constant(name or target, value)
        if isinstance(value, nn.Parameter) and value.requires_grad:
            self.parameters[name] = value
            return Ref("parameter", name)
        self.buffers[name] = value
        return Ref("buffer", name)

    def _tensor(self, target: str) -> Tensor:
        constants = self.program.constants
        owner, _, leaf = target.rpartition(".")
        try:
            value = getattr(self.wrapper.get_submodule(owner), leaf)
        except AttributeError:
            value = None
        if isinstance(value, Tensor):
            return value
        found = constants.get(target)
        if isinstance(found, Tensor):
            return found
        raise ExportError(
            f"model '{self.name}': '{target}' is no tensor of the model; register it as a buffer"
        )

    def _constant(self, target: str, value: Tensor) -> Ref:
        size = value.numel() * value.element_size()
        if size > MAX_CONSTANT_BYTES:
            raise ExportError(
                f"model '{self.name}': constant '{target}' has {size} bytes, at most {MAX_CONSTANT_BYTES} "
                "travel with the operations; register it as a persistent buffer"
            )
        name = f"constant_{len(self.constants)}"
        self.constants[name] = pack_constant(name, value)
        return Ref("constant", name)

    def _call(self, node: fx.Node, owner: fx.GraphModule) -> None:
        target: Any = node.target
        if node in self.env:  # a result of an unfolded sub-graph
            return
        if target in _OPERATOR_NAMES:
            self._add_size_or_op(node, _OPERATOR_NAMES[target])
        elif isinstance(target, torch._ops.OpOverload):  # pyright: ignore[reportPrivateUsage]
            short, _, overload = target.name().rpartition("::")[2].partition(".")
            if short in _CHECKS:
                return
            if target.namespace != "aten":
                raise self._refusal(node, "is no ATen operation; replace it by torch's own operations")
            self._add_size_or_op(node, f"aten.{short}.{overload or 'default'}")
        elif isinstance(target, torch._ops.HigherOrderOperator):  # pyright: ignore[reportPrivateUsage]
            self._inline(node, owner)
        # Anything else works on sizes or truth values; it is refused where a tensor operation uses it.

    def _add_size_or_op(self, node: fx.Node, op: str) -> None:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            self.env[node] = self._size(node, op, value)
            return
        if isinstance(value, (torch.SymBool, torch.SymFloat, bool, float)):
            return
        self.env[node] = self._add(node, op)

    def _size(self, node: fx.Node, op: str, value: Any) -> Argument:
        """Sizes as whole-number formulas of the batch size, so that each stage can work them out itself."""
        if isinstance(value, int):
            return value
        expression = _expression(value)
        if not expression.free_symbols <= {self.batch}:
            raise self._refusal(
                node, "gives a size that depends on the values of a tensor; use masking instead of selecting"
            )
        if expression.is_Integer:
            return int(expression)
        if expression == self.batch:
            return Ref("batch", "")
        offset = expression.subs(self.batch, 0)
        factor = expression.subs(self.batch, 1) - offset
        linear = (factor * self.batch + offset - expression).expand() == 0
        if not (linear and factor.is_Integer and offset.is_Integer):
            if op in OPERATORS:
                return self._add(node, op)
            raise self._refusal(node, f"gives the size {expression}, which is not linear in the batch size")
        return self._linear(node, int(factor), int(offset))

    def _linear(self, node: fx.Node, factor: int, offset: int) -> Ref:
        result = Ref("batch", "")
        if factor != 1:
            result = self._append(node, "operator.mul", (result, factor))
        if offset:
            result = self._append(node, "operator.add", (result, offset))
        return result

    def _add(self, node: fx.Node, op: str) -> Ref:
        args = tuple(self._argument(value) for value in node.args)
        kwargs = tuple(sorted((key, self._argument(value)) for key, value in node.kwargs.items()))
        ref = self._append(node, op, args, kwargs)
        declared = schema(op)
        if declared is not None and declared.arguments and op.split(".")[1].endswith("_"):
            info = declared.arguments[0].alias_info
            target = args[0] if args else None
            if info is not None and info.is_write and isinstance(target, Ref) and target.kind == "node":
                # Who reads the overwritten value from now on reads the result of the overwriting.
                for key, held in self.env.items():
                    if held == target:
                        self.env[key] = ref
        return ref

    def _append(
        self,
        node: fx.Node,
        op: str,
        args: tuple[Argument, ...],
        kwargs: tuple[tuple[str, Argument], ...] = (),
    ) -> Ref:
        name = f"{op.split('.')[1]}_{len(self.nodes)}"
        self.nodes.append(Op(name, op, args, kwargs))
        self.paths.append(_module_path(node))
        return Ref("node", name)

    def _argument(self, value: Any) -> Argument:
        if isinstance(value, fx.Node):
            if value not in self.env:
                raise self._refusal(
                    value, "computes a number or truth value that cannot be traced; keep to tensors"
                )
            return self.env[value]
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(item) for item in _items(value))
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.device):
            return TorchName("device", "")
        if isinstance(value, torch.dtype):
            return TorchName("dtype", name_of(value))
        if isinstance(value, torch.layout):
            return TorchName("layout", name_of(value))
        if isinstance(value, torch.memory_format):
            return TorchName("memory_format", name_of(value))
        raise ExportError(
            f"model '{self.name}': an operation has an argument of type {type(value).__name__}, which cannot "
            "travel as data; use numbers and tensors"
        )

    def _inline(self, node: fx.Node, owner: fx.GraphModule) -> None:
        """Unfolds ``with torch.no_grad()`` (inputs detached) and its opposite."""
        kind = str(node.target)
        if kind not in _SWITCHES:
            raise self._refusal(
                node, "is control flow or a wrapper that stages cannot run; write it with plain operations"
            )
        enabled, body, *given = node.args
        inner: Any = getattr(owner, str(body.target))  # type: ignore[union-attr]
        places = [n for n in inner.graph.nodes if n.op == "placeholder"]
        for place, value in zip(places, given, strict=True):
            ref = self._argument(value)
            val = place.meta.get("val")
            if not enabled and isinstance(val, Tensor) and val.is_floating_point() and isinstance(ref, Ref):
                ref = self._append(node, "aten.detach.default", (ref,))
            self.env[place] = ref
        for child in inner.graph.nodes:
            if child.op == "call_function":
                self._call(child, inner)
        results = _items(inner.graph.output_node().args[0])
        for user in list(node.users):
            if user.target is not _GETITEM:
                raise self._refusal(node, "is used in a way that cannot be unfolded")
            self.env[user] = self._argument(results[cast("int", user.args[1])])

    def _checked(self, ops: OpGraph) -> OpGraph:
        """Refuses overwritten parameters; gives overwritten inputs a copy, as a batch may be used again."""
        flow, copied = ops.flow, list[Ref]()
        for group, positions in flow.writers.items():
            for ref in flow.members[group]:
                if ref.kind in ("parameter", "constant"):
                    raise ExportError(
                        f"model '{self.name}': '{ops.nodes[positions[0]].op}' overwrites the {ref.kind} "
                        f"'{ref.name}' in the forward pass; make it a persistent buffer, or leave it to the "
                        "optimizer"
                    )
                if ref.kind in ("input", "label"):
                    copied.append(ref)
        return _with_copies(ops, copied) if copied else ops

    def _refusal(self, node: fx.Node, why: str) -> ExportError:
        path = _module_path(node)
        where = f" in '{path}'" if path else ""
        place = traced_place(str(node.meta.get("stack_trace") or ""))
        return ExportError(f"model '{self.name}': {place}operation '{node.target}'{where} {why}")


_GETITEM = OPERATORS["operator.getitem"]


def _alive(nodes: list[Op], results: set[Ref]) -> list[int]:
    """Operations that the results need, that overwrite something, or that draw random numbers."""
    needed = {ref.name for ref in results if ref.kind == "node"}
    keep: list[int] = []
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        if node.name in needed or written(node) or is_random(node.op):
            keep.append(index)
            needed.update(ref.name for ref in node.references() if ref.kind == "node")
    return keep[::-1]


def _with_copies(ops: OpGraph, copied: list[Ref]) -> OpGraph:
    copies = tuple(Op(f"copy_of_{r.kind}_{i}", "aten.clone.default", (r,)) for i, r in enumerate(copied))
    by: dict[Ref, Argument] = {r: Ref("node", c.name) for r, c in zip(copied, copies, strict=True)}
    nodes = tuple(
        replace(n, args=tuple(replaced(a, by) for a in n.args),
                kwargs=tuple((k, replaced(v, by)) for k, v in n.kwargs))
        for n in ops.nodes
    )  # fmt: skip
    return replace(ops, nodes=copies + nodes)


def _items(value: Any) -> list[Any]:
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else [value]


def _slot(name: str, tensor: Tensor) -> Slot:
    return Slot(name, tuple(tensor.shape), name_of(tensor.dtype))


def _expression(size: torch.SymInt) -> Any:
    """The formula of a size, a sympy expression."""
    node: Any = size.node  # pyright: ignore[reportUnknownMemberType]
    return node.expr


def _module_path(node: fx.Node) -> str:
    """Path of the innermost module, as in the model's own ``named_modules``."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.removeprefix("L['self'].").removeprefix("model").removeprefix(".") if path else ""
