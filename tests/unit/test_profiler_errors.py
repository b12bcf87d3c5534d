"""Models that cannot be traced: one line that says where, why and what to do."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spanwise.core.errors import ExportError
from spanwise.profiler.trace import trace

Forward = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, body: Forward) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 5)
        self.register_buffer("count", torch.zeros(8), persistent=False)
        self.register_buffer("table", torch.zeros(300_000), persistent=False)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.a(x))


class Rounded(torch.autograd.Function):
    """Straight-through rounding, whose backward formula an export loses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def by_sum(m: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return m.b(x)
    return m.b(-x)


def by_item(m: Any, x: Tensor) -> Tensor:
    return m.b(x * x.mean().item())


def by_rows(m: Any, x: Tensor) -> Tensor:
    return m.b(x if x.shape[0] == 3 else -x)


def distinct(m: Any, x: Tensor) -> Tensor:
    return m.b(x + torch.unique(x).sum())


def counting(m: Any, x: Tensor) -> Tensor:
    m.count.add_(1)
    return m.b(x + m.count)


def large(m: Any, x: Tensor) -> Tensor:
    return m.b(x + m.table.sum())


def decaying(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.a.weight.mul_(0.9)
    return m.b(x)


def branching(m: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda v: m.b(v), lambda v: m.b(-v), (x,))


def rounded(m: Any, x: Tensor) -> Tensor:
    return m.b(Rounded.apply(x))


def dice(m: Any, x: Tensor) -> Tensor:
    return m.b(x * random.random())


def failing(m: Any, x: Tensor) -> Tensor:
    raise ValueError("no such thing\nin two lines")


def lower_precision(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.b(x).float()


CASES: dict[str, tuple[Forward, tuple[str, ...]]] = {
    "control flow": (by_sum, ("test_profiler_errors.py, line", "data-dependent control flow", "torch.where")),
    "item": (by_item, ("aten.item.default", "keep to tensors")),
    "rows": (by_rows, ("number of rows to a constant", "x.shape[0]")),
    "unique": (distinct, ("aten.", "depends on the values of a tensor", "masking")),
    "counter": (counting, ("aten.add_.Tensor", "overwrites the constant", "persistent buffer")),
    "large": (large, ("1200000 bytes", "1048576", "persistent buffer")),
    "parameter": (decaying, ("overwrites the parameter 'a.weight'", "optimizer")),
    "cond": (branching, ("operation 'cond'", "plain operations")),
    "autograd function": (rounded, ("gradient of 'a.", "autograd function", "torch operations")),
    "hidden randomness": (dice, ("of the traced operations differs", "hidden randomness")),
    "own failure": (failing, ("test_profiler_errors.py, line", "ValueError: no such thing", "on the sample")),
    "autocast": (lower_precision, ("wrap_with_autocast", "plain operations")),
}


def attempt(model: nn.Module, loss: Callable[..., Tensor] = F.cross_entropy, rows: int = 4) -> str:
    torch.manual_seed(0)
    with pytest.raises(ExportError) as caught:
        trace(model, loss, (torch.randn(4, 8),), (torch.randint(5, (rows,)),), name="odd")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model 'odd': ")
    assert caught.value.__cause__ is None
    return message


@pytest.mark.parametrize("case", CASES)
def test_one_line(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    body, parts = CASES[case]
    message = attempt(Model(body))
    for part in parts:
        assert part in message
    assert capfd.readouterr() == ("", "")


def test_operation_of_another_library() -> None:
    with torch.library._scoped_library("spanwise_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        torch.library.register_fake("spanwise_test::twice", torch.empty_like, lib=library)
        message = attempt(Model(lambda m, x: m.b(torch.ops.spanwise_test.twice(x))))
    assert "spanwise_test.twice.default" in message
    assert "no ATen operation" in message


@pytest.mark.parametrize(
    ("loss", "part"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "rows give"),
        (nn.CrossEntropyLoss(reduction="none"), "gives (5,)"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0, 9.0, 1.0])), "class weights"),
    ],
)
def test_loss_must_be_mean_over_rows(loss: nn.Module, part: str) -> None:
    message = attempt(nn.Linear(8, 5), loss)
    assert "must be" in message
    assert "mean over rows" in message
    assert part in message


def test_loss_parameter_belongs_to_the_model() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(x * self.scale, y)

    assert "put it in the model" in attempt(nn.Linear(8, 5), Scaled())


def test_rows_must_agree() -> None:
    assert "first dimension" in attempt(nn.Linear(8, 5), rows=3)


def test_uncuttable_model_has_one_layer() -> None:
    class Twisted(nn.Module):
        """Its input is needed to the end."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + x)

    sample = (torch.randn(4, 8),), (torch.randint(5, (4,)),)
    assert len(trace(Twisted(), F.cross_entropy, *sample, name="t").graph) == 2  # cut behind the addition
    recurrent = nn.Sequential(nn.Flatten(), nn.Linear(8, 5))
    assert len(trace(recurrent, F.cross_entropy, *sample, name="t").graph) == 1
