"""Model factories: sizes known from the literature, shapes, determinism, refusals."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from spanwise import zoo
from spanwise.core.errors import InputError


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def conv(k: int, c: int, out: int, *, bias: bool = False, groups: int = 1) -> int:
    return k * k * c // groups * out + (out if bias else 0)


def bn(c: int) -> int:
    return 2 * c


def linear(c: int, out: int) -> int:
    return c * out + out


VGG11 = (64, 128, 256, 256, 512, 512, 512, 512)
VGG16 = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def mobilenet_by_hand(classes: int) -> int:
    total, c = conv(3, 3, 32) + bn(32), 32
    table = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    for t, out, n in table:
        for _ in range(n):
            h = t * c
            total += (conv(1, c, h) + bn(h) if t > 1 else 0) + conv(3, h, h, groups=h) + bn(h)
            total += conv(1, h, out) + bn(out)
            c = out
    return total + conv(1, 320, 1280) + bn(1280) + linear(1280, classes)


def resnet_by_hand(depths: tuple[int, ...], *, bottleneck: bool) -> int:
    total, c = conv(3, 3, 64) + bn(64), 64
    for width, depth in zip((64, 128, 256, 512), depths, strict=True):
        out = 4 * width if bottleneck else width
        for _ in range(depth):
            if bottleneck:
                total += conv(1, c, width) + conv(3, width, width) + conv(1, width, out)
                total += 2 * bn(width) + bn(out)
            else:
                total += conv(3, c, width) + conv(3, width, width) + 2 * bn(width)
            total += conv(1, c, out) + bn(out) if c != out else 0
            c = out
    return total + linear(c, 10)


def vgg_by_hand(*, batch_norm: bool, channels: tuple[int, ...] = VGG11, last: int = 0) -> int:
    total, c = 0, 3
    for out in channels:
        total += conv(3, c, out, bias=True) + (bn(out) if batch_norm else 0)
        c = out
    return total + (last or linear(512, 10))


# Second number: as published. MobileNetV2: torchvision's 3,504,872 with its 1000-class head (1,281,000)
# replaced by 10 classes (12,810). ResNets and VGG-11 with BatchNorm: the widely used CIFAR-10 forms.
@pytest.mark.parametrize(
    ("model", "by_hand", "published"),
    [
        (lambda: zoo.mobilenet_v2(), mobilenet_by_hand(10), 3_504_872 - 1_281_000 + 12_810),
        (lambda: zoo.mobilenet_v2(num_classes=1000), mobilenet_by_hand(1000), 3_504_872),
        (lambda: zoo.resnet18(), resnet_by_hand((2, 2, 2, 2), bottleneck=False), 11_173_962),
        (lambda: zoo.resnet50(), resnet_by_hand((3, 4, 6, 3), bottleneck=True), 23_520_842),
        (lambda: zoo.vgg11(), vgg_by_hand(batch_norm=False), 9_225_610),
        (lambda: zoo.vgg11(batch_norm=True), vgg_by_hand(batch_norm=True), 9_231_114),
        (lambda: zoo.vgg16(batch_norm=True), vgg_by_hand(batch_norm=True, channels=VGG16), 14_728_266),
        (lambda: zoo.vgg9(), vgg_by_hand(batch_norm=False, channels=(32, 64, 128, 128, 256, 256),
         last=linear(4096, 512) + linear(512, 512) + linear(512, 10)), 3_491_530),
        (lambda: zoo.alexnet(stem=11), 2_469_696 + linear(256, 10), 2_472_266),
        (lambda: zoo.alexnet(stem=11, width=1 / 64), conv(11, 3, 1, bias=True) + conv(5, 1, 3, bias=True)
         + conv(3, 3, 6, bias=True) + conv(3, 6, 4, bias=True) + conv(3, 4, 4, bias=True) + linear(4, 10),
         1_028),
        (lambda: zoo.alexnet(), 2_251_584 + linear(1024, 4096) + linear(4096, 4096) + linear(4096, 10),
         23_272_266),
        (lambda: zoo.alexnet_224(), conv(11, 3, 64, bias=True) + conv(5, 64, 192, bias=True)
         + conv(3, 192, 384, bias=True) + conv(3, 384, 256, bias=True) + conv(3, 256, 256, bias=True)
         + linear(9216, 4096) + linear(4096, 4096) + linear(4096, 1000), 61_100_840),
        (lambda: zoo.lenet5(), 61_706, 61_706),
        (lambda: zoo.mlp(sizes=(4, 5, 3)), linear(4, 5) + linear(5, 3), 43),
    ],
)  # fmt: skip
def test_parameter_counts(model: Callable[[], nn.Module], by_hand: int, published: int) -> None:
    assert by_hand == published
    with torch.device("meta"):
        assert parameter_count(model()) == published


@pytest.mark.parametrize(
    ("name", "args", "stages"),
    [
        ("mobilenet_v2", {}, {2: 32, 4: 16, 7: 8, 14: 4, 18: 4}),
        ("resnet18", {}, {1: 32, 3: 32, 5: 16, 7: 8, 9: 4}),
        ("resnet50", {}, {1: 32, 4: 32, 8: 16, 14: 8, 17: 4}),
        ("vgg11", {}, {20: 1}),
        ("alexnet", {}, {0: 16, 12: 2}),
        ("alexnet", {"stem": 11}, {0: 8, 12: 1}),
    ],
)
def test_cifar_strides(name: str, args: dict[str, int], stages: dict[int, int]) -> None:
    with torch.device("meta"):
        model = getattr(zoo, name)(**args)
        x = torch.empty(2, 3, 32, 32)
        for index, layer in enumerate(model.features):
            x = layer(x)
            if index in stages:
                assert x.shape[2:] == (stages[index],) * 2, f"{name}: layer {index}"
        assert model(torch.empty(3, 3, 32, 32)).shape == (3, 10)


def test_alexnet_for_large_images_strides() -> None:
    with torch.device("meta"):
        model = zoo.alexnet_224(num_classes=10)
        x, sizes = torch.empty(2, 3, 224, 224), []
        for layer in model.features:
            x = layer(x)
            sizes.append(x.shape[2])
        assert (sizes[0], sizes[2], sizes[5], sizes[12]) == (55, 27, 13, 6)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 10)


def test_mobilenet_has_52_batch_norms_and_10_shortcuts() -> None:
    with torch.device("meta"):
        model = zoo.mobilenet_v2()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 52
    assert sum(getattr(m, "shortcut", False) is True for m in model.modules()) == 10


def test_mobilenet_width_rounds_to_8_and_keeps_the_last_width() -> None:
    with torch.device("meta"):
        narrow = zoo.mobilenet_v2(width=0.35)
    widths = {m.num_features for m in narrow.modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(width % 8 == 0 for width in widths)
    assert max(widths) == 1280


@pytest.mark.parametrize("name", ["mobilenet_v2", "alexnet", "alexnet_224"])
def test_dropout_only_on_request(name: str) -> None:
    with torch.device("meta"):
        off, on = getattr(zoo, name)(), getattr(zoo, name)(dropout=0.5)
    assert not any(isinstance(m, nn.Dropout) for m in off.modules())
    assert any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in on.modules())


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mobilenet_v2", {"width": 0.25}),
        ("vgg11", {}),
        ("lenet5", {}),
        ("gpt", {"vocab": 11, "n_layer": 1, "n_head": 2, "d_model": 8, "seq": 5}),
        ("mlp", {}),
    ],
)
def test_initial_weights_follow_the_seed(name: str, args: dict[str, int]) -> None:
    factory = getattr(importlib.import_module("spanwise.zoo"), name)
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(factory(**args).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_gpt_ties_one_tensor() -> None:
    args = {"vocab": 11, "n_layer": 2, "n_head": 2, "d_model": 8, "seq": 5}
    tied, free = zoo.gpt(**args, tied=True), zoo.gpt(**args, tied=False)
    assert tied.head.weight is tied.token.weight
    assert free.head.weight is not free.token.weight
    assert parameter_count(free) - parameter_count(tied) == 11 * 8
    block = linear(8, 24) + linear(8, 8) + linear(8, 32) + linear(32, 8) + 2 * 2 * 8
    assert parameter_count(tied) == 11 * 8 + 5 * 8 + 2 * block + 2 * 8
    tied(torch.zeros(1, 5, dtype=torch.int64)).sum().backward()
    assert tied.head.weight.grad is tied.token.weight.grad


def test_gpt_is_causal_and_starts_near_uniform() -> None:
    torch.manual_seed(0)
    model = zoo.gpt(vocab=11, n_layer=2, n_head=2, d_model=8, seq=6)
    tokens = torch.randint(11, (3, 6))
    later = tokens.clone()
    later[:, 4] = (later[:, 4] + 1) % 11
    before, after = model(tokens), model(later)
    assert before.shape == (3, 6, 11)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])
    loss = zoo.language_model_loss(before, tokens)
    assert loss.item() == pytest.approx(torch.tensor(11.0).log().item(), abs=0.1)


def test_language_model_loss_is_the_mean_over_rows() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 5, 7), torch.randint(7, (4, 5))
    each = [zoo.language_model_loss(logits[i : i + 1], targets[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(zoo.language_model_loss(logits, targets), torch.stack(each).mean())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: zoo.mobilenet_v2(width=0.0), ["width 0.0", "greater than 0"]),
        (lambda: zoo.alexnet(stem=5), ["stem 5", "3 or 11"]),
        (lambda: zoo.alexnet(width=0.0), ["width 0.0", "greater than 0"]),
        (lambda: zoo.vgg11(width=-1.0), ["width -1.0", "greater than 0"]),
        (lambda: zoo.mlp(sizes=(4,)), ["1 size(s)", "at least 2"]),
        (lambda: zoo.mlp(activation="swish"), ["'swish'", "gelu, relu, sigmoid, tanh"]),
        (lambda: zoo.gpt(d_model=10, n_head=4), ["d_model 10", "n_head 4"]),
        (lambda: zoo.gpt(vocab=4, n_layer=1, n_head=1, d_model=4, seq=2)(torch.zeros(1, 3).long()),
         ["3 tokens", "at most 2", "seq=3"]),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(build: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert all(word in str(caught.value) for word in words)
