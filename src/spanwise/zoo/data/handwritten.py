"""scikit-learn's bundled handwritten digits as images."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from spanwise.core.errors import InputError


def digits(
    size: int = 32, channels: int = 3, test_fraction: float = 0.2, seed: int = 0
) -> tuple[TensorDataset, TensorDataset]:
    """1,797 handwritten digits of 8 x 8 pixels, enlarged (bilinear) and standardised by the training set.

    Alpaydin, Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository, 1998;
    bundled with scikit-learn (its test part), so nothing is downloaded.

    Args:
        size: height and width in pixels.
        channels: the grey image is repeated this many times.
        test_fraction: share of each class that goes into the test set, between 0 and 1.
        seed: which rows are held out; nothing else is random.

    Returns:
        (training set, test set) of x (rows, channels, size, size) float32 and y (rows,) int64 in [0, 10).

    Raises:
        InputError: scikit-learn is missing, or the fraction leaves one of the sets empty.
    """
    if not 0 < test_fraction < 1:
        raise InputError(f"data 'digits': test_fraction {test_fraction} must be between 0 and 1, like 0.2")
    if size < 1 or channels < 1:
        raise InputError(f"data 'digits': size {size} and channels {channels} must be 1 or more")
    try:
        datasets: Any = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise InputError(
            "data 'digits': scikit-learn is not installed; install the extra: pip install 'spanwise[digits]'"
        ) from error
    bunch = datasets.load_digits()
    labels = np.asarray(bunch.target, dtype=np.int64)
    held_out = _stratified(labels, test_fraction, seed)
    images = torch.as_tensor(np.asarray(bunch.images, dtype=np.float32))[:, None]
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    train, test = torch.as_tensor(~held_out), torch.as_tensor(held_out)
    images = (images - images[train].mean()) / images[train].std()
    images = images.expand(-1, channels, -1, -1)
    y = torch.as_tensor(labels)
    return TensorDataset(images[train], y[train]), TensorDataset(images[test], y[test])


def _stratified(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """True for the rows of the test set: the same share of every class, at least one row on both sides."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        held_out[rows[:count]] = True
    return held_out
