"""A worker's way to its coordinator, and what it says of itself there."""

from __future__ import annotations

import socket
import time

import torch

import spanwise
from spanwise.core.errors import JoinError
from spanwise.runtime.control import HANDSHAKE_TIMEOUT_S


def versions() -> dict[str, str]:
    """What coordinator and workers must have in common."""
    return {"spanwise": spanwise.__version__, "torch": torch.__version__.split("+")[0]}


def connect(host: str, port: int, patience_s: float) -> socket.socket:
    """A connection as soon as somebody listens there; ``JoinError`` if nobody does within ``patience_s``."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return socket.create_connection((host, port), timeout=HANDSHAKE_TIMEOUT_S)
        except OSError as error:
            if time.monotonic() > end:
                raise JoinError(
                    f"coordinator {host}:{port}: no answer within {patience_s:g} s "
                    f"({error.strerror or error}); is 'spanwise train' running there?"
                ) from None
            time.sleep(0.2)


def machine() -> str:
    """Processor, system and interpreter."""
    import platform

    return f"{platform.machine()} {platform.system()} python {platform.python_version()}"
