"""Where everything of a lab goes: names, addresses, shares of the cores, and which way each pair takes.

Decisions only, nothing is touched here, so a cluster that cannot be a lab is refused before anything exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spanwise.core.cluster import Cluster, Device, Route
from spanwise.core.errors import InputError

PREFIX = "spanwise-"  # of every namespace and control group
MOST_DEVICES = 250
MOST_LOAD = 0.95  # of the machine's cores: the rest relays packets and coordinates
INTERFACE_LETTERS = 15  # IFNAMSIZ of Linux, less the final zero
DIRECT_LATENCY_S = 0.5e-3  # up to here a site's devices talk over its bridge, which has no delay of its own
_LEAST_QUOTA_S = 1e-3  # the kernel's own floor for a CFS quota
# Shares come out within 4 %. At 5 ms they are within 9 %, at 20 ms within 3 %, but what an idle device gets
# for nothing is twice as much.
_PERIOD_S = 10e-3
_LONGEST_PERIOD_S = 1.0  # the kernel's own ceiling
_RESERVED = ("lo", "br0", "tun0", "eth0", "ctl0")


@dataclass(frozen=True, slots=True)
class Share:
    """CPU time that a device gets: ``quota_s`` seconds in every ``period_s``.

    Where devices want a core at the same moment they get it in proportion too: one that came too short in a
    period cannot make up for it in the next.
    """

    quota_s: float
    period_s: float

    @property
    def cores(self) -> float:
        """Its part of one core."""
        return self.quota_s / self.period_s

    @staticmethod
    def of(cores: float) -> Share:
        """The shortest period of at least 10 ms whose quota the kernel accepts."""
        period_s = min(max(_PERIOD_S, math.ceil(_LEAST_QUOTA_S / cores * 1e4) / 1e4), _LONGEST_PERIOD_S)
        return Share(max(cores * period_s, _LEAST_QUOTA_S), period_s)


@dataclass(frozen=True, slots=True)
class Way:
    """How packets of one ordered pair travel through the relay: metered by each resource, then delayed."""

    source: str
    target: str
    resources: tuple[tuple[str, float], ...]
    latency_s: float


@dataclass(frozen=True)
class Layout:
    """One lab on paper.

    Attributes:
        lab: id of the lab, part of every name.
        cluster: what it is made of.
        sites: sites in file order; the k-th has the data network 10.200.k.0/24 and a router at .1.
    """

    lab: str
    cluster: Cluster
    sites: tuple[str, ...]

    @staticmethod
    def of(lab: str, cluster: Cluster, cores: int) -> Layout:
        """Checks that the cluster can be a lab on a machine with so many cores.

        Raises:
            InputError: a name does not fit an interface, there are too many devices, or their compute
                adds up to more than 95 % of the cores.
        """
        layout = Layout(lab, cluster, tuple(dict.fromkeys(d.site for d in cluster.devices)))
        layout._check_names()
        layout._check_load(cores)
        return layout

    def _check_names(self) -> None:
        for device in self.cluster.devices:
            if len(device.id) > INTERFACE_LETTERS:
                raise InputError(
                    f"cluster '{self.cluster.name}': device '{device.id}' has {len(device.id)} letters; "
                    f"a lab names an interface after it and Linux allows {INTERFACE_LETTERS}; shorten the id"
                )
            if device.id in _RESERVED:
                raise InputError(
                    f"cluster '{self.cluster.name}': device '{device.id}' has the name of an interface that "
                    "every lab has; rename it"
                )
            if device.torch_device != "cpu":
                raise InputError(
                    f"cluster '{self.cluster.name}': device '{device.id}' computes on "
                    f"'{device.torch_device}'; "
                    'a lab shares out processor cores only, set torch_device = "cpu"'
                )
        if len(self.cluster.devices) > MOST_DEVICES:
            raise InputError(
                f"cluster '{self.cluster.name}': {len(self.cluster.devices)} devices, a lab has addresses "
                f"for {MOST_DEVICES}; use fewer"
            )

    def _check_load(self, cores: int) -> None:
        load = sum(self.share(d) for d in self.cluster.ids)
        if load > MOST_LOAD * cores + 1e-9:
            unit = self.cluster.core_share
            speeds = sum(device.speed for device in self.cluster.devices)
            fits = math.floor(MOST_LOAD * cores / speeds * 1e4) / 1e4
            raise InputError(
                f"cluster '{self.cluster.name}': speeds add up to {speeds:g}, at core_share {unit:g} that is "
                f"{load:.3g} cores, and a lab may use {MOST_LOAD:.0%} of {cores}, {MOST_LOAD * cores:.3g}; "
                f"set core_share in [emulation] to at most {fits:g}"
            )

    def share(self, device: str) -> float:
        """Cores that a device has: its speed times what speed 1.0 is."""
        return self.cluster.device(device).speed * self.cluster.core_share

    @property
    def hub(self) -> str:
        """Namespace of the out-of-band network, where the coordinator listens."""
        return f"{PREFIX}{self.lab}.hub"

    def device_namespace(self, device: str) -> str:
        """Namespace of a device."""
        return f"{PREFIX}{self.lab}.d.{device}"

    def site_namespace(self, site: str) -> str:
        """Namespace of a site's router."""
        return f"{PREFIX}{self.lab}.s.{site}"

    @property
    def namespaces(self) -> tuple[str, ...]:
        """All of them."""
        return (
            self.hub,
            *(self.site_namespace(s) for s in self.sites),
            *(self.device_namespace(d) for d in self.cluster.ids),
        )

    def network(self, site: str) -> str:
        """Data network of a site."""
        return f"10.200.{self.sites.index(site)}.0/24"

    def gateway(self, site: str) -> str:
        """The site's router on it."""
        return f"10.200.{self.sites.index(site)}.1"

    def address(self, device: str) -> str:
        """A device on the data network."""
        site = self.cluster.device(device).site
        return f"10.200.{self.sites.index(site)}.{self._number(device)}"

    @property
    def hub_address(self) -> str:
        """The hub on the out-of-band network."""
        return "10.201.0.1"

    def control_address(self, device: str) -> str:
        """A device on the out-of-band network."""
        return f"10.201.0.{self._number(device)}"

    def _number(self, device: str) -> int:
        return self.cluster.ids.index(device) + 2

    def direct(self, a: str, b: str) -> bool:
        """Whether a pair talks over its site's bridge: the site's own link, hardly any latency."""
        return self._switched(a, b) and self._switched(b, a)

    def _switched(self, a: str, b: str) -> bool:
        one, two = self.cluster.device(a), self.cluster.device(b)
        if one.site != two.site or not self.cluster.connected(a, b):
            return False
        route = self.cluster.route(a, b)
        switched = any(name.startswith("port:") for name, _ in route.resources)
        return switched and route.latency_s <= DIRECT_LATENCY_S

    def ways(self) -> tuple[Way, ...]:
        """Ways of all pairs that the relay carries; a pair that the cluster does not join has none.

        A device's own port (``up``, ``down``) is shaped at its interface, so the relay leaves it out.
        """
        ids = self.cluster.ids
        pairs = [(a, b) for a in ids for b in ids if a != b and self.cluster.connected(a, b)]
        routes = [(a, b, self.cluster.route(a, b)) for a, b in pairs if not self.direct(a, b)]
        return tuple(Way(a, b, _between(route), route.latency_s) for a, b, route in routes)

    def detours(self, device: str) -> tuple[str, ...]:
        """Devices of the same site that it reaches through the router, not over the bridge."""
        site = self.cluster.device(device).site
        mates = [d.id for d in self.cluster.devices if d.site == site and d.id != device]
        return tuple(mate for mate in mates if not self.direct(device, mate))

    def switch_rate(self, device: Device) -> float | None:
        """Bytes per second of its port on the site's bridge, where it has neighbours there."""
        for other in self.cluster.devices:
            if other.id != device.id and self.direct(device.id, other.id):
                route = self.cluster.route(device.id, other.id)
                return next(rate for name, rate in route.resources if name.startswith("port:"))
        return None

    def placed(self) -> Cluster:
        """The cluster as its workers see it: with addresses, and with nothing left to emulate."""
        devices = tuple(d.model_copy(update={"address": self.address(d.id)}) for d in self.cluster.devices)
        return self.cluster.model_copy(update={"devices": devices, "emulation": None})


def _between(route: Route) -> tuple[tuple[str, float], ...]:
    """A route's capacities without the two devices' own ports."""
    return tuple(r for r in route.resources if not r[0].startswith(("up:", "down:")))


def changed_cluster(
    cluster: Cluster, a: str, b: str, *, bandwidth_bytes_per_s: float | None, latency_s: float | None
) -> Cluster:
    """The cluster with another link between two devices or two sites, both ways.

    What is not given stays as it is on the way from one to the other.

    Raises:
        InputError: an end is unknown, or there is no link there whose other number could stay.
    """
    links = {(link.source, link.target): link for link in cluster.links}
    for source, target in dict.fromkeys(((a, b), (b, a))):
        rate, delay = _current(cluster, source, target, links)
        new = {
            "source": source,
            "target": target,
            "bandwidth_bytes_per_s": rate if bandwidth_bytes_per_s is None else bandwidth_bytes_per_s,
            "latency_s": delay if latency_s is None else latency_s,
        }
        links[source, target] = type(cluster.links[0]).parse(new, f"link {source} -> {target}")
    return Cluster.parse(
        cluster.to_data() | {"links": [link.to_data() for link in links.values()]}, f"lab of '{cluster.name}'"
    )


def _current(
    cluster: Cluster, source: str, target: str, links: Mapping[tuple[str, str], object]
) -> tuple[float, float]:
    if source in cluster.ids and target in cluster.ids:
        route = cluster.route(source, target)
        return min(rate for _, rate in _between(route)), route.latency_s
    for link in cluster.links:
        if (link.source, link.target) == (source, target):
            return link.bandwidth_bytes_per_s, link.latency_s
    raise InputError(
        f"cluster '{cluster.name}': no link {source} -> {target} to change; name two devices, or two sites "
        f"that have one ({', '.join(f'{s} -> {t}' for s, t in links) or 'there is none'})"
    )
