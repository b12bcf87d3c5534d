"""Quantities as people write them ("2 GiB", "100 Mbit/s", "10 ms") to and from SI numbers."""

from __future__ import annotations

import math
import re

from spanwise.core.errors import InputError

_BYTES = {
    "B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40,
}  # fmt: skip
_RATES = {f"{prefix}bit/s": factor / 8 for prefix, factor in
          (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9))} | {
          f"{unit}/s": factor for unit, factor in _BYTES.items()}  # fmt: skip
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}

_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµ/]+)\s*")


_HUGE = 2**1023  # about the greatest float


def _parse(text: object, units: dict[str, float], what: str, example: str) -> float:
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise InputError(f"{what}: {text} is not a quantity; write it like '{example}'")
    if not isinstance(text, str):
        value = float(text) if abs(text) < _HUGE else math.inf
    else:
        match = _QUANTITY.fullmatch(text)
        if match is None or match.group(2) not in units:
            raise InputError(
                f"{what}: '{text}' is not a quantity; write it like '{example}' (units: {', '.join(units)})"
            )
        value = float(match.group(1)) * units[match.group(2)]
    if not math.isfinite(value) or value < 0:
        raise InputError(f"{what}: {text} must be finite and not negative")
    return value


def parse_bytes(text: str | float | int, what: str = "memory") -> int:
    """Bytes of "2 GiB" (powers of 1024), "2 GB" (powers of 1000) or a plain number."""
    return round(_parse(text, _BYTES, what, "2 GiB"))


def parse_rate(text: str | float | int, what: str = "bandwidth") -> float:
    """Bytes per second of "100 Mbit/s", "12.5 MB/s" or a plain number of bytes per second."""
    return _parse(text, _RATES, what, "100 Mbit/s")


def parse_seconds(text: str | float | int, what: str = "latency") -> float:
    """Seconds of "10 ms", "20 us" or a plain number of seconds."""
    return _parse(text, _SECONDS, what, "10 ms")


def format_bytes(value: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_rate(bytes_per_s: float) -> str:
    """12_500_000 -> '100 Mbit/s'."""
    bits = bytes_per_s * 8
    for unit, factor in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits >= factor:
            return f"{bits / factor:.4g} {unit}"
    return f"{bits:.4g} bit/s"


def format_seconds(value: float) -> str:
    """0.0123 -> '12.3 ms'."""
    if value >= 1:
        return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
    if value >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} us"
