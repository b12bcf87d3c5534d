"""From names to what torch runs. Only ATen and a few operators on integers; nothing else can be named."""

from __future__ import annotations

import base64
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from spanwise.core.errors import InputError
from spanwise.ops.arguments import TorchName
from spanwise.ops.opgraph import Constant

OPERATORS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "getitem")
}

# ATen, but reaching beyond tensors.
_FORBIDDEN = frozenset({"from_file"})


def resolve(op: str) -> Callable[..., Any]:
    """The callable of ``aten.<name>.<overload>`` or ``operator.<name>``.

    Raises:
        InputError: the name is neither, or this torch does not know it.
    """
    if op in OPERATORS:
        return OPERATORS[op]
    space, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    if space == "aten" and name.isidentifier() and overload.isidentifier() and name not in _FORBIDDEN:
        try:
            found = getattr(getattr(torch.ops.aten, name), overload)
        except AttributeError:
            found = None
        if isinstance(found, torch._ops.OpOverload):  # pyright: ignore[reportPrivateUsage]
            return cast("Callable[..., Any]", found)
    raise InputError(
        f"operation '{op}' is not one of torch {torch.__version__}'s ATen operations; "
        "trace the model with this version of torch"
    )


def schema(op: str) -> torch.FunctionSchema | None:
    """The declared signature of an ATen operation; none for integer operators."""
    if op in OPERATORS:
        return None
    return resolve(op)._schema  # pyright: ignore[reportFunctionMemberAccess]


def dtype_of(name: str) -> torch.dtype:
    """``float32`` to ``torch.float32``."""
    found = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(found, torch.dtype):
        raise InputError(f"operations: '{name}' is no dtype; trace the model again")
    return found


def name_of(value: torch.dtype | torch.layout | torch.memory_format) -> str:
    """``torch.float32`` to ``float32``."""
    return str(value).removeprefix("torch.")


def torch_value(name: TorchName, device: torch.device) -> Any:
    """What a :class:`TorchName` stands for on a device."""
    if name.kind == "device":
        return device
    if name.kind == "dtype":
        return dtype_of(name.name)
    kind = torch.layout if name.kind == "layout" else torch.memory_format
    found = getattr(torch, name.name, None) if name.name.isidentifier() else None
    if not isinstance(found, kind):
        raise InputError(f"operations: '{name.name}' is no {name.kind}; trace the model again")
    return found


def pack_constant(name: str, value: Tensor) -> Constant:
    """A tensor as base64 text."""
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data = base64.b64encode(flat.numpy().tobytes()).decode("ascii")
    return Constant(name, tuple(value.shape), name_of(value.dtype), data)


def unpack_constant(constant: Constant, device: torch.device) -> Tensor:
    """The tensor of :func:`pack_constant` on a device."""
    dtype = dtype_of(constant.dtype)
    try:
        raw = bytearray(base64.b64decode(constant.data, validate=True))
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.reshape(constant.shape).to(device)
    except (ValueError, RuntimeError):
        raise InputError(
            f"operations: constant '{constant.name}' does not hold {constant.shape} {constant.dtype}; "
            "trace the model again"
        ) from None
