"""Whether freed memory stays in the process: quicker, as it is not faulted in again, but more of it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping

#: Environment of a process that will hand freed memory back: torch asks the kernel for huge pages for tensors
#: of 2 MiB and more, so that pages that come anew are of 2 MiB, where a tensor covers one, and not of 4 KiB.
#: Torch looks at it once. No effect where ``/sys/kernel/mm/transparent_hugepage/enabled`` is ``never``, and
#: none is needed where that is ``always``.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more on 64 bits
_NEVER_TRIM = 2**31 - 1
_SMALL_MMAP_THRESHOLD, _TRIM_SOON = 2**20, 2**17


def keep_freed_memory() -> bool:
    """Tells glibc not to hand freed activations back to the system between micro-batches.

    By default large tensors are mapped and unmapped, and the top of the heap is trimmed, so the same pages
    are zeroed again in every forward: on one core that was 5 to 30 % of MobileNetV2's time, and it varied
    with what the process had allocated before. It is not returned until the process ends, and where small
    tensors are kept between large ones, as masks are, holes add up. Returns whether it worked; other C
    libraries are left as they are.
    """
    return _set({_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _TRIM_THRESHOLD: _NEVER_TRIM})


def keep_freed_memory_of_threads() -> bool:
    """The same where threads train: they share one heap from now on.

    Heaps of their own are unmapped as soon as they are empty: seven threads that train on two cores took
    5.1 s, with one heap 2.9 s. Not for workers, where what a thread received would stay as a hole.
    """
    return _set({_ARENA_MAX: 1}) and keep_freed_memory()


def give_freed_memory_back() -> bool:
    """Tells glibc to map tensors of a MiB and more one by one, so that freed ones leave no holes.

    For devices whose plan counts on what layers do not keep. MobileNetV2 with a part of its weights trained,
    32 rows, 108 MiB kept for backward: at most 277 MiB with freed memory kept and 158 MiB so. A pass took 1.8
    times as long, as pages are faulted in anew, and 1.4 times in huge pages. Returns whether it worked.
    """
    return _set({_MMAP_THRESHOLD: _SMALL_MMAP_THRESHOLD, _TRIM_THRESHOLD: _TRIM_SOON})


def give_back_what_is_free() -> bool:
    """Hands back what is free now, also between what is not, as a state that came whole leaves it behind.

    Returns whether anything went back; other C libraries are left as they are.
    """
    trim = _libc("malloc_trim")
    return trim is not None and bool(trim(0))


def _set(parameters: Mapping[int, int]) -> bool:
    mallopt = _libc("mallopt")
    if mallopt is None:
        return False
    return all(bool(mallopt(parameter, value)) for parameter, value in parameters.items())


def _libc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
