from __future__ import annotations

import math

import pytest

from spanwise.core.errors import InputError
from spanwise.core.units import (
    format_bytes,
    format_rate,
    format_seconds,
    parse_bytes,
    parse_rate,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2 GiB", 2 * 2**30), ("2 GB", 2 * 10**9), ("512MiB", 512 * 2**20), ("1.5 kB", 1500), ("0 B", 0),
     (" 7 B ", 7), (".5 KiB", 512), ("1e3 B", 1000), (4096, 4096), (2.6, 3)],
)  # fmt: skip
def test_bytes(text: str | float, value: int) -> None:
    assert parse_bytes(text) == value
    assert isinstance(parse_bytes(text), int)


@pytest.mark.parametrize(
    ("text", "value"),
    [("100 Mbit/s", 12.5e6), ("1 Gbit/s", 125e6), ("8 bit/s", 1.0), ("64kbit/s", 8000.0),
     ("12.5 MB/s", 12.5e6), ("1 MiB/s", 2.0**20), (3, 3.0)],
)  # fmt: skip
def test_rates(text: str | float, value: float) -> None:
    assert parse_rate(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("10 ms", 0.01), ("20 us", 2e-5), ("20 µs", 2e-5), ("3 ns", 3e-9), ("1.5 s", 1.5), (0, 0)],
)
def test_seconds(text: str | float, value: float) -> None:
    assert parse_seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "GiB",
        "-1 GiB",
        "1 gib",
        "1 GiB/s",
        "1 2 GiB",
        "1,5 GiB",
        "nan B",
        "inf GiB",
        True,
        None,
        [1],
        {},
    ],
)
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(InputError, match="write it like '2 GiB'"):
        parse_bytes(text)


@pytest.mark.parametrize("value", [-1, -0.5, math.inf, math.nan])
def test_numbers_that_are_not_quantities(value: float) -> None:
    with pytest.raises(InputError, match="finite and not negative"):
        parse_seconds(value)


def test_an_error_names_what_was_read_and_the_units() -> None:
    with pytest.raises(InputError, match=r"^up: '5 Mbps' is not a quantity; .*'100 Mbit/s'.*Mbit/s"):
        parse_rate("5 Mbps", "up")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**21, "2.0 MiB"), (3 * 2**30, "3.0 GiB"),
     (5 * 2**40, "5120.0 GiB"), (-2048, "-2.0 KiB")],
)  # fmt: skip
def test_bytes_as_text(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.5e6, "100 Mbit/s"), (125e6, "1 Gbit/s"), (1000, "8 kbit/s"), (10, "80 bit/s"), (0, "0 bit/s")],
)
def test_rates_as_text(value: float, text: str) -> None:
    assert format_rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12.3 ms"), (1.5, "1.5 s"), (123.4, "123 s"), (12e-6, "12 us"), (0, "0 us"), (1e-3, "1 ms")],
)
def test_seconds_as_text(value: float, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize("value", [1.0, 1000.0, 12.5e6, 125e6])
def test_what_is_printed_can_be_read(value: float) -> None:
    assert parse_rate(format_rate(value)) == pytest.approx(value)
