"""The comparison of the decoupled benchmark from cells by hand, and sounds placed by seed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "decoupled"))

from comparison import show
from speak import RATE, placed


def cell(way: str, groups: int, accuracy: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "task": "digits", "model": "vgg9", "seed": seed, "way": way, "groups": groups,
        "accuracy": accuracy, **more,
    }  # fmt: skip


SAVED = {"least_saving_per_sample": 15.8, "saving_over_devices": 4.0, "largest_difference_of_forms": 1e-6}
CELLS = [
    cell("central", 1, 0.98), cell("central", 1, 0.97, seed=1),
    cell("apart", 4, 0.972, **SAVED), cell("apart", 4, 0.970, seed=1, **SAVED),
    cell("single_width", 4, 0.98), cell("no_negatives", 4, 0.5),
    cell("apart", 10, 0.9, **{**SAVED, "least_saving_per_sample": 97.0}), cell("single_width", 10, 0.8),
]  # fmt: skip


def test_the_rival_is_named_where_it_wins_and_far_off_nets_do_not_count() -> None:
    text = show({"cells": CELLS})
    four, ten = (line for line in text.splitlines() if line.startswith("| digits"))
    assert "| 97.5 | 97.1 | 98.0 | 50.0 |" in four
    assert four.endswith("| 15.8x | 4.0x | single width |")
    assert ten.endswith("| 97.0x | 4.0x | merged |")
    assert "15.8x less compute on every device (vgg9 in 4 groups); 11.8x reached" in text
    assert "none; 11.8x not reached" in show({"cells": [c for c in CELLS if c["groups"] != 4]})


def test_sounds_are_a_second_and_follow_their_seed() -> None:
    word = np.sin(np.arange(4000) / 5.0)
    one, same, other = (placed(word, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (RATE,)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert 0.25 < np.abs(one).max() <= 1.0
