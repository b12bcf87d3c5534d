"""Modules of merged networks: sub-models side by side, block-wise linear layers, and the read-out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spanwise.core.decoupling import ReadOut as Kind


class ReadOut(nn.Module):
    """Scores in the order of classes from the outputs of all sub-models, one after the other."""

    def __init__(
        self,
        outputs: Sequence[int],
        order: Sequence[int],
        kind: Kind,
        *,
        other: bool,
        lost: Sequence[int] = (),
    ) -> None:
        """Takes its division.

        Args:
            outputs: of each sub-model, "other" included, which is the first.
            order: classes as the sub-models list them.
            kind: see Decoupling.
            other: whether there is an output "other".
            lost: sub-models that never came back; the scores of their classes are minus infinity.
        """
        super().__init__()
        self.outputs, self.kind, self.other = tuple(outputs), kind, other
        self.lost = frozenset(lost)
        self.register_buffer("places", torch.tensor(tuple(order)).argsort(), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """(rows, sum of outputs) to (rows, classes)."""
        places = self.get_buffer("places")
        found: list[Tensor] = []
        for group, own in enumerate(torch.split(z, list(self.outputs), 1)):
            scores = own[:, 1:] if self.other else own
            if group in self.lost:
                scores = torch.full_like(scores, float("-inf"))
            elif self.kind == "probability":
                scores = scores - own.logsumexp(1, keepdim=True)
            elif self.kind == "margin":
                scores = scores - own[:, :1]
            found.append(scores)
        return torch.cat(found, 1).index_select(1, places)


class Branches(nn.Module):
    """Sub-models on the same samples, then the read-out. The outputs of lost ones are zeros."""

    def __init__(self, parts: Mapping[int, nn.Module], outputs: Sequence[int], read_out: ReadOut) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({str(g): parts[g] for g in sorted(parts)})
        self.outputs = tuple(outputs)
        self.read_out = read_out

    def forward(self, x: Tensor) -> Tensor:
        """The target's samples to (rows, classes)."""
        own = {int(g): branch(x) for g, branch in self.branches.items()}
        like = next(iter(own.values()))
        found = [
            own[g] if g in own else like.new_zeros(len(like), size) for g, size in enumerate(self.outputs)
        ]
        return self.read_out(torch.cat(found, 1))


class BlockLinear(nn.Module):
    """A linear layer with blocks on its diagonal: features are split, each part has its own weights."""

    def __init__(self, reads: Sequence[int], gives: Sequence[int], *, bias: bool, like: Tensor) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.blocks = nn.ModuleList(
            nn.Linear(a, b, bias=bias, device=like.device, dtype=like.dtype)
            for a, b in zip(reads, gives, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(rows, sum of reads) to (rows, sum of gives)."""
        parts = torch.split(x, list(self.reads), 1)
        return torch.cat([block(part) for block, part in zip(self.blocks, parts, strict=True)], 1)
