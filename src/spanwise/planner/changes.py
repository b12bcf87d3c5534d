"""Clusters with one thing more: memory, bandwidth, a device; the profile goes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

from spanwise.core.cluster import Cluster, Device, Link
from spanwise.core.profile import LinkTimes
from spanwise.planner.problem import Memo, Problem

GIB = 2**30
Kind = Literal["memory", "link", "device"]


@dataclass(frozen=True, slots=True)
class Change:
    """A change in words, what it is about, and the problem with it.

    ``target`` is a device id for memory and devices; ``resources`` are the capacities of a link or port.
    """

    text: str
    kind: Kind
    target: str
    resources: frozenset[str]
    problem: Problem


def more_memory(problem: Problem, device_id: str) -> Change:
    """One GiB more on a device."""
    cluster = _with_device(problem.cluster, device_id, lambda d: {"memory_bytes": d.memory_bytes + GIB})
    return Change(f"1 GiB more on {device_id}", "memory", device_id, frozenset(), _on(problem, cluster))


def second_device(problem: Problem, device_id: str) -> Change:
    """Another device that equals one: same site, ports, memory, layer times, links by name, measured links.

    It holds no data, and where no link is listed between the two they do not reach each other.
    """
    cluster, profile = problem.cluster, problem.profile
    old = cluster.device(device_id)
    taken = {*cluster.ids, *(d.site for d in cluster.devices)}
    new_id = next(name for n in range(2, len(taken) + 3) if (name := f"{device_id[:59]}-{n}") not in taken)
    new = old.model_copy(update={"id": new_id, "address": None})

    def twin(name: str) -> str:
        return new_id if name == device_id else name

    links = [
        link.model_copy(update={"source": twin(link.source), "target": twin(link.target)})
        for link in cluster.links
        if device_id in (link.source, link.target)
    ]
    times = [e.model_copy(update={"device": new_id}) for e in profile.devices if e.device == device_id]
    measured = [
        link.model_copy(update={"source": twin(link.source), "target": twin(link.target)})
        for link in profile.links
        if device_id in (link.source, link.target)
    ]
    wider = cluster.model_copy(update={"devices": (*cluster.devices, new), "links": (*cluster.links, *links)})
    known = profile.model_copy(
        update={"devices": (*profile.devices, *times), "links": (*profile.links, *measured)}
    )
    changed = replace(problem, cluster=wider, profile=known, memo=Memo())
    return Change(f"a second {device_id}", "device", device_id, frozenset(), changed)


def wider_links(problem: Problem) -> Iterator[Change]:
    """Twice the bandwidth of every link of the file, both ways at once, and of every port."""
    cluster = problem.cluster
    for pair in dict.fromkeys(frozenset((link.source, link.target)) for link in cluster.links):
        links = tuple(
            _doubled(link) if frozenset((link.source, link.target)) == pair else link
            for link in cluster.links
        )
        ends = sorted(pair)
        name = f"between {ends[0]} and {ends[1]}" if len(ends) == 2 else f"inside {ends[0]}"
        yield _wider(problem, f"twice the bandwidth {name}", cluster.model_copy(update={"links": links}))
    for device in cluster.devices:
        if device.up_bytes_per_s or device.down_bytes_per_s:
            wider = _with_device(cluster, device.id, _doubled_port)
            yield _wider(problem, f"twice the bandwidth of the port of {device.id}", wider)


def _wider(problem: Problem, text: str, cluster: Cluster) -> Change:
    """With the resources that it widened; what was measured over them grows as far as the others let it."""
    before, after = _capacities(problem.cluster), _capacities(cluster)
    grown = {name for pair, named in before.items() for name in named if after[pair][name] > named[name]}
    links: list[LinkTimes] = []
    for link in problem.profile.links:
        named = before.get((link.source, link.target), {})
        rate = link.bandwidth_bytes_per_s
        if grown & named.keys():
            others = min((r for name, r in named.items() if name not in grown), default=float("inf"))
            rate = max(rate, min(2 * rate, others))
        links.append(link.model_copy(update={"bandwidth_bytes_per_s": rate}))
    profile = problem.profile.model_copy(update={"links": tuple(links)})
    changed = replace(problem, cluster=cluster, profile=profile, memo=Memo())
    return Change(text, "link", "", frozenset(grown), changed)


def _capacities(cluster: Cluster) -> dict[tuple[str, str], dict[str, float]]:
    """The listed capacities on the way between every pair that is joined."""
    return {
        (a, b): dict(cluster.route(a, b).resources)
        for a, b in permutations(cluster.ids, 2)
        if cluster.connected(a, b)
    }


def _doubled(link: Link) -> Link:
    return link.model_copy(update={"bandwidth_bytes_per_s": 2 * link.bandwidth_bytes_per_s})


def _doubled_port(device: Device) -> dict[str, object]:
    ports = {"up_bytes_per_s": device.up_bytes_per_s, "down_bytes_per_s": device.down_bytes_per_s}
    return {name: 2 * rate for name, rate in ports.items() if rate}


def _with_device(cluster: Cluster, device_id: str, update: Callable[[Device], dict[str, object]]) -> Cluster:
    return cluster.model_copy(
        update={
            "devices": tuple(
                d.model_copy(update=update(d)) if d.id == device_id else d for d in cluster.devices
            )
        }
    )


def _on(problem: Problem, cluster: Cluster) -> Problem:
    return replace(problem, cluster=cluster, memo=Memo())
