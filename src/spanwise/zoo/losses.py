"""Losses that ``torch.nn.functional`` has under no name of its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def language_model_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the next token, the mean over rows and tokens.

    Every row has equally many tokens, so this is also the mean over rows of each row's mean: what a
    plan divides between replicas by rows.

    Args:
        logits: (rows, tokens, vocabulary), not normalised.
        targets: (rows, tokens), int64 token ids.

    Returns:
        A scalar, in nats per token.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
