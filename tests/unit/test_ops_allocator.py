"""Freed memory stays: the second run of the same work faults no pages in."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys, threading, torch
from spanwise.ops.allocator import give_freed_memory_back, keep_freed_memory, keep_freed_memory_of_threads
torch.set_num_threads(1)
keep = keep_freed_memory_of_threads if "thread" in sys.argv[1] else keep_freed_memory
assert (keep if "keep" in sys.argv[1] else give_freed_memory_back)()
def allocate():
    kept = [torch.ones(1_000_000) for _ in range(20)]
    return sum(float(t[0]) for t in kept)
def work():
    if "thread" not in sys.argv[1]:
        return allocate()
    threads = [threading.Thread(target=allocate) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def faults_of_work():
    before = faults()
    work()
    return faults() - before
work(); work()
print(min(faults_of_work() for _ in range(5)))  # small tensors may take a large one's place for a while
"""


HOLES = """
import psutil, sys, torch
from spanwise.ops import allocator
assert (allocator.give_freed_memory_back if sys.argv[1] == "back" else allocator.keep_freed_memory)()
before = psutil.Process().memory_info().rss
kept = []
for size in range(40, 0, -1):  # what is freed leaves a hole too small for the next
    large = torch.ones(100_000 * (41 - size))
    kept.append(torch.ones(10_000))
    del large
print((psutil.Process().memory_info().rss - before) // 2**20)
"""


FREED = """
import psutil, sys, torch
from spanwise.ops import allocator
allocator.keep_freed_memory()
kept = [torch.ones(2_000) for _ in range(4_000)][::200]  # 32 MB, of which little stays here and there
before = psutil.Process().memory_info().rss
if sys.argv[1] == "back":
    assert allocator.give_back_what_is_free()
print((before - psutil.Process().memory_info().rss) // 2**20)
"""


def faults(mode: str) -> int:
    return run(CODE, mode)


def run(code: str, mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", code, mode], capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt belongs to glibc")
def test_freed_tensors_leave_no_holes_where_they_are_given_back() -> None:
    given, kept = run(HOLES, "back"), run(HOLES, "keep")
    assert given < 12, "40 small tensors of 40 kB"
    assert kept > 4 * given, "negative control"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim belongs to glibc")
def test_what_is_free_goes_back_at_once_from_between_what_stays() -> None:
    assert run(FREED, "back") > 20
    assert run(FREED, "keep") == 0, "negative control"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt belongs to glibc")
@pytest.mark.parametrize("where", ["", " in threads"])
def test_the_same_work_faults_nothing_in_again(where: str) -> None:
    # The control gives back, as glibc's own thresholds move with what a process did before.
    kept, given = faults("keep" + where), faults("back" + where)
    # Huge pages make faults few, so only the ratio tells; the second number is the negative control.
    assert 3 * kept < given, (kept, given)
