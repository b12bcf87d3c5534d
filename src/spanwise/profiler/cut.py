"""Where the chain of operations can be cut, and which of these cuts make sensible layers."""

from __future__ import annotations

from dataclasses import dataclass

from spanwise.ops.arguments import Ref
from spanwise.ops.opgraph import OpGraph
from spanwise.profiler.observe import Observation

MAX_CUT_TENSORS = 3


@dataclass(frozen=True, slots=True)
class Cut:
    """A position before operation ``position`` and the names of what crosses it, in order of definition."""

    position: int
    tensors: tuple[str, ...]
    row_bytes: int


def clean_cuts(ops: OpGraph, few: Observation, more: Observation) -> tuple[Cut, ...]:
    """Every position at which only rows of a few tensors cross.

    Args:
        ops: the traced operations.
        few: a pass with some rows.
        more: a pass with more rows; a tensor can be taken apart by rows if its first dimension follows
            their number and no other does.

    Returns:
        Rising positions strictly inside the graph. Across each, what is alive (parameters, buffers, labels
        and recomputable values aside) is one to three tensors of rows, none is a raw input or shares its
        storage, and nothing is overwritten later that was made before.
    """
    nodes, flow = ops.nodes, ops.flow
    total = len(nodes)
    last_use = _last_uses(ops)
    blocked = _blocked(ops)
    live: dict[int, None] = {}
    cuts: list[Cut] = []
    for position in range(1, total):
        previous = position - 1
        if flow.free[previous]:
            continue
        live[previous] = None
        for at in [at for at in live if last_use.get(at, -1) < position]:
            del live[at]
        if blocked[position] or not 1 <= len(live) <= MAX_CUT_TENSORS:
            continue
        refs = [Ref("node", nodes[at].name) for at in live]
        if all(_is_rows(ref, few, more) for ref in refs):
            size = sum(_row_bytes(ref, more) for ref in refs)
            cuts.append(Cut(position, tuple(ref.name for ref in refs), size))
    return tuple(cuts)


def _last_uses(ops: OpGraph) -> dict[int, int]:
    """Position of the last node that reads each node; the end for the results."""
    found: dict[int, int] = {}
    for position, node in enumerate(ops.nodes):
        for ref in node.references():
            if ref.kind == "node":
                found[ops.positions[ref.name]] = position
    for ref in (ops.loss, *ops.outputs):
        if ref.kind == "node":
            found[ops.positions[ref.name]] = len(ops.nodes)
    return found


def _blocked(ops: OpGraph) -> list[bool]:
    """Positions that no cut may take, whatever lives there."""
    total = len(ops.nodes)
    blocked = [False] * (total + 1)

    def block(start: int, stop: int) -> None:
        for position in range(max(start, 0), min(stop, total + 1)):
            blocked[position] = True

    flow = ops.flow
    outside = {flow.groups.get(Ref("input", slot.name), -1) for slot in ops.inputs}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, node in enumerate(ops.nodes):
        if flow.free[position]:
            continue
        for ref in (*node.references(), Ref("node", node.name)):
            first.setdefault(flow.groups[ref], position)
            last[flow.groups[ref]] = position
        if any(ref.kind == "label" for ref in node.references()):
            block(position + 1, total)
        if any(flow.groups[ref] in outside for ref in node.references()):
            block(0, position + 1)
        if node.op.startswith("aten.as_strided"):
            block(first[flow.groups[Ref("node", node.name)]] + 1, position + 1)
    for group, writers in flow.writers.items():
        if group not in first:
            continue
        state = any(ref.kind == "buffer" for ref in flow.members[group])
        block(first[group] + 1, (last[group] if state else max(writers)) + 1)
    for ref in ops.outputs:
        if ref.kind in ("input", "label") or flow.groups.get(ref, -2) in outside:
            block(0, total)
    return blocked


def _is_rows(ref: Ref, few: Observation, more: Observation) -> bool:
    a, b = few.values[ref], more.values[ref]
    if not (a.is_tensor and b.is_tensor and a.shape and b.shape):
        return False
    return a.shape[0] == few.rows and b.shape[0] == more.rows and a.shape[1:] == b.shape[1:]


def _row_bytes(ref: Ref, seen: Observation) -> int:
    """Bytes of one row, and once more if a gradient comes back."""
    value = seen.values[ref]
    size = value.item_bytes
    for extent in value.shape[1:]:
        size *= extent
    return size * (2 if value.needs_gradient else 1)
