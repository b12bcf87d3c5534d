"""Planning without passes of the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Generator[None]:
    """No passes of the garbage collector meanwhile, for the seconds that planning takes.

    It makes some hundred thousand plans, actions and events, which set off passes over everything there is;
    hardly any of its own is garbage before it ends, but for what a simulation leaves, a few MB each time.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
