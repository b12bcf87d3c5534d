"""At which operations it depends on what is trained what they keep for backward, by two observed passes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from spanwise.core.model import Kept, Site, SiteKind
from spanwise.ops.arguments import Ref
from spanwise.ops.opgraph import Op, OpGraph
from spanwise.profiler.observe import Observation, Seen

_CONVOLUTIONS = frozenset({"aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default"})
_CLAMPS = frozenset({"aten.relu.default", "aten.relu6.default", "aten.hardtanh.default"})
_GROUPS = 6  # position of a convolution's number of groups


def sites_of(
    ops: OpGraph, few: Observation, more: Observation, bounds: Sequence[int]
) -> tuple[tuple[Site, ...], ...] | None:
    """Sites of every layer, whose operations lie between two neighbouring ``bounds``.

    None if the two passes keep different storages, so that bytes per row cannot be told.
    """
    if [users for _, users in few.saved] != [users for _, users in more.saved]:
        return None
    kept: dict[int, list[Kept]] = {}
    for number, ((a, users), (b, _)) in enumerate(zip(few.saved, more.saved, strict=True)):
        slope = max(0, (b - a) // (more.rows - few.rows))
        entry = Kept(storage=number, row_bytes=slope, fixed_bytes=max(0, a - slope * few.rows))
        for position in users:
            kept.setdefault(position, []).append(entry)
    return _Walk(ops, few, kept).layers(bounds)


class _Walk:
    """Goes through the operations in order; knows of every value the sites that it comes from."""

    def __init__(self, ops: OpGraph, seen: Observation, kept: dict[int, list[Kept]]) -> None:
        self.ops, self.seen, self.kept = ops, seen, kept
        self.origins: dict[Ref, frozenset[int]] = {}
        self.count = 0

    def layers(self, bounds: Sequence[int]) -> tuple[tuple[Site, ...], ...]:
        out: list[tuple[Site, ...]] = []
        for start, stop in pairwise(bounds):
            found = [self._visit(position) for position in range(start, stop)]
            out.append(tuple(site for site in found if site is not None))
        return tuple(out)

    def _visit(self, position: int) -> Site | None:
        node = self.ops.nodes[position]
        sources = frozenset[int]().union(*(self.origins.get(ref, frozenset()) for ref in node.references()))
        result = Ref("node", node.name)
        trains = [ref.name for ref in node.references() if ref.kind == "parameter"]
        if not trains and position not in self.kept and node.op not in _CLAMPS:
            self.origins[result] = sources
            return None
        self.origins[result] = frozenset({self.count})
        self.count += 1
        return self._site(position, node, tuple(sorted(sources)), trains)

    def _site(self, position: int, node: Op, sources: tuple[int, ...], trains: list[str]) -> Site:
        x = next((ref for ref in node.references() if ref.kind in ("node", "input")), None)
        into = self.seen.values[x] if x is not None else Seen()
        out = self.seen.values[Ref("node", node.name)]
        kind, channels = self._kind(node)
        # The input of a product or norm follows the rows; what follows it once, like a mean, does not.
        kept = sorted(self.kept.get(position, ()), key=lambda one: one.row_bytes == 0)
        weight, shift, others = "", "", tuple(trains)
        if kind not in ("other", "relu"):
            weight, shift, others = _trained(node, 1), _trained(node, 2), ()
        return Site(
            kind=kind, sources=sources, weight=weight, shift=shift, others=others, channels=channels,
            kept=tuple(kept), elements=_elements(out, self.seen.rows),
            input_bytes=_elements(into, self.seen.rows) * into.item_bytes,
            output_bytes=_elements(out, self.seen.rows) * out.item_bytes,
            item_bytes=max(out.item_bytes, 1),
        )  # fmt: skip

    def _kind(self, node: Op) -> tuple[SiteKind, int]:
        """What it is, and how many channels of its weight can be trained one by one."""
        if node.op in _CONVOLUTIONS:
            weight = node.args[1]
            if not isinstance(weight, Ref):
                return "other", 0
            shape = self.seen.values[weight].shape
            groups = node.args[_GROUPS] if len(node.args) > _GROUPS else 1
            if groups == 1:
                return "conv", shape[1]
            return ("depthwise", shape[0]) if groups == shape[0] and shape[1] == 1 else ("conv", 0)
        if node.op == "aten.linear.default" and isinstance(node.args[1], Ref):
            return "linear", self.seen.values[node.args[1]].shape[1]
        if node.op == "aten.batch_norm.default" and isinstance(node.args[3], Ref):
            return ("norm" if node.args[5] is True else "fixed_norm"), self.seen.values[node.args[3]].shape[0]
        return ("relu" if node.op in _CLAMPS else "other"), 0


def _trained(node: Op, place: int) -> str:
    """Name of the parameter at a place among the arguments; empty if there is none."""
    value = node.args[place] if place < len(node.args) else None
    return value.name if isinstance(value, Ref) and value.kind == "parameter" else ""


def _elements(seen: Seen, rows: int) -> int:
    count = 1
    for extent in seen.shape:
        count *= extent
    return count // rows if seen.is_tensor else 0
