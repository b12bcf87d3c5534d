"""GPipe: all forwards, then all backwards. Huang et al., NeurIPS 2019, section 2.2."""

from __future__ import annotations

from spanwise.core.order import Op


def gpipe(micro_batches: int) -> tuple[Op, ...]:
    """F0 F1 .. F(M-1), then B0 .. B(M-1); activations of all M micro-batches live at once.

    Backwards go first in, first out, as in 1f1b, so that gradients reach the previous stage in the
    order in which it made the activations.
    """
    forwards = tuple(Op("forward", m) for m in range(micro_batches))
    return forwards + tuple(Op("backward", m) for m in range(micro_batches))
