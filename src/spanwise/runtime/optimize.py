"""Optimizers and schedulers by name, and their state as tensors under parameter names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from spanwise.core.errors import CheckpointError, InputError
from spanwise.core.job import Job, Recipe

Named = Mapping[str, nn.Parameter]
_SEPARATOR = "::"  # cannot occur in a parameter's name


def make_optimizer(recipe: Recipe, parameters: Named) -> torch.optim.Optimizer:
    """A ``torch.optim`` class by name over parameters in the order given."""
    kind = getattr(torch.optim, recipe.name, None)
    base = torch.optim.Optimizer
    if not (inspect.isclass(kind) and issubclass(kind, base) and kind is not base):
        names = [n for n in dir(torch.optim) if n[0].isupper() and n not in ("Optimizer", "LBFGS")]
        raise InputError(f"optimizer '{recipe.name}' is not in torch.optim; known: {', '.join(names)}")
    if recipe.name == "LBFGS":
        raise InputError("optimizer 'LBFGS' evaluates the loss several times a step; choose another")
    try:
        return kind(list(parameters.values()), **recipe.args)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer '{recipe.name}' with {recipe.args}: {error}") from None


def make_scheduler(recipe: Recipe | None, optimizer: torch.optim.Optimizer) -> Any:
    """A ``torch.optim.lr_scheduler`` class by name, or None."""
    if recipe is None:
        return None
    kind = getattr(torch.optim.lr_scheduler, recipe.name, None)
    base = torch.optim.lr_scheduler.LRScheduler
    if not (inspect.isclass(kind) and issubclass(kind, base) and kind is not base):
        raise InputError(f"scheduler '{recipe.name}' is not in torch.optim.lr_scheduler")
    if recipe.name == "ReduceLROnPlateau":
        raise InputError("scheduler 'ReduceLROnPlateau' needs a metric; choose one that counts steps")
    try:
        return kind(optimizer, **recipe.args)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"scheduler '{recipe.name}' with {recipe.args}: {error}") from None


def check_recipes(job: Job) -> None:
    """``InputError`` now instead of on a worker later."""
    probe = {"probe": nn.Parameter(torch.zeros(1))}
    make_scheduler(job.scheduler, make_optimizer(job.optimizer, probe))


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Named) -> dict[str, Tensor]:
    """State per parameter as ``"name::key"``; independent of which device holds what."""
    out: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                out[f"{name}{_SEPARATOR}{key}"] = torch.as_tensor(value).detach().cpu()
    return out


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Named, state: Mapping[str, Tensor]
) -> None:
    """Puts the state of the parameters that this optimizer holds back."""
    for entry, value in state.items():
        name, _, key = entry.partition(_SEPARATOR)
        parameter = parameters.get(name)
        if parameter is None:
            continue
        if value.dim() and value.shape != parameter.shape and value.numel() == parameter.numel():
            raise CheckpointError(f"optimizer state '{entry}': shape {tuple(value.shape)} does not fit")
        device = parameter.device if value.dim() else value.device
        optimizer.state[parameter][key] = value.clone().to(device)


def group_options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Numbers of the parameter group that schedulers change: learning rate, momentum and so on."""
    group = optimizer.param_groups[0]
    return {k: _plain(v) for k, v in group.items() if k != "params" and _is_plain(_plain(v))}


def load_group_options(optimizer: torch.optim.Optimizer, options: Mapping[str, Any]) -> None:
    """Puts the numbers back."""
    for key, value in options.items():
        plain = tuple(cast("list[Any]", value)) if isinstance(value, list) else value
        optimizer.param_groups[0][key] = plain


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """The plain part of a scheduler's state."""
    if scheduler is None:
        return {}
    return {k: _plain(v) for k, v in scheduler.state_dict().items() if _is_plain(_plain(v))}


def load_scheduler_state(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Puts it back."""
    if scheduler is not None and state:
        scheduler.load_state_dict({**scheduler.state_dict(), **state})


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    return list(cast("Sequence[Any]", value)) if isinstance(value, (tuple, list)) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(v) for v in cast("list[Any]", value))
    return value is None or isinstance(value, (bool, int, float, str))
