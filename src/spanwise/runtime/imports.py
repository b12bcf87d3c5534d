"""Objects by name: ``"module:function"`` and the built-in losses."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from spanwise.core.errors import InputError, SpanwiseError

_LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
}


def load(name: str, what: str) -> Any:
    """The object that ``"module:function"`` names; ``InputError`` if there is none."""
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"job: {what} '{name}' cannot be imported ({error}); check the name and PYTHONPATH"
        ) from None
    return found


def build(name: str, args: Mapping[str, Any], what: str) -> Any:
    """Calls the factory that ``name`` names."""
    factory = load(name, what)
    try:
        return factory(**args)
    except SpanwiseError:
        raise
    except TypeError as error:
        raise InputError(f"job: {what} '{name}' with {dict(args)}: {error}") from None


def data_sets(made: Any) -> tuple[Any, Any]:
    """What a data factory gave as (training set, test set or None): a pair, or one training set."""
    pair = cast("tuple[Any, ...]", made) if isinstance(made, tuple) else ()
    if len(pair) == 2:
        return pair[0], pair[1]
    return cast("Any", made), None


def load_loss(name: str) -> Callable[[Any, Any], Any]:
    """A loss by short name or ``"module:function"``: (outputs, labels) to the mean over rows."""
    if name in _LOSSES:
        return _LOSSES[name]()
    if ":" not in name:
        raise InputError(f"job: loss '{name}' is neither {' nor '.join(_LOSSES)} nor \"module:function\"")
    return load(name, "loss")
