"""Devices that nothing tells apart: a plan stays as good when two of a kind change places.

Searches look at how many of each kind they use, not at which, so that large clusters of few kinds stay cheap.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from spanwise.core.cluster import Cluster
from spanwise.core.profile import LinkTimes, Profile

Group = tuple[int, ...]  # device indices in file order
Kinds = tuple[int, ...]  # number of the kind of every device, in file order
Mix = tuple[tuple[int, int], ...]  # (kind, how many), kinds in rising order


def link_kinds(cluster: Cluster, measured: Sequence[LinkTimes] = ()) -> Kinds:
    """Alike are devices of one site with equal ports that no link and no measurement names."""
    named = {end for link in cluster.links for end in (link.source, link.target)}
    named |= {end for link in measured for end in (link.source, link.target)}
    return _numbered(
        d.id if d.id in named else (d.site, d.up_bytes_per_s, d.down_bytes_per_s) for d in cluster.devices
    )


def device_kinds(cluster: Cluster, profile: Profile, sources: Iterable[str]) -> Kinds:
    """Alike are devices with equal links, memory and times that hold no data of their own."""
    times = {entry.device: (entry.table, entry.factor, entry.alone) for entry in profile.devices}
    held = set(sources)
    links = link_kinds(cluster, profile.links)
    return _numbered(
        d.id if d.id in held else (link, d.memory_bytes, times.get(d.id))
        for d, link in zip(cluster.devices, links, strict=True)
    )


def mix_of(kinds: Kinds, group: Group) -> Mix:
    """How many of each kind."""
    counts: dict[int, int] = {}
    for device in group:
        counts[kinds[device]] = counts.get(kinds[device], 0) + 1
    return tuple(sorted(counts.items()))


def by_kind(kinds: Kinds, devices: Iterable[int]) -> list[Group]:
    """Devices of each kind, in the order in which they come."""
    found: dict[int, list[int]] = {}
    for device in devices:
        found.setdefault(kinds[device], []).append(device)
    return [tuple(members) for members in found.values()]


def _numbered(keys: Iterable[Hashable]) -> Kinds:
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)
