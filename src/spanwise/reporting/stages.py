"""The stage map: layers in proportion to their work, what crosses each cut, and who computes which stage."""

from __future__ import annotations

from itertools import pairwise

from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile
from spanwise.core.units import format_bytes
from spanwise.reporting.markup import Markup, el, fit, join, line, svg, text, text_width
from spanwise.reporting.text import layer_names, layer_range, recompute_text

WIDTH = 1160.0
_STRIP, _CUTS, _LINK, _LEAST_CARD, _GAP = 40.0, 58.0, 34.0, 170.0, 26.0
_MOST_LINES = 6


def stage_map(graph: ModelGraph, plan: Plan | None, profile: Profile | None) -> Markup:
    """Layers along x; below them one card per stage. Without a plan only the layers."""
    weights, meaning = layer_weights(graph, plan, profile)
    edges = _edges(weights)
    owner = [i for i, s in enumerate(plan.stages if plan else ()) for _ in range(s.start, s.stop)]
    parts = [
        text(0, 12, f"{len(graph)} layers of {graph.name}; width: {meaning}", class_="axis-title"),
        _strip(graph, edges, owner, weights, 20),
        _cut_curve(graph, edges, plan, 20 + _STRIP + 8),
    ]
    height, width = 20 + _STRIP + 8 + _CUTS + 22, WIDTH
    if plan is not None:
        cards, below, width = _cards(graph, plan, edges, weights, height)
        parts.append(cards)
        height = below
    return svg(width, height, *parts, label=f"Layers of {graph.name} and the stages they belong to")


def layer_weights(
    graph: ModelGraph, plan: Plan | None, profile: Profile | None
) -> tuple[tuple[float, ...], str]:
    """Work of each layer as a fraction of the whole, and what it was measured by."""
    if profile is not None and all(len(t.layers) == len(graph) for t in profile.tables[:1]):
        table = profile.tables[0]
        rows = plan.micro_batch_rows if plan is not None else table.rows[-1]
        times = [table.forward(i, rows) + table.backward(i, rows) for i in range(len(graph))]
        meaning = f"forward and backward time of {rows} rows, {table.provenance}"
    else:
        times = [layer.forward_flops + layer.backward_flops for layer in graph.layers]
        meaning = "forward and backward FLOPs"
    total = sum(times)
    if total <= 0:
        return tuple(1 / len(times) for _ in times), "equal (no layer has a known cost)"
    return tuple(t / total for t in times), meaning


def _edges(weights: tuple[float, ...]) -> list[float]:
    """X of every cut; the smallest layers still get a pixel."""
    least = min(1.0, 0.5 * WIDTH / len(weights))
    widths = [max(least, w * WIDTH) for w in weights]
    scale = WIDTH / sum(widths)
    edges = [0.0]
    for width in widths:
        edges.append(edges[-1] + width * scale)
    return edges


def _strip(
    graph: ModelGraph, edges: list[float], owner: list[int], weights: tuple[float, ...], y: float
) -> Markup:
    parts: list[Markup | None] = []
    widths = [right - left for left, right in pairwise(edges)]
    named = all(text_width(x.name, 11) <= w - 6 for x, w in zip(graph.layers, widths, strict=True))
    for index, layer in enumerate(graph.layers):
        x, width = edges[index], widths[index]
        style = f"s{owner[index] % 8}" if owner else "plain"
        title = (
            f"layer {index}: {layer.name}\n{weights[index]:.1%} of the work\n"
            f"{format_bytes(layer.parameter_bytes)} of weights\n"
            f"cut behind it: {format_bytes(layer.cut_bytes)} a row"
        )
        parts.append(
            el("rect", el("title", title), x=x, y=y, width=width, height=_STRIP, class_=f"layer {style}")
        )
        name = layer.name if named else str(index)
        if text_width(name, 11) <= width - 6:
            parts.append(
                text(x + width / 2, y + _STRIP / 2 + 4, name, class_="layer-name", text_anchor="middle")
            )
    return join(*parts)


_LABEL_WIDTH = 92.0  # of "24.0 KiB a row"


def _cut_curve(graph: ModelGraph, edges: list[float], plan: Plan | None, y: float) -> Markup:
    """Bytes of one row that would cross each possible cut; the cuts taken stand out."""
    cuts = [layer.cut_bytes for layer in graph.layers[:-1]]
    if not cuts or max(cuts) == 0:
        return join()
    tallest, base = float(max(cuts)), y + _CUTS
    taken = {stage.stop - 1: index for index, stage in enumerate(plan.stages[:-1] if plan else ())}
    parts = [line(0, base, WIDTH, base, "rule")]
    free, level = 0.0, 0
    for index, cut in enumerate(cuts):
        x, top = edges[index + 1], base - max(1.0, (_CUTS - 14) * cut / tallest)
        title = el(
            "title", f"cut behind layer {index} ({graph.layers[index].name}): {format_bytes(cut)} a row"
        )
        width = 5 if index in taken else 3
        style = "cut taken" if index in taken else "cut"
        parts.append(el("rect", title, x=x - width / 2, y=top, width=width, height=base - top, class_=style))
        if index in taken:
            # Labels stand clear of the bars; one that would touch its neighbour goes a line up.
            end = x > WIDTH - 120
            left = x - 6 - _LABEL_WIDTH if end else x + 6
            level = level + 1 if left < free else 0
            free = left + _LABEL_WIDTH
            place = max(y + 10, base - 16 - 13 * level)
            parts.append(text(x + (-6 if end else 6), place, f"{format_bytes(cut)} a row",
                              class_="cut-label", text_anchor="end" if end else "start"))  # fmt: skip
    what = f"bytes of a row that would cross each cut, up to {format_bytes(tallest)}"
    parts.append(text(0, base + 16, what, class_="axis-title"))
    return join(*parts)


def _cards(
    graph: ModelGraph, plan: Plan, edges: list[float], weights: tuple[float, ...], y: float
) -> tuple[Markup, float, float]:
    """One card per stage, side by side, joined to its layers by a band of its colour."""
    count = len(plan.stages)
    card = max(_LEAST_CARD, (WIDTH - _GAP * (count - 1)) / count)
    lines = min(_MOST_LINES + 1, max(len(stage.replicas) for stage in plan.stages))
    height = 104.0 + 18 * lines
    parts: list[Markup] = []
    for index, stage in enumerate(plan.stages):
        x = index * (card + _GAP)
        left, right = edges[stage.start], edges[stage.stop]
        top = 20 + _STRIP
        points = (
            f"{left:.1f},{top} {right:.1f},{top} {right:.1f},{y - 4} "
            f"{x + card:.1f},{y + _LINK} {x:.1f},{y + _LINK} {left:.1f},{y - 4}"
        )
        parts.insert(0, el("polygon", points=points, class_=f"band s{index % 8}"))
        share = sum(weights[stage.start : stage.stop])
        parts.append(_card(graph, plan, index, share, (x, y + _LINK, card, height)))
    for index in range(count - 1):
        x = (index + 1) * (card + _GAP) - _GAP
        middle = y + _LINK + 22
        parts.append(el("path", d=f"M{x + 6:.1f} {middle - 5}l7 5l-7 5", class_="arrow"))
    return join(*parts), y + _LINK + height + 2, max(WIDTH, count * (card + _GAP) - _GAP)


def _card(
    graph: ModelGraph, plan: Plan, index: int, share: float, box: tuple[float, float, float, float]
) -> Markup:
    stage = plan.stages[index]
    x, y, width, height = box
    room, state = width - 24, sum(p.bytes for p in graph.parameters_of(stage.start, stage.stop))
    depth = "gpipe" if plan.schedule == "gpipe" else f"warm-up {min(stage.warmup, plan.micro_batches)}"
    layers = f"layers {layer_range(stage.start, stage.stop)} · {share:.0%} of work"
    weights = " · ".join(filter(None, (f"{format_bytes(state)} of weights", recompute_text(stage))))
    parts: list[Markup] = [
        el("rect", x=x, y=y, width=width, height=height, rx=6, class_="card"),
        el("rect", x=x, y=y, width=width, height=5, rx=2, class_=f"s{index % 8}"),
        text(x + 12, y + 27, f"Stage {index}", class_="device-name"),
        text(x + width - 12, y + 27, depth, class_="fact", text_anchor="end"),
        text(x + 12, y + 46, fit(layers, room, 11.5), class_="fact"),
        text(x + 12, y + 63, fit(weights, room, 11.5), class_="fact"),
        text(x + 12, y + 80, fit(layer_names(graph, stage), room, 11.5), class_="faint"),
    ]
    parts += _replicas(plan, index, x + 12, y + 101, room)
    return el("g", el("title", _transfer(graph, plan, index)), *parts)


def _replicas(plan: Plan, index: int, x: float, y: float, room: float) -> list[Markup]:
    """A line per device of a stage: its name, its rows as a bar and as a number."""
    replicas = plan.stages[index].replicas
    shown, rest = replicas[:_MOST_LINES], replicas[_MOST_LINES:]
    names = min(110.0, max(text_width(r.device) for r in shown)) + 8
    full = room - names - 52
    parts: list[Markup] = []
    for number, replica in enumerate(shown):
        at, count = y + 18 * number, replica.rows
        parts.append(text(x, at, fit(replica.device, names - 4), class_="replica"))
        if full > 16:
            length = max(2.0, full * count / plan.micro_batch_rows)
            parts.append(
                el("rect", x=x + names, y=at - 9, width=length, height=9, rx=2, class_=f"s{index % 8}")
            )
        words = f"{count} row{'s' if count > 1 else ''}"
        parts.append(text(x + room, at, words, class_="fact", text_anchor="end"))
    if rest:
        more = text(x, y + 18 * len(shown), f"and {len(rest)} more", class_="faint")
        parts.append(el("g", el("title", ", ".join(f"{r.device} x {r.rows}" for r in rest)), more))
    return parts


def _transfer(graph: ModelGraph, plan: Plan, index: int) -> str:
    if index + 1 == len(plan.stages):
        return f"stage {index} ends in the loss"
    cut = graph.layers[plan.stages[index].stop - 1].cut_bytes
    whole = format_bytes(cut * plan.micro_batch_rows)
    return f"stage {index} sends {format_bytes(cut)} a row, {whole} a micro-batch"
