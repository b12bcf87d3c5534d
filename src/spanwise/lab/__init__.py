"""An emulated testbed on one Linux machine: namespaces, shaped links, CPU shares and memory limits."""

from __future__ import annotations

from spanwise.lab.lab import LIBRARY_BYTES, Lab, reason_against

__all__ = ["LIBRARY_BYTES", "Lab", "reason_against"]
