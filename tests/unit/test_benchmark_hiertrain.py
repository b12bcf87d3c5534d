"""Tables of the HierTrain benchmark from cells by hand: every number is a quotient of what the cells say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "hiertrain"))

from speedups import NAMES, Both, best_single, draw, error, seconds, speed_up, tables


def cell(model: str = "lenet5", mbit: float = 5.0, **steps: tuple[float, float] | str) -> dict[str, Any]:
    """Strategies with their (measured, predicted) seconds, or the name whose plan they share."""
    stages = [
        {"start": 0, "stop": 2, "replicas": [{"device": "device", "rows": 3}, {"device": "edge", "rows": 5}]},
        {"start": 2, "stop": 3, "replicas": [{"device": "edge", "rows": 8}]},
    ]
    plan = {"stages": stages, "micro_batches": 4, "schedule": "1f1b"}
    own = {name: s for name, s in steps.items() if not isinstance(s, str)}
    same = {name: s if isinstance(s, str) else name for name, s in steps.items()}
    return {
        "model": model, "batch": 32, "mbit_per_s": mbit,
        "without": {n: f"{n}: too small" for n in NAMES if n not in steps},
        "plans": {n: {"predicted_s": own[same[n]][1], "same_as": same[n], "plan": plan} for n in steps},
        "rounds": {n: [{"step_s": [s[0] * x for x in (0.5, 1.0, 1.5)], "error": ""}] for n, s in own.items()},
    }  # fmt: skip


THIN = cell(hiertrain=(0.5, 0.4), all_cloud=(4.0, 3.6), all_edge=(1.0, 1.2), two_tier="hiertrain")
WIDE = cell(mbit=100.0, hiertrain=(0.5, 0.5), all_cloud=(0.45, 0.6), all_device=(2.0, 2.0))


def test_speed_ups_are_quotients_measured_and_predicted() -> None:
    assert seconds(THIN, "all_cloud") == Both(4.0, 3.6)
    assert speed_up(THIN, "all_cloud") == Both(8.0, pytest.approx(9.0))
    assert speed_up(THIN, "two_tier") == Both(1.0, 1.0)
    assert speed_up(THIN, "split_two") == Both(None, None)
    assert best_single(THIN) == "all_edge"
    assert best_single(cell(hiertrain=(1.0, 1.0))) == ""
    assert error(THIN, "hiertrain") == pytest.approx(-0.2)
    assert error(THIN, "two_tier") is None  # one measurement counts once


def test_tables_say_what_is_missing_and_what_went_wrong() -> None:
    failed = cell("alexnet", 20.0, hiertrain=(1.0, 1.0), all_edge=(1.0, 1.5))
    failed["rounds"]["all_edge"] = [{"step_s": [], "error": "PeerError: gone"}]
    text = "\n".join(tables({"cells": [WIDE, THIN, failed], "sweep": []}))
    first = "8.00x (9.00x) | 2.00x (3.00x) | - (-) | - (-) | 1.00x (1.00x) | - (-) | 2.00x (3.00x), all_edge"
    assert f"| lenet5 | 32 | 5 | {first} |" in text
    assert text.index("| lenet5 | 32 | 5 |") < text.index("| lenet5 | 32 | 100 |")
    assert "| lenet5 | 32 | 5 | 0-1 device:3 edge:5 / 2 edge:8; 4 micro-batches, 1f1b |" in text
    assert "lenet5: 8.00x (9.00x) over all_cloud at 5 Mbit/s, the most of 2 bandwidths; published" in text
    assert "faster in 1 cases; lenet5 at 100 Mbit/s, all_cloud: 0.90x (1.20x)" in text
    assert "failed: alexnet at 20 Mbit/s, all_edge: PeerError: gone" in text
    assert "no plan: lenet5 at 5 Mbit/s, split_two: too small" in text
    assert "alexnet: " not in text  # it has no cloud to compare with


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [
        {"model": "lenet5", "mbit_per_s": x, "predicted_s": {"hiertrain": 0.5, "all_cloud": 20 / x}}
        for x in (5.0, 10.0, 100.0)
    ]
    draw({"cells": [THIN, WIDE], "sweep": points}, tmp_path / "a.svg")
    assert "lenet5, batch 32" in (tmp_path / "a.svg").read_text(encoding="utf-8")
