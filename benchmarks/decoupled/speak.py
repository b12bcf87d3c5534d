"""Speaks words with espeak-ng into a folder laid out like Speech Commands: words x voices x speeds x pitches.

Debian: ``apt-get install espeak-ng``. Every sound is a second at 16 kHz, placed at random in it, at a random
loudness and over faint random noise, all by seed; so the same options give the same files. A voice is a
speaker: a fifth of the voices is the test set (``testing_list.txt``), all words of a voice on one side.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import wave
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")  # those of Speech Commands
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-029")
VARIANTS = ("f1", "f2", "f3", "f4", "m1", "m3", "m4", "m7")
SPEEDS = (120, 150, 185)  # words a minute
PITCHES = (30, 50, 70)  # of 0 to 99
RATE = 16_000
TEST_EVERY = 5

Floats = NDArray[np.float64]


def spoken(word: str, voice: str, speed: int, pitch: int) -> Floats:
    """What espeak-ng says, at 16 kHz, without the silence around it."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    content = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(content), "rb") as file:
        rate = file.getframerate()
        raw = file.readframes(file.getnframes())
    sound = np.frombuffer(raw[: len(raw) // 2 * 2], dtype="<i2").astype(np.float64) / 32768.0
    at = np.arange(int(len(sound) * RATE / rate)) * (rate / RATE)
    sound = np.interp(at, np.arange(len(sound)), sound)
    loud = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())
    return sound[loud[0] : loud[-1] + 1][:RATE]


def placed(sound: Floats, generator: np.random.Generator) -> Floats:
    """A second with the word somewhere in it."""
    found = generator.normal(0.0, 10 ** generator.uniform(-3.5, -2.0), RATE)
    start = int(generator.integers(0, RATE - len(sound) + 1))
    loudness = generator.uniform(0.3, 0.9) / max(float(np.abs(sound).max()), 1e-6)
    found[start : start + len(sound)] += loudness * sound
    return np.clip(found, -1.0, 1.0)


def write(path: Path, sound: Floats) -> None:
    """16 kHz, 16 bits, one channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setframerate(RATE)
        file.setsampwidth(2)
        file.setnchannels(1)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


def generate(
    folder: Path, words: tuple[str, ...] = WORDS, voices: int = len(ACCENTS) * len(VARIANTS), seed: int = 0
) -> int:
    """Writes what is missing; the number of files. ``voices``: so many, accents in turn."""
    ways = list(product(SPEEDS, PITCHES))
    chosen = [f"{accent}+{variant}" for variant, accent in product(VARIANTS, ACCENTS)][:voices]
    held_out: list[str] = []
    for number, voice in enumerate(chosen):
        speaker = hashlib.sha1(voice.encode(), usedforsecurity=False).hexdigest()[:8]
        for word, (take, (speed, pitch)) in product(words, enumerate(ways)):
            name = f"{word}/{speaker}_nohash_{take}.wav"
            if number % TEST_EVERY == TEST_EVERY - 1:
                held_out.append(name)
            if not (folder / name).is_file():
                key = int.from_bytes(hashlib.sha1(f"{seed} {name}".encode()).digest()[:8], "big")
                write(folder / name, placed(spoken(word, voice, speed, pitch), np.random.default_rng(key)))
    (folder / "testing_list.txt").write_text("\n".join(sorted(held_out)) + "\n", encoding="utf-8")
    return len(chosen) * len(words) * len(ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        count = generate(args.folder, seed=args.seed)
    except FileNotFoundError:
        sys.exit("espeak-ng is not installed: apt-get install espeak-ng")
    print(f"{count} files of {len(WORDS)} words in {args.folder}")


if __name__ == "__main__":
    main()
