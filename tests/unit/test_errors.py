from __future__ import annotations

import re

import pytest

from spanwise.core import errors
from spanwise.core.errors import InputError, PeerError, PlanError, SpanwiseError


def all_errors() -> list[type[SpanwiseError]]:
    return [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, SpanwiseError)]


def test_exit_codes_are_as_documented() -> None:
    documented = dict(re.findall(r"(\w+Error)\s+(\d+)", errors.__doc__ or ""))
    codes = {e.__name__: str(e.exit_code) for e in all_errors() if e is not PlanError}
    assert codes == documented


def test_exit_codes_are_unique_and_not_those_of_shells() -> None:
    codes = [e.exit_code for e in all_errors() if e is not PlanError]
    assert sorted(codes) == list(range(1, len(codes) + 1))
    assert PlanError.exit_code == InputError.exit_code  # a kind of InputError


@pytest.mark.parametrize("kind", all_errors())
def test_messages_are_one_line(kind: type[SpanwiseError]) -> None:
    error = kind("first\n   second\tthird")
    assert str(error) == "first second third"


def test_a_peer_error_knows_its_device() -> None:
    assert PeerError("x", device="edge").device == "edge"
    assert PeerError("x").device is None
