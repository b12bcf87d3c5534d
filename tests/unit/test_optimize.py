from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spanwise.core.errors import CheckpointError, InputError
from spanwise.core.job import Job, Recipe
from spanwise.runtime.optimize import (
    check_recipes,
    group_options,
    load_group_options,
    load_optimizer_state,
    load_scheduler_state,
    make_optimizer,
    make_scheduler,
    optimizer_state,
    scheduler_state,
)


def recipe(name: str, **args: Any) -> Recipe:
    return Recipe(name=name, args=args)


def weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(3, 2, generator=generator)) for name in ("a.weight", "b.weight")}


def train(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, scheduler: Any, steps: int
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([(p**2).sum() for p in parameters.values()]).sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


OPTIMIZERS = [
    recipe("SGD", lr=0.1), recipe("SGD", lr=0.1, momentum=0.9, nesterov=True), recipe("Adam", lr=0.01),
    recipe("AdamW", lr=0.01, amsgrad=True, betas=[0.8, 0.9]), recipe("RMSprop", lr=0.01, momentum=0.5),
    recipe("Adagrad"), recipe("NAdam"), recipe("RAdam"), recipe("Adadelta"), recipe("Adamax"),
]  # fmt: skip
SCHEDULERS = [None, recipe("StepLR", step_size=2), recipe("CosineAnnealingLR", T_max=5),
              recipe("MultiStepLR", milestones=[2, 4]),
              recipe("OneCycleLR", max_lr=0.1, total_steps=9)]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda r: r.name)
def test_training_goes_on_from_saved_state_as_if_never_interrupted(optimizer: Recipe) -> None:
    resumed_equals(optimizer, SCHEDULERS[1])


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda r: r.name if r else "none")
def test_schedules_go_on_from_saved_state(scheduler: Recipe | None) -> None:
    resumed_equals(OPTIMIZERS[1], scheduler)


def resumed_equals(optimizer: Recipe, scheduler: Recipe | None) -> None:
    through, first, second = weights(), weights(), weights()
    whole = make_optimizer(optimizer, through)
    train(through, whole, make_scheduler(scheduler, whole), 6)

    before = make_optimizer(optimizer, first)
    schedule = make_scheduler(scheduler, before)
    train(first, before, schedule, 3)
    state, options, position = (
        optimizer_state(before, first),
        group_options(before),
        scheduler_state(schedule),
    )
    assert all(isinstance(value, Tensor) for value in state.values())

    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(first[name])
    after = make_optimizer(optimizer, second)
    again = make_scheduler(scheduler, after)
    load_optimizer_state(after, second, state)
    load_group_options(after, options)
    load_scheduler_state(again, position)
    train(second, after, again, 3)
    for name, parameter in through.items():
        assert torch.equal(parameter, second[name])
    assert group_options(after) == group_options(whole)


def test_state_is_named_by_parameter_and_goes_wherever_it_is_held() -> None:
    parameters = weights()
    optimizer = make_optimizer(OPTIMIZERS[1], parameters)
    train(parameters, optimizer, None, 1)
    state = optimizer_state(optimizer, parameters)
    assert sorted(state) == ["a.weight::momentum_buffer", "b.weight::momentum_buffer"]
    part = {"b.weight": weights()["b.weight"]}
    other = make_optimizer(OPTIMIZERS[1], part)
    load_optimizer_state(other, part, state)
    assert list(optimizer_state(other, part)) == ["b.weight::momentum_buffer"]


def test_loading_takes_a_copy() -> None:
    parameters = weights()
    optimizer = make_optimizer(OPTIMIZERS[1], parameters)
    state = {"a.weight::momentum_buffer": torch.ones(3, 2)}
    load_optimizer_state(optimizer, parameters, state)
    train(parameters, optimizer, None, 1)
    assert torch.equal(state["a.weight::momentum_buffer"], torch.ones(3, 2))


@pytest.mark.parametrize("shape", [(2, 3), (6,), (1, 6)])
def test_state_of_another_shape(shape: tuple[int, ...]) -> None:
    parameters = weights()
    optimizer = make_optimizer(OPTIMIZERS[1], parameters)
    with pytest.raises(CheckpointError, match=r"'a\.weight::momentum_buffer': shape .* does not fit"):
        load_optimizer_state(optimizer, parameters, {"a.weight::momentum_buffer": torch.ones(shape)})


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("Magic", {}, "'Magic' is not in torch.optim; known: .*AdamW.*SGD"),
        ("Optimizer", {}, "'Optimizer' is not"),
        ("lr_scheduler", {}, "is not in torch.optim"),
        ("LBFGS", {}, "evaluates the loss several times"),
        ("SGD", {"lr": -1}, "Invalid learning rate"),
        ("SGD", {"speed": 1}, "unexpected keyword"),
    ],
)
def test_optimizers_that_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_optimizer(recipe(name, **args), weights())


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("Magic", {}, "'Magic' is not in torch.optim.lr_scheduler"),
        ("ReduceLROnPlateau", {}, "needs a metric"),
        ("StepLR", {}, "step_size"),
        ("StepLR", {"step_size": 1, "speed": 1}, "unexpected keyword"),
        ("LambdaLR", {"lr_lambda": 3}, "LambdaLR"),
        ("LRScheduler", {}, "'LRScheduler' is not in"),
    ],
)
def test_schedulers_that_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_scheduler(recipe(name, **args), make_optimizer(recipe("SGD"), weights()))


def test_recipes_are_tried_before_a_run() -> None:
    job = Job.parse({"model": "a:b", "data": "a:b", "scheduler": {"name": "StepLR", "step_size": 1}})
    check_recipes(job)
    with pytest.raises(InputError, match="StepLR"):
        check_recipes(job.model_copy(update={"scheduler": recipe("StepLR")}))
