"""What to train and under which constraints."""

from __future__ import annotations

from typing import Any, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator

from spanwise.core.errors import InputError
from spanwise.core.noun import Noun

LIVE = "live"  # stands for an object that was handed over in Python and has no importable name


class Recipe(Noun):
    """The name of something to build and its keyword arguments: ``{name = "SGD", lr = 0.1}``."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _flat_form(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"name": data}
        if isinstance(data, dict) and "args" not in data and "name" in data:
            flat = cast("dict[str, Any]", data)
            return {"name": flat["name"], "args": {k: v for k, v in flat.items() if k != "name"}}
        return cast("Any", data)


_EITHER = {"scheduler_every": ("epoch", "step"), "statistics": ("batch", "stored")}


class Job(Noun):
    """One training task.

    Attributes:
        model: factory of an ``nn.Module`` as ``"module:function"``.
        loss: ``"cross_entropy"``, ``"mse"`` or ``"module:function"``: (outputs, labels) to the
            *mean* over rows.
        data: factory of (training set, test set or none) as ``"module:function"``.
        batch: rows of a global batch, G; one optimizer step each.
        optimizer, scheduler: a class of ``torch.optim`` / ``torch.optim.lr_scheduler`` by name; the
            scheduler steps once per epoch, or per optimizer step with ``scheduler_every = "step"``.
        statistics: what BatchNorm normalises by where devices train a part of their layers: its
            ``"batch"``, as everywhere else, or what is ``"stored"`` in a trained model: less memory.
        trained_share: of the model's bytes, at most so much is trained anywhere where devices train a part of
            their layers, as all of it travels in every step.
        clip_norm: greatest global gradient norm, over all stages.
        epochs, steps: how long; the first limit that is reached ends the run; one epoch if none is set.
        private: raw samples never leave the device that holds them.
        share_labels: with ``private``, labels may still leave.
        data_devices: overrides the cluster's data devices.
        checkpoint_every: optimizer steps between checkpoints; 0 = only at the end.
        transfer_timeout_s: deadline of every single transfer between devices.
    """

    name: str = "job"
    model: Recipe
    loss: str = "cross_entropy"
    data: Recipe
    batch: int = Field(default=128, ge=1)
    optimizer: Recipe = Recipe(name="SGD", args={"lr": 0.1})
    scheduler: Recipe | None = None
    scheduler_every: str = "epoch"
    statistics: str = "batch"
    trained_share: float = Field(default=1.0, gt=0, le=1)
    clip_norm: float | None = Field(default=None, gt=0)
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    seed: int = 0
    dtype: str = "float32"
    private: bool = False
    share_labels: bool = False
    data_devices: tuple[str, ...] = ()
    checkpoint_every: int = Field(default=50, ge=0)
    transfer_timeout_s: float = Field(default=60.0, gt=0)

    @field_validator("model", "data")
    @classmethod
    def _importable(cls, recipe: Recipe) -> Recipe:
        if recipe.name != LIVE and recipe.name.count(":") != 1:
            raise InputError(
                f"job: '{recipe.name}' must name a factory as \"module:function\", "
                'like "spanwise.zoo:mobilenet_v2"'
            )
        return recipe

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, dtype: str) -> str:
        if dtype not in ("float32", "float64", "bfloat16"):
            raise InputError(f"job: dtype '{dtype}' must be float32, float64 or bfloat16")
        return dtype

    @field_validator(*_EITHER)
    @classmethod
    def _one_or_the_other(cls, value: str, info: ValidationInfo) -> str:
        name = str(info.field_name)
        one, other = _EITHER[name]
        if value not in (one, other):
            raise InputError(f"job: {name} '{value}' must be '{one}' or '{other}'")
        return value
