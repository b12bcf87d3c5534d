"""Faults as values: what goes wrong in a simulated run, and what slows down in an emulated one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from spanwise.core.cluster import Id
from spanwise.core.errors import InputError
from spanwise.core.noun import Noun

FaultKind = Literal["lose", "slow", "cut"]

_TEXT = re.compile(
    r"(?P<kind>lose|slow|cut):(?P<device>[A-Za-z0-9_.-]+)(?:>(?P<peer>[A-Za-z0-9_.-]+))?"
    r"(?:\*(?P<factor>[0-9.]+(?:e[+-]?[0-9]+)?))?@(?P<step>\d+)"
)


class Fault(Noun):
    """Something that goes wrong when step ``step`` begins.

    ``lose`` ends a device; ``slow`` multiplies the time of its compute by ``factor`` or, with ``peer``,
    that of messages on the link; ``cut`` stops all messages on a link. Text form: ``lose:edge@3``,
    ``slow:edge*2.5@3``, ``slow:a>b*4@0``, ``cut:a>b@3``.
    """

    kind: FaultKind
    device: Id
    peer: Id | None = None
    factor: float = Field(default=1.0, gt=0)
    step: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> Fault:
        if self.kind == "cut" and self.peer is None:
            raise InputError(f"fault cut:{self.device}: needs a link, like cut:{self.device}>other@0")
        if self.kind == "lose" and self.peer is not None:
            raise InputError(f"fault lose:{self.device}>{self.peer}: only devices are lost; use cut")
        if self.kind != "slow" and self.factor != 1.0:
            raise InputError(f"fault {self.kind}:{self.device}: a factor belongs to slow only")
        return self

    def __str__(self) -> str:
        peer = f">{self.peer}" if self.peer is not None else ""
        factor = f"*{self.factor!r}" if self.kind == "slow" else ""
        return f"{self.kind}:{self.device}{peer}{factor}@{self.step}"

    @classmethod
    def of(cls, text: str) -> Fault:
        """Reads the text form."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise InputError(
                f"fault '{text}': write it like lose:edge@3, slow:edge*2.5@3 or cut:edge>cloud@3"
            )
        data = {key: value for key, value in match.groupdict().items() if value is not None}
        return cls.parse(data)


def slowdown(faults: Iterable[Fault], device: str, step: int) -> float:
    """Factor on a device's compute by ``slow`` faults that have begun."""
    factor = 1.0
    for fault in faults:
        if fault.kind == "slow" and fault.peer is None and fault.device == device and step >= fault.step:
            factor *= fault.factor
    return factor


def stretch(faults: Iterable[Fault], source: str, target: str, step: int) -> float | None:
    """Factor on bytes and latency of messages by ``slow`` faults of a link; None when it is cut.

    More bytes, as if parts were lost and sent again: a slow link also takes more of what it shares.
    """
    factor = 1.0
    for fault in faults:
        if (fault.device, fault.peer) == (source, target) and step >= fault.step:
            if fault.kind == "cut":
                return None
            factor *= fault.factor
    return factor
