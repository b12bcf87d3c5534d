"""``ip`` and ``tc`` in batches, and threads that enter a network namespace."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from spanwise.core.errors import ResourceError

T = TypeVar("T")

NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_TIMEOUT_S = 30.0


def require_tools() -> None:
    """Raises ``ResourceError`` where ``ip`` or ``tc`` is missing."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise ResourceError(
                f"lab: the program '{tool}' is not on this machine; install the package iproute2, or train "
                "without a lab (the portable emulation needs neither root nor programs)"
            )


def call(*argv: str, text: str | None = None, check: bool = True) -> str:
    """Runs one command, returns what it printed; ``ResourceError`` with its own words if it fails.

    ``text`` is its standard input.
    """
    try:
        done = subprocess.run(
            argv, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise ResourceError(f"lab: the program '{argv[0]}' is not on this machine; install it") from None
    except subprocess.TimeoutExpired:
        raise ResourceError(f"lab: '{' '.join(argv)}' did not end within {_TIMEOUT_S:g} s") from None
    if check and done.returncode:
        words = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise ResourceError(f"lab: '{' '.join(argv)}' failed: {words}")
    return done.stdout


def batch(tool: str, namespace: str, lines: Iterable[str]) -> None:
    """Runs several commands of ``ip`` or ``tc`` in a namespace, all in one process."""
    text = "\n".join(lines)
    if text:
        call(tool, "-n", namespace, "-batch", "-", text=text + "\n")


def inside(namespace: str, work: Callable[[], T]) -> T:
    """What ``work`` returns when it is done by a thread that has entered the network namespace.

    Sockets and TUN interfaces made there stay there, whichever thread uses them afterwards.
    """
    found: list[T] = []
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            handle = os.open(NAMESPACES / namespace, os.O_RDONLY)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(handle, _CLONE_NEWNET) != 0:
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code))
            finally:
                os.close(handle)
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=enter, name=f"in {namespace}")
    thread.start()
    thread.join()
    if failed:
        error = failed[0]
        if isinstance(error, OSError):
            raise ResourceError(f"lab: in namespace {namespace}: {error.strerror or error}") from None
        raise error
    return found[0]


def write_sysctls(namespace: str, values: dict[str, str]) -> None:
    """Network settings of a namespace, ``{"net/ipv4/ip_forward": "1"}``.

    Of several words the first that the kernel allows is taken; settings that it does not know are left.
    """

    def write() -> None:
        for name, value in values.items():
            path = Path("/proc/sys") / name
            for word in value.split() if path.exists() else ():
                with contextlib.suppress(PermissionError):
                    path.write_text(word, encoding="ascii")
                    break

    inside(namespace, write)
