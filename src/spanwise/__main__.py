"""``python -m spanwise``."""

from __future__ import annotations

from spanwise.cli import main

main()
