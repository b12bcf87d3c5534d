"""How much memory a worker's part of a plan takes, as the operating system sees it."""

from __future__ import annotations

from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class MemoryWatch:
    """Peak resident bytes of this process above what it held when the watch began.

    Linux keeps the peak itself, once told to forget the one of start-up. Elsewhere the peak is the
    largest value seen by ``sample``.
    """

    def __init__(self) -> None:
        self._base = psutil.Process().memory_info().rss
        self._seen = self._base
        try:
            _CLEAR.write_text("5", encoding="ascii")  # resets the peak; see proc(5)
            self._kernel = True
        except OSError:
            self._kernel = False

    def sample(self) -> None:
        """Looks at the current value, where the kernel does not keep the peak."""
        if not self._kernel:
            self._seen = max(self._seen, psutil.Process().memory_info().rss)

    def peak_bytes(self) -> int:
        """Most bytes above the beginning."""
        self.sample()
        return max(0, (_kernel_peak() if self._kernel else self._seen) - self._base)


def _kernel_peak() -> int:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
