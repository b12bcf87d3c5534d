"""A model and its loss as a flat list of ATen operations: plain data that travels as JSON, no pickle."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from spanwise.core.errors import InputError
from spanwise.ops.arguments import Argument, Ref, decode, encode, references

if TYPE_CHECKING:
    from spanwise.ops.flow import Flow

FORMAT = 1
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: ``op`` is ``aten.conv2d.default`` or one of a few integer operators."""

    name: str
    op: str
    args: tuple[Argument, ...] = ()
    kwargs: tuple[tuple[str, Argument], ...] = ()

    def references(self) -> Iterator[Ref]:
        """Every value that it reads, in argument order."""
        yield from references(self.args)
        for _, value in self.kwargs:
            yield from references(value)


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor from outside: a parameter or buffer of the model (``shape`` whole), or an input or label
    (``shape`` without the batch dimension).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor that is part of the program; ``data`` is base64 of its little-endian bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: str


@dataclass(frozen=True)
class OpGraph:
    """The traced operations in the order in which they ran.

    Attributes:
        nodes: the operations; each refers to earlier ones by name.
        parameters, buffers: under the model's own names. Frozen parameters are buffers.
        constants: tensors that are neither, carried along.
        inputs, labels: of one micro-batch; the first dimension is the batch.
        loss: name of the operation that gives the scalar loss.
        outputs: what the model returns, as references.
    """

    nodes: tuple[Op, ...]
    parameters: tuple[Slot, ...]
    buffers: tuple[Slot, ...]
    constants: tuple[Constant, ...]
    inputs: tuple[Slot, ...]
    labels: tuple[Slot, ...]
    loss: Ref
    outputs: tuple[Ref, ...] = field(default=())

    def __post_init__(self) -> None:
        self._check()

    @cached_property
    def positions(self) -> Mapping[str, int]:
        """Index of each operation by its name."""
        return {node.name: index for index, node in enumerate(self.nodes)}

    @cached_property
    def flow(self) -> Flow:
        """Its data flow, worked out once."""
        from spanwise.ops.flow import Flow

        return Flow(self)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits: equal digests run the same arithmetic."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: no spaces, sorted keys, one text for one graph."""
        data = {
            "format": FORMAT,
            "nodes": [_node_data(node) for node in self.nodes],
            "parameters": [_slot_data(slot) for slot in self.parameters],
            "buffers": [_slot_data(slot) for slot in self.buffers],
            "constants": [{**_slot_data(c), "data": c.data} for c in self.constants],
            "inputs": [_slot_data(slot) for slot in self.inputs],
            "labels": [_slot_data(slot) for slot in self.labels],
            "loss": encode(self.loss),
            "outputs": [encode(ref) for ref in self.outputs],
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> OpGraph:
        """Reads what ``to_json`` wrote.

        Raises:
            InputError: not such a file, of another format, or with references that lead nowhere.
        """
        try:
            data: Any = json.loads(text)
            if data["format"] != FORMAT:
                raise InputError(
                    f"operations: format {data['format']}, this version reads {FORMAT}; trace the model again"
                )
            return cls(
                nodes=tuple(_node(entry) for entry in data["nodes"]),
                parameters=tuple(_slot(entry) for entry in data["parameters"]),
                buffers=tuple(_slot(entry) for entry in data["buffers"]),
                constants=tuple(_constant(entry) for entry in data["constants"]),
                inputs=tuple(_slot(entry) for entry in data["inputs"]),
                labels=tuple(_slot(entry) for entry in data["labels"]),
                loss=_ref(data["loss"]),
                outputs=tuple(_ref(entry) for entry in data["outputs"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"operations: not a traced model ({type(error).__name__}: {error}); trace the model again"
            ) from None

    def _check(self) -> None:
        known = {Ref("batch", "")}
        kinds = (("parameter", self.parameters), ("buffer", self.buffers), ("constant", self.constants),
                 ("input", self.inputs), ("label", self.labels))  # fmt: skip
        for kind, slots in kinds:
            for slot in slots:
                _refuse_double(Ref(kind, slot.name), known)
        for node in self.nodes:
            if not _NAME.fullmatch(node.name):
                raise InputError(f"operations: '{node.name}' is not a name; trace the model again")
            for ref in node.references():
                _require(ref, known, f"operation '{node.name}'")
            _refuse_double(Ref("node", node.name), known)
        for ref in (self.loss, *self.outputs):
            _require(ref, known, "the result")


def _require(ref: Ref, known: set[Ref], where: str) -> None:
    if ref not in known:
        raise InputError(
            f"operations: {where} reads {ref.kind} '{ref.name}', which is not defined before it; "
            "trace the model again"
        )


def _refuse_double(ref: Ref, known: set[Ref]) -> None:
    if ref in known:
        raise InputError(f"operations: {ref.kind} '{ref.name}' is defined twice; trace the model again")
    known.add(ref)


def _node_data(node: Op) -> dict[str, Any]:
    data: dict[str, Any] = {"name": node.name, "op": node.op, "args": encode(node.args)}
    if node.kwargs:
        data["kwargs"] = {key: encode(value) for key, value in node.kwargs}
    return data


def _node(data: Any) -> Op:
    args = decode(data["args"])
    if not isinstance(args, tuple):
        raise InputError(f"operations: arguments of '{data['name']}' are no list; trace the model again")
    kwargs = tuple(sorted((str(key), decode(value)) for key, value in data.get("kwargs", {}).items()))
    return Op(str(data["name"]), str(data["op"]), args, kwargs)


def _slot_data(slot: Slot | Constant) -> dict[str, Any]:
    return {"name": slot.name, "shape": list(slot.shape), "dtype": slot.dtype}


def _slot(data: Any) -> Slot:
    return Slot(str(data["name"]), tuple(int(size) for size in data["shape"]), str(data["dtype"]))


def _constant(data: Any) -> Constant:
    slot = _slot(data)
    return Constant(slot.name, slot.shape, slot.dtype, str(data["data"]))


def _ref(data: Any) -> Ref:
    ref = decode(data)
    if not isinstance(ref, Ref):
        raise InputError(f"operations: {data} is no reference; trace the model again")
    return ref
