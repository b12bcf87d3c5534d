"""Freed memory stays: the second run of the same work faults no pages in."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from spanwise.ops.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    kept = [torch.ones(1_000_000) for _ in range(20)]
    return sum(float(t[0]) for t in kept)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work(); work()
before = faults()
work()
print(faults() - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt belongs to glibc")
def test_the_same_work_faults_nothing_in_again() -> None:
    kept, default = faults("keep"), faults("default")
    # Huge pages make faults few, so only the ratio tells; the second number is the negative control.
    assert 3 * kept < default, (kept, default)
