"""Scores of parameters: the weights stay, gains add up to what a step gains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spanwise.profiler.importance import contribution, importance, magnitude
from spanwise.profiler.trace import trace


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def sgd(named: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(named.values()), lr=1e-3)  # pyright: ignore


def test_first_order_gains_are_what_a_small_step_gains() -> None:
    model = small()
    x, y = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randint(3, (8,))
    found = trace(model, F.cross_entropy, (x,), (y,), name="small")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scores = importance(found, [((x,), (y,))], sgd)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "weights are put back"
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    optimizer = sgd(dict(model.named_parameters()))
    losses: list[Tensor] = []
    for _ in range(2):
        losses.append(F.cross_entropy(model(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    fell = float((losses[0] - losses[1]).detach())
    assert sum(one.score for one in scores.scores) == pytest.approx(fell, rel=0.02)
    for one in scores.scores:
        assert (one.channels is not None) == (one.parameter in found.graph.sliceable)
        if one.channels is not None:
            assert sum(one.channels) == pytest.approx(one.score)
            ranking = scores.ranking(one.parameter)
            assert sorted(ranking) == list(range(len(one.channels)))
            assert one.channels[ranking[0]] == max(one.channels)


def test_other_methods_score_all_parameters_too() -> None:
    model = small()
    x, y = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randint(3, (8,))
    found = trace(model, F.cross_entropy, (x,), (y,), name="small")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    size = magnitude(found)
    assert size.by_parameter["0.weight"].score == pytest.approx(float((before["0.weight"] ** 2).sum()))
    slow = contribution(found, [((x,), (y,))], sgd, steps=3)
    assert slow.method == "contribution"
    assert all(one.score > 0 for one in slow.scores if one.parameter != "0.bias")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
