"""Every zoo model goes through torch.export with its loss, in train mode, and computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

from spanwise import zoo

TRACED_ROWS, OTHER_ROWS = 4, 3


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.model(x), y)


def batch_for(name: str, rows: int) -> tuple[Tensor, Tensor]:
    if name == "gpt":
        return torch.randint(11, (rows, 6)), torch.randint(11, (rows, 6))
    # The residual networks end in a global mean, so small images keep the test short.
    shapes = {"mlp": (16,), "lenet5": (1, 32, 32), "vgg11": (3, 32, 32), "alexnet": (3, 32, 32)}
    shapes["alexnet_224"] = (3, 224, 224)
    return torch.randn(rows, *shapes.get(name, (3, 16, 16))), torch.randint(10, (rows,))


def results(module: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    loss = module(*batch)
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"grad of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {f"buffer {name}": b for name, b in module.named_buffers()}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mobilenet_v2", {"width": 0.35}),
        ("resnet18", {}),
        ("resnet50", {}),
        ("vgg11", {}),
        ("vgg11", {"batch_norm": True}),
        ("alexnet", {}),
        ("alexnet", {"stem": 11}),
        ("alexnet_224", {"num_classes": 10, "hidden": 8}),
        ("lenet5", {}),
        ("gpt", {"vocab": 11, "n_layer": 2, "n_head": 2, "d_model": 8, "seq": 6, "tied": True}),
        ("gpt", {"vocab": 11, "n_layer": 2, "n_head": 2, "d_model": 8, "seq": 6, "tied": False}),
        ("mlp", {}),
    ],
)
def test_exported_training_step_equals_eager(name: str, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    loss = zoo.language_model_loss if name == "gpt" else F.cross_entropy
    eager = WithLoss(getattr(zoo, name)(**args), loss).train()
    rows = Dim("rows")
    program = export(
        copy.deepcopy(eager), batch_for(name, TRACED_ROWS), dynamic_shapes={"x": {0: rows}, "y": {0: rows}}
    )
    batch = batch_for(name, OTHER_ROWS)
    expected, found = results(eager, batch), results(program.module(), batch)
    assert found.keys() == expected.keys()
    assert sum(key.startswith("grad") for key in expected) == len(list(eager.parameters()))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_no_model_works_in_place() -> None:
    """A cut may fall between any two operations: what arrives behind it must not be overwritten."""
    for name in ("mobilenet_v2", "resnet18", "vgg11", "alexnet", "alexnet_224"):
        with torch.device("meta"):
            model = getattr(zoo, name)()
        assert not any(getattr(module, "inplace", False) for module in model.modules())
