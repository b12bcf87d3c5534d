"""1F1B with a flush and a free warm-up depth. Narayanan et al., SOSP 2019 (PipeDream) and SC 2021."""

from __future__ import annotations

from spanwise.core.order import Op


def one_f_one_b(micro_batches: int, warmup: int) -> tuple[Op, ...]:
    """``warmup`` forwards, then one backward and one forward in turn, then the remaining backwards.

    At most ``warmup`` micro-batches keep activations at once. PyTorch fixes the depth of stage p of P at
    P-p; over slow links 2(P-p)-1 is better, as links hold micro-batches too (Asteroid, MobiCom 2024).
    """
    depth = min(warmup, micro_batches)
    order = [Op("forward", m) for m in range(depth)]
    for done in range(micro_batches):
        order.append(Op("backward", done))
        if done + depth < micro_batches:
            order.append(Op("forward", done + depth))
    return tuple(order)
