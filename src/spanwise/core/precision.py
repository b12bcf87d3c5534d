"""How many bits a value keeps on a link: all of them, unless a link is named that gives some up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from spanwise.core.model import TensorSpec

Precision = Literal["full", "half", "int8"]

VALUE_BYTES: dict[Precision, int] = {"half": 2, "int8": 1}
SCALE_BYTES = 4  # one float32 a row


def reduces(dtype: str, item_bytes: int, precision: Precision) -> bool:
    """Whether values of this type become smaller: floating point ones that are larger than that."""
    return precision != "full" and "float" in dtype and item_bytes > VALUE_BYTES[precision]


def wire_row_bytes(specs: Iterable[TensorSpec], precision: Precision) -> int:
    """Bytes of one row on the wire: of each tensor its values and the row's scale, or the row as it is."""
    return sum(
        spec.row_bytes // spec.item_bytes * VALUE_BYTES[precision] + SCALE_BYTES
        if reduces(spec.dtype, spec.item_bytes, precision)
        else spec.row_bytes
        for spec in specs
    )
