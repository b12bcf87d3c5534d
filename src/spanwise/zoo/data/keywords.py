"""Spoken words as log-mel pictures, from a folder laid out like Speech Commands."""

from __future__ import annotations

import hashlib
import wave
from collections.abc import Sequence
from math import log10
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from spanwise.core.errors import InputError

RATE = 16_000  # samples per second, and samples of a word: each file is one second
_WINDOW, _HOP = 512, 512
_LOWEST_HZ, _HIGHEST_HZ = 20.0, 7600.0
_TEST_LIST = "testing_list.txt"
_SPEAKERS = 2**27 - 1  # MAX_NUM_WAVS_PER_CLASS in the data set's README
_FLOOR = 1e-6
_FILES = 512  # whose spectra are computed at once


def keywords(
    root: str | Path,
    words: Sequence[str] = (),
    size: int = 32,
    channels: int = 3,
    test_fraction: float = 0.1,
) -> tuple[TensorDataset, TensorDataset]:
    """Spoken words: one folder a word, in it WAV files of 16 kHz, 16 bits, one channel, up to a second.

    The layout is that of Speech Commands (Warden, "Speech Commands: A dataset for limited-vocabulary speech
    recognition", arXiv 1804.03209, 2018); nothing is downloaded. Files that ``testing_list.txt`` names are
    the test set; without that list the rule of the data set's README, by the speaker in front of
    ``_nohash_`` in a file's name: all words of a speaker are on one side.

    Args:
        root: the folder that holds one folder a word.
        words: in the order of their class numbers; every folder that holds WAV files, by name, without.
        size: mel bands and frames.
        channels: the picture is repeated this many times.
        test_fraction: of the speakers, where there is no list.

    Returns:
        (training set, test set) of x (rows, channels, size, size) float32, log-mel energies standardised by
        the training set, and y (rows,) int64 in [0, words).

    Raises:
        InputError: a folder or file is missing or not of this form, or one of the sets is empty.
    """
    folder = Path(root)
    names = tuple(words) or _words(folder)
    listed = _listed(folder)
    sides: tuple[list[Path], list[Path]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for label, word in enumerate(names):
        for path in _files(folder, word):
            name = f"{word}/{path.name}"
            held_out = name in listed if listed is not None else in_test(path.name, test_fraction)
            sides[held_out].append(path)
            labels[held_out].append(label)
    if not sides[0] or not sides[1]:
        raise InputError(
            f"data 'keywords': {len(sides[0])} files to train and {len(sides[1])} to test in '{folder}'; "
            f"both need some: list test files in {_TEST_LIST}, or add speakers"
        )
    train, test = (_pictures(paths, size) for paths in sides)
    mean, deviation = train.mean(), train.std()
    return tuple(  # pyright: ignore[reportReturnType]
        TensorDataset(((x - mean) / deviation).expand(-1, channels, -1, -1), torch.tensor(y))
        for x, y in zip((train, test), labels, strict=True)
    )


def in_test(name: str, fraction: float) -> bool:
    """Whether a file belongs to the test set by its speaker: the hash rule of the data set's README."""
    speaker = name.partition("_nohash_")[0]
    digest = hashlib.sha1(speaker.encode(), usedforsecurity=False).hexdigest()
    return (int(digest, 16) % (_SPEAKERS + 1)) / _SPEAKERS < fraction


def log_mel(sound: Tensor, size: int) -> Tensor:
    """Log-mel energies of sounds of a second.

    Args:
        sound: (rows, 16000) in [-1, 1].
        size: mel bands, and frames: the spectrum is taken at so many places, evenly.

    Returns:
        (rows, 1, size, size) float32, low bands first.
    """
    hop = _HOP * 32 // size
    found = torch.stft(
        sound, _WINDOW, hop, window=torch.hann_window(_WINDOW), center=True, return_complex=True
    )
    power = found.abs().square()[:, :, :size]
    return (mel_bands(size) @ power).add(_FLOOR).log()[:, None]


def mel_bands(size: int) -> Tensor:
    """``[band, frequency]`` triangles, evenly spaced in mel = 2595 log10(1 + f / 700).

    O'Shaughnessy, "Speech communication: human and machine", 1987; the form that HTK made common.
    """
    low, high = (2595.0 * log10(1.0 + f / 700.0) for f in (_LOWEST_HZ, _HIGHEST_HZ))
    edges: NDArray[np.float64] = 700.0 * (np.power(10.0, np.linspace(low, high, size + 2) / 2595.0) - 1.0)
    at: NDArray[np.float64] = np.linspace(0.0, RATE / 2, _WINDOW // 2 + 1)
    rising = (at - edges[:-2, None]) / (edges[1:-1, None] - edges[:-2, None])
    falling = (edges[2:, None] - at) / (edges[2:, None] - edges[1:-1, None])
    return torch.as_tensor(np.maximum(0.0, np.minimum(rising, falling)), dtype=torch.float32)


def read_wave(path: Path) -> Tensor:
    """(16000,) float32 in [-1, 1): the file's first second, silence behind shorter ones."""
    try:
        with wave.open(str(path), "rb") as file:
            form = (file.getframerate(), file.getsampwidth(), file.getnchannels())
            content = file.readframes(RATE)
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(
            f"file '{path}': cannot be read as WAV ({error or 'it ends early'}); remove or replace it"
        ) from None
    if form != (RATE, 2, 1):
        raise InputError(
            f"file '{path}': {form[0]} Hz, {8 * form[1]} bits, {form[2]} channel(s); must be {RATE} Hz, "
            "16 bits, 1 channel: convert it"
        )
    found = np.zeros(RATE, dtype=np.float32)
    samples = np.frombuffer(content[: len(content) // 2 * 2], dtype="<i2").astype(np.float32)
    found[: len(samples)] = samples / 32768.0
    return torch.as_tensor(found)


def _words(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise InputError(
            f"data 'keywords': no folder '{folder}'; give the one that holds a folder for each word"
        )
    found = (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("_"))
    words = tuple(path.name for path in found if any(path.glob("*.wav")))
    if len(words) < 2:
        raise InputError(
            f"data 'keywords': '{folder}' holds {len(words)} folder(s) with WAV files; 2 are needed"
        )
    return words


def _files(folder: Path, word: str) -> list[Path]:
    found = sorted((folder / word).glob("*.wav"))
    if not found:
        raise InputError(
            f"data 'keywords': no WAV files in '{folder / word}'; record some or leave out the word"
        )
    return found


def _listed(folder: Path) -> frozenset[str] | None:
    path = folder / _TEST_LIST
    if not path.is_file():
        return None
    return frozenset(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _pictures(paths: list[Path], size: int) -> Tensor:
    parts = [paths[at : at + _FILES] for at in range(0, len(paths), _FILES)]
    return torch.cat([log_mel(torch.stack([read_wave(p) for p in part]), size) for part in parts])
