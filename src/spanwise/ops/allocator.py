"""Keeps freed memory in the process, so that every micro-batch does not fault it in again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more on 64 bits
_NEVER_TRIM = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc not to hand freed activations back to the system between micro-batches.

    By default large tensors are mapped and unmapped, and the top of the heap is trimmed, so the same pages
    are zeroed again in every forward: on one core that was 5 to 30 % of MobileNetV2's time, and it varied
    with what the process had allocated before. Peak memory is unchanged, but it is not returned until the
    process ends. Returns whether it worked; other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(
        mallopt(_TRIM_THRESHOLD, _NEVER_TRIM)
    )
