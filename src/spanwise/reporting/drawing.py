"""The cluster as a drawing: sites as boxes, devices as cards inside, links between them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from spanwise.core.cluster import Cluster, Device, Link
from spanwise.core.plan import Plan
from spanwise.core.units import format_bytes, format_rate, format_seconds
from spanwise.reporting.markup import Markup, el, fit, join, line, svg, text

WIDTH = 1160.0
_CARD_HEIGHT, _GAP, _PAD, _HEAD = 104.0, 12.0, 14.0, 34.0
_LINK_GAP, _SITE_GAP, _TRACK = 112.0, 28.0, 26.0
_MOST_COLUMNS, _CARD_LEAST, _CARD_MOST = 6, 150.0, 226.0
_TIERS = ("end", "edge", "cloud")  # left to right, as data flows
_ICONS = {
    "cloud": "M5 15h11a3.5 3.5 0 0 0 .4-7A5.5 5.5 0 0 0 6 7.2 4 4 0 0 0 5 15z",
    "edge": "M3 3h14v5H3zM3 11h14v5H3zM6 5.5h.1M6 13.5h.1",
    "end": "M5 5h10v10H5zM8 2v3M12 2v3M8 15v3M12 15v3M2 8h3M2 12h3M15 8h3M15 12h3",
}


@dataclass(frozen=True, slots=True)
class _Site:
    """A box: name, devices, columns of cards, and where it stands."""

    name: str
    devices: tuple[Device, ...]
    columns: int
    x: float
    width: float
    card: float

    @property
    def rows(self) -> int:
        return -(-len(self.devices) // self.columns)


@dataclass(frozen=True, slots=True)
class _Wire:
    """Both directions of a link; ``back`` is None for one way only."""

    forth: Link
    back: Link | None

    @property
    def ends(self) -> tuple[str, str]:
        return self.forth.source, self.forth.target


def cluster_drawing(cluster: Cluster, plan: Plan | None) -> Markup:
    """The whole drawing. Cards carry the colour of the stages that the plan puts on them."""
    wires = _wires(cluster.links)
    sites = _place(cluster, wires)
    height_of_box = _HEAD + max(s.rows for s in sites) * (_CARD_HEIGHT + _GAP) - _GAP + _PAD
    switches = {w.forth.source: w.forth for w in wires if w.forth.source == w.forth.target}
    boxes = [_box(site, height_of_box, switches.get(site.name), cluster, plan) for site in sites]
    straight, tracks = _sorted_wires(wires, sites)
    lines = [_straight(w, sites, height_of_box) for w in straight]
    bus = _bus(tracks, sites, cluster, height_of_box)
    height = height_of_box + (10 + _TRACK * len(tracks) + 8 if tracks else 0) + 2
    width = max(WIDTH, sites[-1].x + sites[-1].width + 1)
    label = f"Cluster {cluster.name}: {len(cluster.devices)} devices in {len(sites)} sites"
    return svg(width, height, *boxes, *lines, bus, label=label)


def _wires(links: tuple[Link, ...]) -> list[_Wire]:
    by_ends = {(link.source, link.target): link for link in links}
    out: list[_Wire] = []
    seen: set[tuple[str, str]] = set()
    for (a, b), link in by_ends.items():
        if (b, a) not in seen:
            seen.add((a, b))
            out.append(_Wire(link, by_ends.get((b, a)) if a != b else None))
    return out


def _place(cluster: Cluster, wires: list[_Wire]) -> list[_Site]:
    """Sites from left to right by their lowest tier; wide sites get more columns of cards."""
    groups: dict[str, list[Device]] = {}
    for device in cluster.devices:
        groups.setdefault(device.site, []).append(device)
    names = sorted(groups, key=lambda n: min(_TIERS.index(d.tier) for d in groups[n]))
    columns = _columns({name: len(groups[name]) for name in names})
    pairs = {frozenset(w.ends) for w in wires}
    neighbours = pairwise(names)
    gaps = [_LINK_GAP if frozenset(pair) in pairs else _SITE_GAP for pair in neighbours]
    total = sum(columns.values())
    inside = WIDTH - 2 - sum(gaps) - len(names) * 2 * _PAD - (total - len(names)) * _GAP
    card = min(_CARD_MOST, max(_CARD_LEAST, inside / total))
    spare = max(0.0, inside - total * card) / max(1, len(gaps))
    gaps = [gap + min(spare, _LINK_GAP) for gap in gaps]
    sites: list[_Site] = []
    x = 1.0
    for name, gap in zip(names, [*gaps, 0.0], strict=True):
        width = 2 * _PAD + columns[name] * (card + _GAP) - _GAP
        devices = sorted(groups[name], key=lambda d: (_TIERS.index(d.tier), -d.speed))
        sites.append(_Site(name, tuple(devices), columns[name], x, width, card))
        x += width + gap
    return sites


def _columns(sizes: dict[str, int]) -> dict[str, int]:
    """Columns of cards per site, for the fewest rows at which all sites fit side by side."""
    for rows in range(1, max(sizes.values()) + 1):
        columns = {name: -(-count // rows) for name, count in sizes.items()}
        if sum(columns.values()) <= _MOST_COLUMNS:
            return columns
    return dict.fromkeys(sizes, 1)


def _box(site: _Site, height: float, switch: Link | None, cluster: Cluster, plan: Plan | None) -> Markup:
    name = fit(site.name, site.width * 0.5, 13)
    parts = [
        el("rect", x=site.x, y=1, width=site.width, height=height - 1, rx=8, class_="site"),
        text(site.x + _PAD, 22, name, class_="site-name"),
    ]
    if switch is not None:
        words = f"{format_rate(switch.bandwidth_bytes_per_s)} · {format_seconds(switch.latency_s)}"
        room = site.width - 2 * _PAD - 10 - 8 * len(name)
        parts.append(
            text(site.x + site.width - _PAD, 22, fit(words, room, 11), class_="link-text", text_anchor="end")
        )
    holders = {share.device for share in cluster.data_shares}
    for index, device in enumerate(site.devices):
        x = site.x + _PAD + index % site.columns * (site.card + _GAP)
        y = _HEAD + index // site.columns * (_CARD_HEIGHT + _GAP)
        parts.append(_card(device, x, y, site.card, holds_data=device.id in holders, plan=plan))
    return join(*parts)


def _card(device: Device, x: float, y: float, width: float, *, holds_data: bool, plan: Plan | None) -> Markup:
    stages = [(i, r.rows) for i, s in enumerate(plan.stages if plan else ()) for r in s.replicas
              if r.device == device.id]  # fmt: skip
    used = bool(stages) or plan is None
    room = width - 30
    threads = f"{device.threads} threads" if device.threads > 1 else "1 thread"
    memory = format_bytes(device.memory_bytes)
    size = [memory] + ([threads] if device.threads > 1 else [])
    if device.torch_device != "cpu":
        size.append(device.torch_device)
    facts = f"{device.tier} · speed {device.speed:.3g}"
    parts: list[Markup | None] = [
        el("title", f"{device.id}: {device.tier}, site {device.site}, speed {device.speed:g}, {threads}, "
           f"{device.torch_device}, {memory}"),
        el("rect", x=x, y=y, width=width, height=_CARD_HEIGHT, rx=6, class_="card" if used else "card idle"),
        _stripes(x, y, [i for i, _ in stages]),
        _icon(device.tier, x + width - 30, y + 10),
        text(x + 18, y + 24, fit(device.id, room - 26, 14), class_="device-name"),
        text(x + 18, y + 43, fit(facts, room - (34 if holds_data else 0), 11.5), class_="fact"),
        text(x + 18, y + 60, fit(" · ".join(size), room, 11.5), class_="fact"),
    ]  # fmt: skip
    label = _work(stages, plan)
    parts.append(
        _pill(x + 18, y + 74, label, stages[0][0]) if stages else text(x + 18, y + 89, label, class_="faint")
    )
    if holds_data:
        parts.append(text(x + width - 12, y + 43, "data", class_="badge", text_anchor="end"))
    return el("g", *parts)


def _icon(tier: str, x: float, y: float) -> Markup:
    return el("path", d=_ICONS[tier], transform=f"translate({x:.1f} {y:.1f})", class_="icon")


def _work(stages: list[tuple[int, int]], plan: Plan | None) -> str:
    if not stages:
        return "not used" if plan is not None else ""
    if len(stages) == 1:
        index, rows = stages[0]
        return f"stage {index} · {rows} row{'s' if rows > 1 else ''}"
    return "stages " + ", ".join(str(index) for index, _ in stages)


def _stripes(x: float, y: float, stages: list[int]) -> Markup | None:
    """A coloured edge, shared by the stages of the device."""
    if not stages:
        return None
    part = (_CARD_HEIGHT - 16) / len(stages)
    return join(
        *(
            el("rect", x=x + 7, y=y + 8 + n * part, width=4, height=part - 1, rx=1.5, class_=f"s{stage % 8}")
            for n, stage in enumerate(stages)
        )
    )


def _pill(x: float, y: float, label: str, stage: int) -> Markup:
    width = 6.3 * len(label) + 14
    return join(
        el("rect", x=x, y=y, width=width, height=20, rx=10, class_=f"pill s{stage % 8}"),
        text(x + width / 2, y + 14, label, class_="pill-text", text_anchor="middle"),
    )


def _sorted_wires(wires: list[_Wire], sites: list[_Site]) -> tuple[list[_Wire], list[_Wire]]:
    """Links of neighbouring sites are drawn between the boxes, all others below them."""
    order = {site.name: index for index, site in enumerate(sites)}
    straight: list[_Wire] = []
    tracks: list[_Wire] = []
    for wire in wires:
        a, b = wire.ends
        if a == b:
            continue
        neighbours = a in order and b in order and abs(order[a] - order[b]) == 1
        (straight if neighbours else tracks).append(wire)
    return straight, tracks


def _straight(wire: _Wire, sites: list[_Site], height: float) -> Markup:
    left, right = sorted((s for s in sites if s.name in wire.ends), key=lambda s: s.x)
    x1, x2, y = left.x + left.width, right.x, height / 2
    above, below = _words(wire, left.name)
    middle = (x1 + x2) / 2
    return join(
        line(x1, y, x2, y, "wire"),
        el("circle", cx=x1, cy=y, r=4, class_="plug"),
        el("circle", cx=x2, cy=y, r=4, class_="plug"),
        *(text(middle, y - 10 - 16 * (len(above) - 1 - n), t, class_="link-text strong", text_anchor="middle")
          for n, t in enumerate(above)),
        text(middle, y + 20, below, class_="link-text", text_anchor="middle"),
    )  # fmt: skip


def _words(wire: _Wire, left: str) -> tuple[list[str], str]:
    """Bandwidths (one line if both ways are equal, else one per way, from the left end) and latency."""
    forth, back = wire.forth, wire.back
    latency = format_seconds(forth.latency_s)
    if back is not None and back.latency_s != forth.latency_s:
        latency += f" / {format_seconds(back.latency_s)}"
    if back is not None and back.bandwidth_bytes_per_s == forth.bandwidth_bytes_per_s:
        return [format_rate(forth.bandwidth_bytes_per_s)], latency
    ways = [link for link in (forth, back) if link is not None]
    arrows = [
        f"{'→' if link.source == left else '←'} {format_rate(link.bandwidth_bytes_per_s)}" for link in ways
    ]
    return arrows, latency


def _bus(wires: list[_Wire], sites: list[_Site], cluster: Cluster, top: float) -> Markup:
    """Links below the boxes: each a track of its own with a drop from either end's site."""
    box_of = {site.name: site for site in sites}
    box_of |= {device.id: box_of[device.site] for device in cluster.devices}
    drops = dict.fromkeys((site.name for site in sites), 0)
    parts: list[Markup] = []
    labels: list[Markup] = []  # over all lines, as drops of other links may cross them
    for index, wire in enumerate(wires):
        y = top + 10 + _TRACK * (index + 1)
        xs: list[float] = []
        for end in wire.ends:
            site = box_of[end]
            drops[site.name] += 1
            xs.append(site.x + min(site.width - 10, _PAD + 16.0 * drops[site.name]))
        parts += [line(x, top, x, y, "wire") for x in xs]
        parts.append(line(min(xs), y, max(xs), y, "wire"))
        parts += [el("circle", cx=x, cy=top, r=3.5, class_="plug") for x in xs]
        rates, latency = _words(wire, wire.forth.source)
        label = f"{wire.ends[0]} – {wire.ends[1]}: {', '.join(rates)} · {latency}"
        labels.append(text(min(xs) + 10, y - 5, label, class_="link-text on-line"))
    return join(*parts, *labels)
