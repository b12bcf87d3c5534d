from __future__ import annotations

import pytest

from spanwise.core.errors import InputError
from spanwise.core.faults import Fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("lose:edge@3", Fault(kind="lose", device="edge", step=3)),
        ("slow:edge*2.5@3", Fault(kind="slow", device="edge", factor=2.5, step=3)),
        ("slow:a>b*4.0@0", Fault(kind="slow", device="a", peer="b", factor=4, step=0)),
        ("cut:end-1>b.c@12", Fault(kind="cut", device="end-1", peer="b.c", step=12)),
    ],
)
def test_text_form(text: str, fault: Fault) -> None:
    assert Fault.of(text) == fault
    assert str(fault) == text
    assert Fault.of(f"  {text}\n") == fault


@pytest.mark.parametrize("factor", [1e-7, 1e22, 0.1, 3.0])
def test_every_factor_survives_as_text(factor: float) -> None:
    fault = Fault(kind="slow", device="a", factor=factor)
    assert Fault.of(str(fault)) == fault


@pytest.mark.parametrize("text", ["", "lose", "lose:edge", "lose:edge@-1", "break:edge@1", "lose:@1",
                                  "lose:a b@1", "slow:a*x@1", "slow:a>@1", "lose:edge@1.5"])  # fmt: skip
def test_what_is_not_a_fault(text: str) -> None:
    with pytest.raises(InputError, match="write it like lose:edge@3"):
        Fault.of(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cut:a@1", "needs a link"),
        ("lose:a>b@1", "only devices are lost; use cut"),
        ("lose:a*2@1", "a factor belongs to slow only"),
        ("cut:a>b*2@1", "a factor belongs to slow only"),
        ("slow:a*0@1", "factor"),
        ("slow:a*1.2.3@1", "factor"),
        ("slow:a*.@1", "factor"),
    ],
)
def test_rules(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Fault.of(text)
