"""Keeps this machine's cores awake with processes that give way to everything else.

Emulated devices rest for most of every period. A virtual machine's core that falls asleep then is taken away
and comes back cold: 8 rows of a ViT under a quota of 0.21 of a core took 53 to 90 ms of processor time a row,
24 to 38 ms with the cores awake, and 14 ms without a quota.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# Ends by itself if whoever started it is gone; ``SCHED_IDLE`` runs only when nobody else wants to.
_SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == int(sys.argv[2]):
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Nothing where the kernel has no such policy."""
    if not hasattr(os, "SCHED_IDLE"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    spinning = [
        subprocess.Popen([sys.executable, "-c", _SPIN, str(core), str(os.getpid())]) for core in cores
    ]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
