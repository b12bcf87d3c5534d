from __future__ import annotations

from typing import Any

import pytest

from spanwise.core.errors import InputError
from spanwise.core.job import LIVE, Job, Recipe

BASE: dict[str, Any] = {"model": "spanwise.zoo:mlp", "data": "spanwise.zoo:digits"}


def test_the_least_that_a_job_says() -> None:
    job = Job.parse(BASE)
    assert job.model == Recipe(name="spanwise.zoo:mlp")
    assert (job.batch, job.loss, job.optimizer.name, job.epochs, job.steps) == (
        128,
        "cross_entropy",
        "SGD",
        None,
        None,
    )
    assert not job.private


@pytest.mark.parametrize(
    "recipe",
    ["SGD", {"name": "SGD"}, {"name": "SGD", "args": {}}],
)
def test_forms_of_a_recipe_without_arguments(recipe: object) -> None:
    assert Recipe.parse(recipe) == Recipe(name="SGD", args={})


def test_forms_of_a_recipe_with_arguments() -> None:
    flat = Recipe.from_toml('name = "SGD"\nlr = 0.1\nmomentum = 0.9')
    assert flat == Recipe.parse({"name": "SGD", "args": {"lr": 0.1, "momentum": 0.9}})


def test_a_recipe_names_something() -> None:
    with pytest.raises(InputError, match="name"):
        Recipe.parse({"lr": 0.1})


def test_objects_that_were_handed_over() -> None:
    assert Job.parse({"model": LIVE, "data": LIVE}).model.name == LIVE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "mlp"}, "'mlp' must name a factory"),
        ({"data": "a:b:c"}, "'a:b:c' must name a factory"),
        ({"dtype": "int8"}, "'int8' must be float32, float64 or bfloat16"),
        ({"statistics": "none"}, "must be 'batch' or 'stored'"),
        ({"scheduler_every": "day"}, "must be 'epoch' or 'step'"),
        ({"batch": 0}, "batch"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"epochs": 0}, "epochs"),
        ({"steps": 0}, "steps"),
        ({"checkpoint_every": -1}, "checkpoint_every"),
        ({"transfer_timeout_s": 0}, "transfer_timeout_s"),
        ({"lr": 0.1}, "lr"),
    ],
)
def test_rules(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Job.parse({**BASE, **change}, "job.toml")
    assert str(caught.value).startswith("job.toml")


def test_several_mistakes_are_counted() -> None:
    with pytest.raises(InputError, match=r"\(and 1 more\)"):
        Job.parse({**BASE, "batch": 0, "steps": 0})
