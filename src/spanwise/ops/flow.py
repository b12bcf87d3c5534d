"""Who reads, overwrites and shares storage: what a cut must not separate, what can be recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from spanwise.ops.arguments import Argument, Ref, references
from spanwise.ops.opgraph import Op, OpGraph
from spanwise.ops.resolve import OPERATORS, resolve, schema

# Composite operations without declared aliases that always compute a new tensor. Other composites may hand
# back their argument (dropout with p = 0 does), so they count as sharing its storage.
_COMPUTING = frozenset({
    "aten.linear.default", "aten.matmul.default", "aten.conv1d.default", "aten.conv2d.default",
    "aten.conv3d.default", "aten.conv2d.padding", "aten.conv1d.padding", "aten.conv_transpose2d.input",
    "aten.batch_norm.default", "aten.layer_norm.default", "aten.group_norm.default",
    "aten.instance_norm.default",
    "aten.cross_entropy_loss.default", "aten.nll_loss.default", "aten.nll_loss_nd.default",
    "aten.scaled_dot_product_attention.default", "aten.einsum.default", "aten.embedding.default",
    "aten.max_pool2d.default", "aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default",
    "aten.softmax.int", "aten.log_softmax.int", "aten.relu6.default", "aten.rms_norm.default",
    "aten.mse_loss.default", "aten.l1_loss.default", "aten.selu.default", "aten.diff.default",
    "aten.sym_size.int",
})  # fmt: skip

# Operations that overwrite arguments without declaring it: (operation, training flag, overwritten arguments).
_HIDDEN_WRITES = {
    "aten.batch_norm.default": (5, (3, 4)),
    "aten.instance_norm.default": (5, (3, 4)),
    "aten.native_batch_norm.default": (5, (3, 4)),
}


def is_random(op: str) -> bool:
    """Whether two runs differ: such an operation is never recomputed."""
    return op not in OPERATORS and torch.Tag.nondeterministic_seeded in resolve(op).tags  # pyright: ignore


def written(node: Op) -> tuple[Ref, ...]:
    """Values whose storage a node overwrites."""
    if node.op in _HIDDEN_WRITES:
        flag, places = _HIDDEN_WRITES[node.op]
        if node.args[flag] is True:
            return tuple(ref for place in places for ref in references(node.args[place]))
        return ()
    declared = schema(node.op)
    if declared is None:
        return ()
    found: list[Ref] = []
    for index, argument in enumerate(declared.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.extend(references(_passed(node, index, argument.name)))
    return tuple(found)


def shares_with(node: Op) -> tuple[Ref, ...]:
    """Values whose storage the result of a node may be part of; too many rather than too few."""
    if node.op == "operator.getitem":
        return tuple(references(node.args[0]))
    declared = schema(node.op)
    if declared is None:
        return ()
    found: list[Ref] = []
    for index, argument in enumerate(declared.arguments):
        if argument.alias_info is not None:
            found.extend(references(_passed(node, index, argument.name)))
    key = torch._C.DispatchKey.CompositeImplicitAutograd  # pyright: ignore
    if not found and node.op not in _COMPUTING and resolve(node.op).has_kernel_for_dispatch_key(key):  # pyright: ignore
        found.extend(ref for ref in node.references() if ref.kind in ("node", "input", "label"))
    return tuple(found)


def is_view(op: str) -> bool:
    """Whether an operation only looks at its argument's storage in another way."""
    if op == "operator.getitem":
        return True
    declared = schema(op)
    if declared is None:
        return False
    infos = [r.alias_info for r in declared.returns]
    return any(info is not None and not info.is_write for info in infos)


def _passed(node: Op, index: int, name: str) -> Argument:
    if index < len(node.args):
        return node.args[index]
    return dict(node.kwargs).get(name)


@dataclass(frozen=True)
class Flow:
    """Data flow of a graph, storage included.

    A node is *free* if it depends on nothing that flows from layer to layer: only on sizes, constants,
    parameters, and buffers that nobody overwrites, and is not random. Every stage recomputes the free
    nodes it needs; a parameter that enters so is tied between these stages.
    """

    ops: OpGraph

    @cached_property
    def groups(self) -> dict[Ref, int]:
        """A number for each value; values with the same number may share storage."""
        parent: dict[Ref, Ref] = {}

        def find(ref: Ref) -> Ref:
            while parent.setdefault(ref, ref) != ref:
                parent[ref] = parent[parent[ref]]
                ref = parent[ref]
            return ref

        for node in self.ops.nodes:
            for ref in node.references():
                find(ref)
            mine = find(Ref("node", node.name))
            for ref in shares_with(node):
                if ref.kind != "batch":
                    parent[find(ref)] = mine
        numbers: dict[Ref, int] = {}
        return {ref: numbers.setdefault(find(ref), len(numbers)) for ref in list(parent)}

    @cached_property
    def writers(self) -> dict[int, tuple[int, ...]]:
        """Positions of the nodes that overwrite each storage group, rising."""
        found: dict[int, dict[int, None]] = {}
        for position, node in enumerate(self.ops.nodes):
            for ref in written(node):
                found.setdefault(self.groups[ref], {})[position] = None
        return {group: tuple(positions) for group, positions in found.items()}

    @cached_property
    def members(self) -> dict[int, tuple[Ref, ...]]:
        """The values of each storage group."""
        found: dict[int, list[Ref]] = {}
        for ref, group in self.groups.items():
            found.setdefault(group, []).append(ref)
        return {group: tuple(refs) for group, refs in found.items()}

    @cached_property
    def needs(self) -> tuple[tuple[int, ...], ...]:
        """For each node the nodes that must have run before it: arguments, and what overwrote them."""
        positions = self.ops.positions
        out: list[tuple[int, ...]] = []
        for position, node in enumerate(self.ops.nodes):
            found: dict[int, None] = {}
            for ref in node.references():
                if ref.kind == "node":
                    found[positions[ref.name]] = None
                for writer in self.writers.get(self.groups[ref], ()):
                    if writer < position:
                        found[writer] = None
            out.append(tuple(found))
        return tuple(out)

    @cached_property
    def free(self) -> tuple[bool, ...]:
        """Whether each node can be recomputed wherever it is needed."""
        fixed = {group for group, refs in self.members.items()
                 if group in self.writers and any(r.kind != "node" for r in refs)}  # fmt: skip
        while True:
            free = self._free(fixed)
            more = {g for g, at in self.writers.items() if g not in fixed and not all(free[i] for i in at)}
            if not more:
                return tuple(free)
            fixed |= more

    def _free(self, fixed: set[int]) -> list[bool]:
        free: list[bool] = []
        for position, node in enumerate(self.ops.nodes):
            outside = any(ref.kind in ("input", "label") for ref in node.references())
            groups = [self.groups[ref] for ref in (*node.references(), Ref("node", node.name))]
            free.append(
                not outside
                and not is_random(node.op)
                and not any(group in fixed for group in groups)
                and all(free[need] for need in self.needs[position])
            )
        return free

    def recomputed(self, users: list[int], results: tuple[Ref, ...] = ()) -> list[int]:
        """Free nodes that these nodes and results need, in order."""
        positions = self.ops.positions
        open_ = [need for user in users for need in self.needs[user] if self.free[need]]
        for ref in results:
            if ref.kind == "node" and self.free[positions[ref.name]]:
                open_.append(positions[ref.name])
                open_.extend(w for w in self.writers.get(self.groups[ref], ()) if self.free[w])
        found: set[int] = set()
        while open_:
            position = open_.pop()
            if position not in found:
                found.add(position)
                open_.extend(self.needs[position])
        return sorted(found)

    def stage(self, start: int, stop: int) -> list[int]:
        """Positions of all nodes that a stage over operations ``[start, stop)`` runs, in order."""
        own = [i for i in range(start, stop) if not self.free[i]]
        last = stop == len(self.ops.nodes)
        results = (self.ops.loss, *self.ops.outputs) if last else ()
        return sorted({*own, *self.recomputed(own, results)})
