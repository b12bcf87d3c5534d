"""The layer tables of the DynaComm study have the published totals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "dynacomm"))

from nets import NETS, read


@pytest.mark.parametrize(
    ("name", "layers", "parameters", "giga_multiply_adds"),
    [
        ("vgg19", 19, 143_667_240, 19.632),
        ("googlenet", 58, 6_624_904, 1.498),
        ("inception_v4", 150, 42_679_816, 12.28),
        ("resnet50", 54, 25_557_032, 4.089),
        ("resnet152", 156, 60_192_808, 11.514),
    ],
)
def test_published_totals(name: str, layers: int, parameters: int, giga_multiply_adds: float) -> None:
    """Parameters to the last one; multiply-adds as model libraries print them, some count a little more."""
    table = read(name)
    assert len(table) == layers
    assert sum(layer.parameters for layer in table) == parameters
    assert sum(layer.multiply_adds for layer in table) / 1e9 == pytest.approx(giga_multiply_adds, rel=3e-3)


@pytest.mark.parametrize("name", list(NETS))
def test_tables_are_what_the_architectures_give(name: str) -> None:
    table = read(name)
    assert table == NETS[name]()
    assert len({layer.name for layer in table}) == len(table)
