"""Merged networks are their sub-models put side by side, to rounding, in any order of classes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from decoupling_cases import Plain, Residual, divided, lively, samples, scores, states, walked
from spanwise.core.errors import InputError
from spanwise.decoupler.build import sub_model, take
from spanwise.decoupler.merge import merge
from spanwise.decoupler.walk import walk

X = samples()
PLAIN, RESIDUAL = walked(Plain()), walked(Residual())
SHARES = {2: (0.7, 0.3), 3: (0.5, 0.3, 0.2), 4: None}


@settings(max_examples=12)
@given(
    order=st.permutations(range(6)),
    ends=st.sets(st.integers(1, 5), min_size=1, max_size=3),
    read_out=st.sampled_from(["probability", "margin", "plain"]),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_merged_is_the_ensemble(order, ends, read_out, residual, seed):
    target = RESIDUAL if residual else PLAIN
    cuts = [0, *sorted(ends), 6]
    groups = [tuple(order[a:b]) for a, b in pairwise(cuts)]
    decoupling = divided(target, groups, SHARES[len(groups)], read_out=read_out)
    models = lively(target, decoupling, seed)
    with torch.no_grad():
        wanted = scores(decoupling, models, X)
        for form in ("dense", "branches"):
            found = merge(target, decoupling, states(models), form=form).module(X)
            assert (found - wanted).abs().max() < 1e-12, form


@pytest.mark.parametrize("policy", ["all", "none"])
@pytest.mark.parametrize("target", [PLAIN, RESIDUAL])
def test_grouped_is_dense(target, policy):
    groups = ((5, 0), (1, 4), (3, 2)) if target is RESIDUAL else ((5, 0, 1), (4, 3, 2))
    if target is PLAIN:  # 20, 24 and 30 divide by two, 25 does not
        target = walked(_even())
    decoupling = divided(target, groups, policy=policy)
    models = lively(target, decoupling)
    dense = merge(target, decoupling, states(models), form="dense")
    grouped = merge(target, decoupling, states(models))
    assert grouped.form == "grouped"
    with torch.no_grad():
        assert (dense.module(X) - grouped.module(X)).abs().max() < 1e-12
        assert (dense.module(X) - scores(decoupling, models, X)).abs().max() < 1e-12
    convolutions = [m for m in grouped.module.modules() if isinstance(m, nn.Conv2d)]
    assert any(m.groups == len(groups) for m in convolutions)


def _even() -> nn.Module:
    model = Plain()
    model.hidden[3], model.head = nn.Linear(30, 26), nn.Linear(26, 6)
    return model


def test_margins_load_into_the_target_itself():
    decoupling = divided(PLAIN, ((4, 1, 0), (5, 2, 3)), (0.6, 0.4))
    models = lively(PLAIN, decoupling)
    model = Plain().double().eval()
    model.load_state_dict(merge(PLAIN, decoupling, states(models), form="dense").module.state_dict())
    with torch.no_grad():
        assert (model(X) - scores(decoupling, models, X)).abs().max() < 1e-12


def test_blocks_taken_out_of_the_merged_network_are_the_sub_models():
    decoupling = divided(PLAIN, ((4, 1, 0), (5, 2, 3)), (0.6, 0.4), policy="none")
    before = states(lively(PLAIN, decoupling))
    whole = merge(PLAIN, decoupling, before, form="dense").module.state_dict()
    for group, state in before.items():
        found = take(dict(whole), decoupling, group)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_lost_sub_model_costs_its_classes_and_changes_no_others():
    for shares in (None, (0.5, 0.3, 0.2)):
        decoupling = divided(RESIDUAL, ((5, 0), (1, 4), (3, 2)), shares)
        models = lively(RESIDUAL, decoupling)
        del models[1]
        for form in ("dense", "branches") if shares else ("dense", "grouped", "branches"):
            merged = merge(RESIDUAL, decoupling, states(models), form=form)
            assert merged.missing == (1, 4)
            with torch.no_grad():
                found, wanted = merged.module(X), scores(decoupling, models, X)
            assert torch.isinf(found[:, [1, 4]]).all()
            if form == "dense":  # no module of ours needed: the target itself gives these scores
                Residual().double().load_state_dict(merged.module.state_dict())
            rest = [0, 2, 3, 5]
            assert (found[:, rest] - wanted[:, rest]).abs().max() < 1e-12, form


def test_a_shuffled_block_is_no_ensemble():
    """The control: one block in another's place is far off, so the comparisons above can fail."""
    decoupling = divided(PLAIN, ((0, 1, 2), (3, 4, 5)))
    models = lively(PLAIN, decoupling)
    module = merge(PLAIN, decoupling, states(models), form="dense").module
    weight = module.get_submodule("hidden.0").weight
    with torch.no_grad():
        weight.copy_(weight.view(30, 24, 4).transpose(1, 2).reshape(30, 96))  # a channel-last flatten
        assert (module(X) - scores(decoupling, models, X)).abs().max() > 1e-2


class Ending(nn.Module):
    """A convolution, something, and a head."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.what, self.head = nn.Conv2d(2, 8, 3, padding=1), what, nn.Linear(8 * 64, 6)

    def forward(self, x):
        return self.head(self.what(self.conv(x)).flatten(1))


class Permuted(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        (nn.LocalResponseNorm(3), "'what' (LocalResponseNorm)"),
        (nn.LayerNorm(8), "'what' (LayerNorm)"),
        (nn.GroupNorm(2, 8), "'what' (GroupNorm)"),
        (nn.Softmax(1), "'what' (Softmax)"),
        (nn.ChannelShuffle(2), "'what' (ChannelShuffle)"),
        (nn.Conv2d(8, 8, 1, groups=2), "'what' (Conv2d) has 2 groups over 8 channels"),
        (Permuted(), "(permute)"),
    ],
)
def test_what_mixes_channels_is_named_with_the_ways_out(what, named):
    with pytest.raises(InputError, match="shared = N") as caught:
        walk(Ending(what), torch.zeros(2, 2, 8, 8))
    assert named in str(caught.value)


def test_in_shared_first_layers_anything_may_stand():
    model = Ending(nn.Sequential(nn.LocalResponseNorm(3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.ReLU()))
    target = walked(model, shared=1)
    decoupling = divided(target, ((5, 3, 1), (0, 2, 4)))
    models = lively(target, decoupling)
    with torch.no_grad():
        for form in ("dense", "grouped", "branches"):
            found = merge(target, decoupling, states(models), form=form).module(X)
            assert (found - scores(decoupling, models, X)).abs().max() < 1e-12
    frozen = [name for name, p in models[0].named_parameters() if not p.requires_grad]
    assert frozen == ["conv.weight", "conv.bias", "what.1.weight", "what.1.bias"]
    models[0].conv.weight.data += 1
    with pytest.raises(InputError, match=r"shared layer 'conv' of sub-model 1 differs"):
        merge(target, decoupling, states(models))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(2, 8, 8), nn.Flatten(), nn.Softmax(1)), "ends in '2' (Softmax)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(128, 6)), "no layer before the head can be divided"),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 8, 8), nn.Flatten(), nn.Linear(8, 6)), "normalises"),
    ],
)
def test_models_without_a_divisible_body_or_a_head_are_refused(model, message):
    with pytest.raises(InputError) as caught:
        walk(model, torch.zeros(2, 2, 8, 8))
    assert message in str(caught.value)


def test_merging_refuses_what_does_not_fit():
    decoupling = divided(RESIDUAL, ((5, 0), (1, 4), (3, 2)), (0.5, 0.3, 0.2))
    found = states(lively(RESIDUAL, decoupling))
    with pytest.raises(InputError, match=r"layer 'stem': 18 channels in 3 sub-models are 9, 5, 4, not equal"):
        merge(RESIDUAL, decoupling, found, form="grouped")
    with pytest.raises(InputError, match="no sub-model came back"):
        merge(RESIDUAL, decoupling, {})
    with pytest.raises(InputError, match=r"sub-model 1: layer 'stem' has weights of shape \(9, 2, 3, 3\)"):
        merge(RESIDUAL, decoupling, {1: found[0]})
    with pytest.raises(InputError, match="whose layers are not those of"):
        sub_model(PLAIN, decoupling, 0)
