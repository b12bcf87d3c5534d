"""CIFAR-10 and CIFAR-100 from their published Python files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from spanwise.core.errors import InputError
from spanwise.zoo.data.pickled import read_pickled

_CHANNELS, _SIDE = 3, 32
_PIXELS = _CHANNELS * _SIDE * _SIDE


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a data set's files are, with the MD5 sum of each as published."""

    name: str
    folder: str
    archive: str
    train: tuple[tuple[str, str], ...]
    test: tuple[str, str]


_CIFAR10 = _Layout(
    name="cifar10",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    train=(
        ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        ("data_batch_4", "634d18415352ddfa80567beed471001a"),
        ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
    ),
    test=("test_batch", "40351d587109b95175f43aff81a1287e"),
)
_CIFAR100 = _Layout(
    name="cifar100",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    train=(("train", "16019d7e3df5f24257cddd939b257f8d"),),
    test=("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),
)


def cifar10(root: str | Path, verify: bool = True) -> tuple[TensorDataset, TensorDataset]:
    """CIFAR-10: 50,000 and 10,000 colour images of 32 x 32 pixels in 10 classes.

    Krizhevsky, "Learning multiple layers of features from tiny images", University of Toronto, 2009,
    chapter 3; files from https://www.cs.toronto.edu/~kriz/cifar.html. Nothing is downloaded.

    Args:
        root: the folder ``cifar-10-batches-py`` or the one that holds it.
        verify: refuse files that are not the published ones, byte for byte; turn it off for files of
            your own in the same layout.

    Returns:
        (training set, test set) of x (rows, 3, 32, 32) float32, each channel standardised by the training
        set, and y (rows,) int64 in [0, 10).

    Raises:
        InputError: a file is missing, altered, not of this layout, or names code to run.
    """
    return _load(_CIFAR10, Path(root), verify, key="labels", classes=10)


def cifar100(
    root: str | Path, verify: bool = True, coarse: bool = False
) -> tuple[TensorDataset, TensorDataset]:
    """CIFAR-100: 50,000 and 10,000 colour images of 32 x 32 pixels in 100 classes.

    Source, files and errors as in :func:`cifar10`; its folder is ``cifar-100-python``.

    Args:
        root: the folder ``cifar-100-python`` or the one that holds it.
        verify: refuse files that are not the published ones, byte for byte.
        coarse: the 20 superclasses instead of the 100 classes.

    Returns:
        (training set, test set) of x (rows, 3, 32, 32) float32 and y (rows,) int64 in [0, 100) or [0, 20).
    """
    key, classes = ("coarse_labels", 20) if coarse else ("fine_labels", 100)
    return _load(_CIFAR100, Path(root), verify, key=key, classes=classes)


def _load(
    layout: _Layout, root: Path, verify: bool, *, key: str, classes: int
) -> tuple[TensorDataset, TensorDataset]:
    folder = root if root.name == layout.folder else root / layout.folder
    files = [*layout.train, layout.test]
    contents = [_content(layout, folder / name, md5 if verify else None) for name, md5 in files]
    batches = [
        _batch(folder / name, content, key, classes)
        for (name, _), content in zip(files, contents, strict=True)
    ]
    images = np.concatenate([x for x, _ in batches[:-1]])
    labels = np.concatenate([y for _, y in batches[:-1]])
    mean, std = _statistics(images)
    test_images, test_labels = batches[-1]
    return (
        TensorDataset(_standardised(images, mean, std), torch.as_tensor(labels)),
        TensorDataset(_standardised(test_images, mean, std), torch.as_tensor(test_labels)),
    )


def _content(layout: _Layout, path: Path, md5: str | None) -> bytes:
    way_out = f"download and unpack {layout.archive} from the data set's page"
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        missing = path if path.parent.is_dir() else path.parent
        what = "file" if path.parent.is_dir() else "folder"
        raise InputError(f"data '{layout.name}': no {what} '{missing}'; {way_out}") from error
    except OSError as error:
        raise InputError(
            f"data '{layout.name}': cannot read '{path}' ({error.strerror}); {way_out}"
        ) from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 is not None and found != md5:
        raise InputError(
            f"data '{layout.name}': '{path}' has MD5 {found}, published {md5}; {way_out}, "
            "or pass verify=False to read a file of your own in this layout"
        )
    return content


def _batch(path: Path, content: bytes, key: str, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (rows, 3, 32, 32) and labels (rows,) of one file."""
    entries = read_pickled(path, content)
    for name in ("data", key):
        if name not in entries:
            raise InputError(
                f"file '{path}': no entry '{name}', found: {', '.join(sorted(entries)) or 'none'}"
            )
    images, labels = _images(path, entries["data"]), _labels(path, key, entries[key], classes)
    if len(labels) != len(images):
        raise InputError(f"file '{path}': {len(images)} images but {len(labels)} entries in '{key}'")
    return images, labels


def _images(path: Path, raw: object) -> NDArray[np.uint8]:
    if not isinstance(raw, np.ndarray):
        raise InputError(f"file '{path}': 'data' is {type(raw).__name__}, expected uint8 (rows, {_PIXELS})")
    data = cast("NDArray[np.uint8]", raw)
    if data.dtype != np.uint8 or data.shape[1:] != (_PIXELS,):
        raise InputError(
            f"file '{path}': 'data' is {data.dtype} {data.shape}, expected uint8 (rows, {_PIXELS})"
        )
    return np.reshape(data, (-1, _CHANNELS, _SIDE, _SIDE))


def _labels(path: Path, key: str, raw: object, classes: int) -> NDArray[np.int64]:
    found = np.asarray(cast("Any", raw)) if _is_flat(raw) else np.empty((0, 0))
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise InputError(f"file '{path}': '{key}' must be a list of whole numbers")
    labels = found.astype(np.int64)
    if len(labels) == 0:
        raise InputError(f"file '{path}': '{key}' is empty, at least 1 row is needed")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"file '{path}': '{key}' has values {labels.min()} to {labels.max()}, expected 0 to {classes - 1}"
        )
    return labels


def _is_flat(raw: object) -> bool:
    """Whether this is an array, or a list that numpy cannot refuse for its nesting."""
    if isinstance(raw, np.ndarray):
        return True
    return isinstance(raw, list) and all(isinstance(item, int) for item in cast("list[object]", raw))


def _statistics(images: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, from exact counts: no second copy in float64."""
    levels = np.arange(256)
    means: list[float] = []
    deviations: list[float] = []
    for channel in range(_CHANNELS):
        counts = np.bincount(images[:, channel].ravel(), minlength=256)
        mean = float((counts * levels).sum() / counts.sum())
        variance = float((counts * (levels - mean) ** 2).sum() / counts.sum())
        means.append(mean)
        deviations.append(variance**0.5 or 1.0)  # a channel of one value stays at 0
    return torch.tensor(means).view(-1, 1, 1), torch.tensor(deviations).view(-1, 1, 1)


def _standardised(images: NDArray[np.uint8], mean: Tensor, std: Tensor) -> Tensor:
    return torch.as_tensor(images.astype(np.float32)).sub_(mean).div_(std)
