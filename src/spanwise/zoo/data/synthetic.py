"""Generated data that a model can learn; nothing is read or downloaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import TensorDataset

from spanwise.core.errors import InputError

_SUCCESSORS = 4  # likely next tokens of each token in the Markov chain
_LIKELY = 0.9  # probability of all of them together


def synthetic_images(
    rows: int = 512,
    shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    seed: int = 0,
    test_rows: int = 128,
) -> tuple[TensorDataset, TensorDataset]:
    """Images of balanced classes: a smooth random pattern per class plus unit Gaussian noise.

    Args:
        rows: rows of the training set.
        shape: (channels, height, width) of an image.
        classes: number of classes.
        seed: of everything that is drawn.
        test_rows: rows of the test set, with the same patterns and other noise.

    Returns:
        (training set, test set) of x (rows, channels, height, width) float32 and y (rows,) int64.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"data 'synthetic_images': shape {tuple(shape)} must be (channels, height, width)")
    _check_counts("synthetic_images", rows=rows, classes=classes, test_rows=test_rows)
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    coarse = torch.randn(classes, channels, -(-height // 8), -(-width // 8), generator=generator)
    # Smooth, because noise per pixel would be a pattern that convolutions followed by a mean cannot see.
    means = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return _noisy(means, rows, generator), _noisy(means, test_rows, generator)


def synthetic_vectors(
    rows: int = 512, features: int = 16, classes: int = 10, seed: int = 0, test_rows: int = 128
) -> tuple[TensorDataset, TensorDataset]:
    """Vectors of balanced classes: a random mean of standard deviation 2 per class plus unit noise.

    Args:
        rows: rows of the training set.
        features: length of a vector.
        classes: number of classes.
        seed: of everything that is drawn.
        test_rows: rows of the test set, with the same means and other noise.

    Returns:
        (training set, test set) of x (rows, features) float32 and y (rows,) int64.
    """
    _check_counts("synthetic_vectors", rows=rows, features=features, classes=classes, test_rows=test_rows)
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(classes, features, generator=generator)
    return _noisy(means, rows, generator), _noisy(means, test_rows, generator)


def synthetic_text(
    rows: int = 512, seq: int = 64, vocab: int = 256, seed: int = 0, test_rows: int = 128
) -> tuple[TensorDataset, TensorDataset]:
    """Token sequences of a Markov chain, with the next token as the target.

    From each token, 4 random successors together have probability 0.9, so a trained model's loss falls from
    log(vocab) towards the chain's entropy.

    Args:
        rows: rows of the training set.
        seq: tokens of a row.
        vocab: number of token ids.
        seed: of everything that is drawn.
        test_rows: rows of the test set, from the same chain.

    Returns:
        (training set, test set) of x (rows, seq) and y (rows, seq), int64; y is x one token later.
    """
    _check_counts("synthetic_text", rows=rows, seq=seq, vocab=vocab, test_rows=test_rows)
    generator = torch.Generator().manual_seed(seed)
    successors = torch.rand(vocab, vocab, generator=generator).topk(min(_SUCCESSORS, vocab)).indices
    likely = torch.zeros(vocab, vocab).scatter_(1, successors, 1.0 / successors.shape[1])
    transitions = _LIKELY * likely + (1 - _LIKELY) / vocab
    return _walk(transitions, rows, seq, generator), _walk(transitions, test_rows, seq, generator)


def _noisy(means: Tensor, rows: int, generator: Generator) -> TensorDataset:
    labels = torch.randperm(rows, generator=generator) % len(means)
    x = means[labels]
    return TensorDataset(x + torch.randn(x.shape, generator=generator), labels)


def _walk(transitions: Tensor, rows: int, seq: int, generator: Generator) -> TensorDataset:
    tokens = torch.empty(rows, seq + 1, dtype=torch.int64)
    tokens[:, 0] = torch.randint(len(transitions), (rows,), generator=generator)
    for position in range(seq):
        following = torch.multinomial(transitions[tokens[:, position]], 1, generator=generator)
        tokens[:, position + 1] = following[:, 0]
    return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def _check_counts(name: str, **counts: int) -> None:
    for what, count in counts.items():
        if count < 1:
            raise InputError(f"data '{name}': {what} {count} must be 1 or more")
