"""Layers whose forward runs again in backward, so that in between they keep only what enters them.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, 2016. The layers of a stage
are cut into parts; the second forward of a part and its backward are one step of autograd's, so that at most
one part's activations are alive. The second forward sees what the first one saw: the same random state, and
buffers as they were. It overwrites copies of these, so that running statistics count each row once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spanwise.ops.deferred import Deferred

Tensors = tuple[Tensor, ...]
Forward = Callable[[Tensors, Tensors, Deferred | None], Tensors]


def run_parts(parts: Sequence[Forward], inputs: Tensors, labels: Tensors, later: Deferred | None) -> Tensors:
    """Runs one part after the other; what leaves one enters the next."""
    for part in parts:
        inputs = part(inputs, labels, later)
    return inputs


@dataclass(frozen=True)
class Scratch:
    """A buffer that a part overwrites, and the copy that its second forward overwrites.

    ``reads``: whether results depend on its value, which then is kept from the first forward.
    """

    shared: Tensor
    own: Tensor
    reads: bool


@dataclass(frozen=True)
class Recomputed:
    """A part that keeps only what enters it.

    Attributes:
        first, again: its forward, and the same on the copies of ``scratch``.
        passed: for each result which input it is, None if it is computed.
        fixed: indices of results that have no gradient.
        draws: whether it draws random numbers. They come from the process's own generator: two devices on
            threads of one process would disturb each other.
        device: where it runs.
    """

    first: Forward
    again: Forward
    passed: tuple[int | None, ...]
    fixed: tuple[int, ...]
    scratch: tuple[Scratch, ...]
    draws: bool
    device: torch.device
    # Autograd goes back through a part only if an input asks for it, which raw rows do not.
    anchor: Tensor = field(default_factory=lambda: torch.zeros(0, requires_grad=True))

    def __call__(self, inputs: Tensors, labels: Tensors, later: Deferred | None) -> Tensors:
        """Runs it; see ``StageModule.forward``."""
        apply: Callable[..., Tensors] = _Again.apply  # pyright: ignore
        left = iter(apply(self, later, len(inputs), self.anchor, *inputs, *labels))
        return tuple(next(left) if at is None else inputs[at] for at in self.passed)

    def computed(self, results: Sequence[Any]) -> list[Any]:
        """Those results that are no inputs."""
        return [result for result, at in zip(results, self.passed, strict=True) if at is None]

    def state(self) -> tuple[Tensor | None, list[Tensor]]:
        """What a forward depends on besides what enters it: the random state, buffers."""
        return self._random_state() if self.draws else None, [
            s.shared.clone() for s in self.scratch if s.reads
        ]

    @contextmanager
    def as_of(self, state: tuple[Tensor | None, list[Tensor]]) -> Generator[None]:
        """Within it ``again`` runs as ``first`` ran at that state."""
        random, buffers = state
        kept = iter(buffers)
        with torch.no_grad():
            for copied in self.scratch:
                copied.own.copy_(next(kept) if copied.reads else copied.shared)
        if random is None:
            yield
            return
        now = self._random_state()
        self._set_random_state(random)
        try:
            yield
        finally:
            self._set_random_state(now)

    def _random_state(self) -> Tensor:
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()

    def _set_random_state(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)


class _Again(torch.autograd.Function):
    """A part as one operation: its backward runs it again, and that backward."""

    @staticmethod
    def forward(
        ctx: Any, part: Recomputed, later: Deferred | None, count: int, _: Tensor, *data: Tensor
    ) -> Tensors:
        ctx.set_materialize_grads(False)
        ctx.part, ctx.later, ctx.count, ctx.state = part, later, count, part.state()
        ctx.save_for_backward(*data)
        results = part.first(data[:count], data[count:], None)
        ctx.mark_non_differentiable(*(results[at] for at in part.fixed if part.passed[at] is None))
        return tuple(part.computed(results))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        part, data = ctx.part, ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        inputs = tuple(t.detach().requires_grad_(w) for t, w in zip(data[: ctx.count], wanted, strict=False))
        with torch.enable_grad(), part.as_of(ctx.state):
            results = part.computed(part.again(inputs, data[ctx.count :], ctx.later))
        pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None and r.requires_grad]
        if pairs:
            torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])
        return (None, None, None, None, *(t.grad for t in inputs), *(None for _ in data[ctx.count :]))
