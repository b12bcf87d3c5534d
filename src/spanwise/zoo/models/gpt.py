"""A small GPT."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from spanwise.core.errors import InputError

_STD = 0.02


def gpt(
    vocab: int = 256,
    n_layer: int = 4,
    n_head: int = 4,
    d_model: int = 128,
    seq: int = 64,
    *,
    tied: bool = True,
) -> nn.Module:
    """A decoder-only transformer with learned positions and normalisation in front of each block.

    Radford, Wu, Child, Luan, Amodei, Sutskever, "Language models are unsupervised multitask learners", 2019,
    section 2.3; tied head: Press, Wolf, "Using the output embedding to improve language models", EACL 2017.

    Args:
        vocab: number of token ids.
        n_layer: transformer blocks.
        n_head: attention heads; divides ``d_model``.
        d_model: features per token.
        seq: most tokens of a row.
        tied: the head multiplies by the token embedding: both names hold one Parameter.

    Returns:
        A module from int64 tokens (rows, tokens <= seq) to logits (rows, tokens, vocab).
    """
    if d_model % n_head:
        raise InputError(f"gpt: d_model {d_model} must be a multiple of n_head {n_head}")
    return GPT(vocab, n_layer, n_head, d_model, seq, tied=tied)


class GPT(nn.Module):
    """Token and position embeddings, blocks, a last normalisation, the head."""

    def __init__(self, vocab: int, n_layer: int, n_head: int, d_model: int, seq: int, *, tied: bool) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab, d_model)
        self.position = nn.Embedding(seq, d_model)
        self.blocks = nn.Sequential(*(Block(d_model, n_head) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("out.weight"):
                # The residual stream is a sum over layers: section 2.3 scales each term by 1 / sqrt(N).
                nn.init.normal_(parameter, std=_STD / math.sqrt(2 * n_layer))
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(rows, tokens) int64 to (rows, tokens, vocab)."""
        length, most = tokens.shape[1], self.position.num_embeddings
        if length > most:
            raise InputError(f"gpt: rows of {length} tokens, at most {most}; build it with seq={length}")
        x = self.token(tokens) + self.position.weight[:length]
        return self.head(self.norm(self.blocks(x)))


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, each added to its input."""

    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, n_head)
        self.norm2 = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.out = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, d_model) to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.out(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Attention(nn.Module):
    """Multi-head attention in which a token sees itself and what is before it."""

    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, d_model) to the same."""
        # (rows, tokens, 3 * d_model) -> 3 x (rows, heads, tokens, d_model / heads)
        q, k, v = self.qkv(x).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(heads.transpose(1, 2).flatten(2))
