"""Workers are started once for the whole run; tests hand them plan after plan."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def pool() -> Iterator[object]:
    from equality import DEVICES, cluster

    from spanwise.runtime.pool import Meeting, WorkerPool

    workers = WorkerPool(cluster(), DEVICES, Meeting(), emulate=False)
    yield workers
    workers.close()
