"""Digits and generated sets: sizes, determinism, no row on both sides, something to learn."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from spanwise import zoo
from spanwise.core.errors import InputError


def tensors(pair: tuple[TensorDataset, TensorDataset]) -> list[torch.Tensor]:
    return [*pair[0].tensors, *pair[1].tensors]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_digits_sizes_types_and_normalisation() -> None:
    train, test = zoo.digits()
    x, y = train.tensors
    assert len(train) + len(test) == 1797
    assert len(test) == sum(round(0.2 * n) for n in (178, 182, 177, 183, 181, 182, 181, 179, 174, 180))
    assert x.shape == (len(train), 3, 32, 32)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert y.dtype == torch.int64
    assert torch.equal(x[:, 0], x[:, 2])
    assert x.mean().abs() < 1e-4
    assert x.std().item() == pytest.approx(1, abs=1e-4)


def test_digits_are_stratified() -> None:
    train, test = zoo.digits(size=8, channels=1, test_fraction=0.3)
    for label in range(10):
        held_out, kept = (int((s.tensors[1] == label).sum()) for s in (test, train))
        assert held_out / (held_out + kept) == pytest.approx(0.3, abs=0.003)


def test_digits_follow_the_seed() -> None:
    first, again, other = (tensors(zoo.digits(size=8, channels=1, seed=s)) for s in (0, 0, 1))
    assert same(first, again)
    assert not torch.equal(first[3], other[3])


def test_no_digit_is_in_both_sets() -> None:
    from sklearn.datasets import load_digits

    rows = torch.as_tensor(load_digits().images, dtype=torch.float32).flatten(1)
    assert len(rows.unique(dim=0)) == 1797  # no two images are equal, so content identifies the row
    (x, _), (held_out, _) = (s.tensors for s in zoo.digits(size=8, channels=1))
    both = torch.cat([x, held_out]).flatten(1)
    assert len(both.unique(dim=0)) == 1797


def test_digits_keep_their_labels() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    of = {tuple(image): int(label) for image, label in zip(bunch.data.astype(int), bunch.target, strict=True)}
    train, test = zoo.digits(size=8, channels=1)
    raw = torch.as_tensor(bunch.images, dtype=torch.float32)
    low, high = min(float(s.tensors[0].min()) for s in (train, test)), float(train.tensors[0].max())
    for x, y in [train[0], train[700], test[0], test[300]]:
        image = ((x[0] - low) / (high - low) * raw.max()).round().int().flatten().tolist()
        assert of[tuple(image)] == int(y)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"spanwise\[digits\]"):
        zoo.digits()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_digits_refuse_a_bad_fraction(fraction: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        zoo.digits(test_fraction=fraction)


def test_synthetic_images() -> None:
    train, test = zoo.synthetic_images(rows=40, shape=[1, 9, 12], classes=4, test_rows=8)
    x, y = train.tensors
    assert x.shape == (40, 1, 9, 12)
    assert x.dtype == torch.float32
    assert y.bincount().tolist() == [10] * 4
    assert test.tensors[0].shape == (8, 1, 9, 12)


def test_synthetic_text_is_shifted_by_one() -> None:
    train, test = zoo.synthetic_text(rows=7, seq=5, vocab=9, test_rows=3)
    x, y = train.tensors
    assert x.shape == y.shape == (7, 5)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert 0 <= int(x.min()) <= int(y.max()) < 9
    assert test.tensors[0].shape == (3, 5)


def test_synthetic_text_has_an_order_to_learn() -> None:
    x, y = zoo.synthetic_text(rows=400, seq=50, vocab=20)[0].tensors
    counts = (x * 20 + y).flatten().bincount(minlength=400).view(20, 20)
    share = counts.topk(4, dim=1).values.sum() / counts.sum()
    assert share.item() == pytest.approx(0.9 + 0.1 * 4 / 20, abs=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: zoo.synthetic_images(rows=12, shape=(1, 8, 8), seed=seed),
        lambda seed: zoo.synthetic_text(rows=12, seq=5, vocab=9, seed=seed),
        lambda seed: zoo.synthetic_vectors(rows=12, seed=seed),
    ],
)
def test_generated_sets_follow_the_seed(make: Callable[[int], tuple[TensorDataset, TensorDataset]]) -> None:
    state = torch.get_rng_state()
    assert same(tensors(make(0)), tensors(make(0)))
    assert not same(tensors(make(0)), tensors(make(1)))
    assert torch.equal(state, torch.get_rng_state())  # the global generator belongs to the model


def test_a_small_network_learns_generated_classes() -> None:
    torch.manual_seed(0)
    train, test = zoo.synthetic_vectors(rows=256, features=16, classes=4)
    model = zoo.mlp(sizes=(16, 16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(train.tensors[0]), train.tensors[1]).backward()
        optimizer.step()
    accuracy = (model(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean()
    assert accuracy > 0.9


def test_a_small_gpt_learns_the_chain() -> None:
    torch.manual_seed(0)
    x, y = zoo.synthetic_text(rows=64, seq=16, vocab=12)[0].tensors
    model = zoo.gpt(vocab=12, n_layer=1, n_head=2, d_model=16, seq=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = zoo.language_model_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(12), abs=0.2)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: zoo.synthetic_images(rows=0), "rows 0"),
        (lambda: zoo.synthetic_images(shape=(32, 32)), "channels, height, width"),
        (lambda: zoo.synthetic_text(vocab=0), "vocab 0"),
        (lambda: zoo.synthetic_vectors(features=0), "features 0"),
        (lambda: zoo.digits(size=0), "size 0"),
    ],
)
def test_bad_counts_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()
