"""The Speech Commands reader on generated files."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from spanwise.core.errors import InputError
from spanwise.zoo import keywords
from spanwise.zoo.data.keywords import RATE, in_test, log_mel, mel_bands, read_wave

SPEAKERS = [f"{n:08x}" for n in range(40)]


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)


def write(path: Path, sound: np.ndarray, rate: int = RATE, width: int = 2, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setframerate(rate)
        file.setsampwidth(width)
        file.setnchannels(channels)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


@pytest.fixture
def spoken(tmp_path):
    """Two "words": a low and a high tone, of forty speakers; background noise is no word."""
    for word, hertz in (("high", 3000.0), ("low", 300.0)):
        for number, speaker in enumerate(SPEAKERS):
            write(tmp_path / word / f"{speaker}_nohash_0.wav", tone(hertz + number, 0.5))
    write(tmp_path / "_background_noise_" / "hum.wav", tone(50.0, 3.0))
    return tmp_path


def test_words_are_classes_and_speakers_are_on_one_side(spoken):
    train, test = keywords(spoken, test_fraction=0.25)
    assert len(train) + len(test) == 80
    held = sum(in_test(f"{s}_nohash_0.wav", 0.25) for s in SPEAKERS)
    assert len(test) == 2 * held > 0
    x, y = train.tensors
    assert x.shape[1:] == (3, 32, 32)
    assert y.bincount().tolist() == [40 - held] * 2
    assert float(x[:, 0].mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(x[:, 0].std()) == pytest.approx(1.0, abs=1e-4)
    high, low = x[y == 0, 0, :, :14].mean((0, 2)), x[y == 1, 0, :, :14].mean((0, 2))
    assert int(high.argmax()) > int(low.argmax()) + 5  # bands go from low to high
    assert x[0, 0, :, 0].max() > x[0, 0, :, -1].max()  # silence behind half a second


def test_lists_and_orders_of_words_are_kept(spoken):
    (spoken / "testing_list.txt").write_text(f"low/{SPEAKERS[3]}_nohash_0.wav\n")
    train, test = keywords(spoken, words=("low", "high"), size=16, channels=1)
    assert (len(train), len(test)) == (79, 1)
    assert test.tensors[0].shape == (1, 1, 16, 16)
    assert test.tensors[1].tolist() == [0]


def test_the_split_is_that_of_the_published_rule():
    # sha1 of the speaker, modulo 2^27, over 2^27 - 1
    assert in_test("anything_nohash_0.wav", 1.1)
    assert not in_test("anything_nohash_0.wav", 0.0)
    assert in_test("0a7c2a8d_nohash_1.wav", 0.3) == in_test("0a7c2a8d_nohash_7.wav", 0.3)
    share = np.mean([in_test(f"{n}_nohash_0.wav", 0.2) for n in range(2000)])
    assert share == pytest.approx(0.2, abs=0.03)


def test_mel_bands_cover_the_range_and_peak_in_order():
    bands = mel_bands(32)
    assert bands.shape == (32, 257)
    assert (bands.sum(1) > 0).sum() >= 28  # the lowest are narrower than a bin of 31 Hz
    peaks = bands.argmax(1)[4:]
    assert (peaks[1:] >= peaks[:-1]).all()
    picture = log_mel(torch.as_tensor(tone(1000.0), dtype=torch.float32)[None], 32)
    assert picture.shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"rate": 22050}, "22050 Hz, 16 bits, 1 channel"),
        ({"width": 1}, "8 bits"),
        ({"channels": 2}, r"2 channel\(s\)"),
    ],
)
def test_other_forms_of_sound_are_named(tmp_path, form, message):
    write(tmp_path / "a.wav", tone(300.0, 0.1), **form)
    with pytest.raises(InputError, match=message):
        read_wave(tmp_path / "a.wav")


def test_bad_folders_and_files_are_named(tmp_path, spoken):
    with pytest.raises(InputError, match="no folder"):
        keywords(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds 0 folder\(s\)"):
        keywords(tmp_path / "empty")
    with pytest.raises(InputError, match="no WAV files in"):
        keywords(spoken, words=("low", "stop"))
    with pytest.raises(InputError, match="80 files to train and 0 to test"):
        keywords(spoken, test_fraction=0.0)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    with pytest.raises(InputError, match="cannot be read as WAV"):
        read_wave(tmp_path / "broken.wav")
