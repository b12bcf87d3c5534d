"""Arguments of operations as data: references, numbers, text, lists, and torch's own enumerations by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, Union, cast

from spanwise.core.errors import InputError

REF_KINDS = ("node", "parameter", "buffer", "constant", "input", "label", "batch")
TORCH_KINDS = ("dtype", "layout", "memory_format", "device")


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of the graph. ``batch`` is the number of rows, which every stage reads off its own input."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class TorchName:
    """A dtype, layout or memory format by its name, or the device of the stage (``name`` empty)."""

    kind: str
    name: str


Argument: TypeAlias = Union["Ref", "TorchName", "tuple[Argument, ...]", int, float, bool, str, None]


def references(argument: Argument) -> Iterator[Ref]:
    """Every reference inside an argument, in order."""
    if isinstance(argument, Ref):
        yield argument
    elif isinstance(argument, tuple):
        for item in argument:
            yield from references(item)


def replaced(argument: Argument, by: Mapping[Ref, Argument]) -> Argument:
    """The same argument with some references replaced."""
    if isinstance(argument, Ref):
        return by.get(argument, argument)
    if isinstance(argument, tuple):
        return tuple(replaced(item, by) for item in argument)
    return argument


def encode(argument: Argument) -> Any:
    """To JSON data: references and torch names become one-key objects, lists stay lists."""
    if isinstance(argument, (Ref, TorchName)):
        return {argument.kind: argument.name}
    if isinstance(argument, tuple):
        return [encode(item) for item in argument]
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": repr(argument)}
    return argument


def decode(data: Any) -> Argument:
    """From JSON data; raises ``InputError`` for anything that ``encode`` does not write."""
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return tuple(decode(item) for item in cast("list[Any]", data))
    if isinstance(data, dict) and len(cast("dict[str, Any]", data)) == 1:
        kind, name = next(iter(cast("dict[str, Any]", data).items()))
        if isinstance(name, str):
            if kind in REF_KINDS:
                return Ref(kind, name)
            if kind in TORCH_KINDS:
                return TorchName(kind, name)
            if kind == "float" and name in ("inf", "-inf", "nan"):
                return float(name)
    raise InputError(f"operations: '{data}' is no argument of an operation; trace the model again")
