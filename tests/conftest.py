"""Its place puts this folder on the import path: cases that several test folders share lie beside it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Small tensors on many threads wait for each other, the longer the busier the machine. Before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, and no limit on time: a busy machine must not fail a test.
settings.register_profile("spanwise", deadline=None, derandomize=True)
settings.load_profile("spanwise")

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_finish() -> None:
    """What is imported stays: passes of the garbage collector need not go through all of torch again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares with ``tests/golden/<name>.txt``, or rewrites it with the option."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
            return
        assert path.is_file(), f"{path.name} is missing; write it with --update-golden and read it"
        assert text == path.read_text(encoding="utf-8"), "if this is meant, write it with --update-golden"

    return compare
