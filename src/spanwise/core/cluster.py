"""Devices and the links between them: what there is to train on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from spanwise.core.errors import InputError
from spanwise.core.noun import Noun
from spanwise.core.precision import Precision
from spanwise.core.units import parse_bytes, parse_rate, parse_seconds

Tier = Literal["cloud", "edge", "end"]
Everywhere = Literal["everywhere"]
EVERYWHERE: Everywhere = "everywhere"
ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def check_id(text: object) -> str:
    """A name that survives file names, host names and the text form of actions."""
    if not isinstance(text, str) or not ID_PATTERN.fullmatch(text):
        raise InputError(
            f"id '{text}': must be 1 to 63 letters, digits, '_', '.' or '-' "
            "and start with a letter or digit; rename it"
        )
    return text


def _rate(text: str | float) -> float:
    rate = parse_rate(text)
    if rate == 0:
        raise ValueError(
            f"bandwidth '{text}' must be greater than 0, or nothing arrives; remove the link or the device"
        )
    return rate


Id = Annotated[str, BeforeValidator(check_id)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Rate = Annotated[float, BeforeValidator(_rate), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0)]


class Device(Noun):
    """One machine or accelerator.

    Attributes:
        id: unique name.
        tier: ``cloud``, ``edge`` or ``end``; for people, reports and two baselines, no rule depends on it.
        site: devices of one site reach each other over the site's own network.
        torch_device: where tensors live, ``cpu`` or ``cuda:0``.
        threads: torch intra-op threads.
        memory_bytes: budget for tensors (weights, gradients, optimizer state, activations,
            buffers), not for the interpreter and its libraries; written ``memory = "2 GiB"``.
        speed: compute relative to the device that profiles are taken on.
        address: host name or IP its worker listens on for its peers; none = started by ``train``.
        up_bytes_per_s, down_bytes_per_s: capacity of its network port, shared by all its links.
    """

    id: Id
    tier: Tier = "edge"
    site: Id = "site"
    torch_device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    memory_bytes: Bytes = 4 * 2**30
    speed: float = Field(default=1.0, gt=0)
    address: str | None = None
    up_bytes_per_s: Rate | None = None
    down_bytes_per_s: Rate | None = None

    @model_validator(mode="before")
    @classmethod
    def _human_keys(cls, data: Any) -> Any:
        return _renamed(data, {"memory": "memory_bytes", "up": "up_bytes_per_s",
                               "down": "down_bytes_per_s"})  # fmt: skip


class Link(Noun):
    """A directed connection from one device to another, or from every device of one site to another.

    ``source`` and ``target`` are device ids or site names. A link between two different sites is one
    pipe that all their devices share; a link from a site to itself is a switch, where each
    device's own port has the bandwidth. ``precision``: with how many bits activations and their gradients
    cross it; anything but ``full`` makes training faster there and no longer exact.
    """

    source: Id
    target: Id
    bandwidth_bytes_per_s: Rate
    latency_s: Seconds = 0.0
    precision: Precision = "full"


class DataShare(Noun):
    """A device that holds training data, and its share of every batch relative to the others."""

    device: Id
    share: float = Field(default=1.0, gt=0)


def _form_of_data(data: object) -> str:
    return "everywhere" if isinstance(data, str) else "devices"


Data = Annotated[  # told apart by form, so that an error speaks of the form that was written
    Annotated[Everywhere, Tag("everywhere")] | Annotated[tuple[DataShare, ...], Tag("devices")],
    Discriminator(_form_of_data),
]


class Emulation(Noun):
    """The cluster is emulated on one machine: speed 1.0 is ``core_share`` of one of its cores."""

    core_share: float = Field(default=1.0, gt=0, le=1)


@dataclass(frozen=True, slots=True)
class Route:
    """How a message goes from one device to another.

    ``resources`` names every capacity that it shares with other messages, with bytes per second;
    ``bandwidth_bytes_per_s`` is the least of them.
    """

    bandwidth_bytes_per_s: float
    latency_s: float
    resources: tuple[tuple[str, float], ...]


class Cluster(Noun):
    """Devices, links, and where the data is. ``route(a, b)`` answers for every pair or raises.

    ``data`` lists the devices that hold the training data with their shares, or is ``"everywhere"``: every
    device has a copy of all of it.
    """

    name: Id = "cluster"
    description: str = ""
    devices: tuple[Device, ...] = Field(min_length=1)
    links: tuple[Link, ...] = ()
    data: Data = ()
    emulation: Emulation | None = None

    @model_validator(mode="before")
    @classmethod
    def _human_forms(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        out = dict(cast("dict[str, Any]", data))
        if isinstance(out.get("links"), (list, tuple)):
            out["links"] = [one for entry in out["links"] for one in _directed(entry)]
        if isinstance(out.get("data"), dict):
            out["data"] = [{"device": k, "share": v} for k, v in out["data"].items()]
        elif isinstance(out.get("data"), (list, tuple)):
            out["data"] = [{"device": e} if isinstance(e, str) else e for e in out["data"]]
        elif isinstance(out.get("data"), str) and out["data"] != EVERYWHERE:
            raise InputError(
                f"cluster: data = '{out['data']}': must be '{EVERYWHERE}', a list of devices or a table of "
                f"shares; for one device write data = ['{out['data']}']"
            )
        return out

    @model_validator(mode="after")
    def _consistent(self) -> Cluster:
        ids = [device.id for device in self.devices]
        _refuse_doubles(ids, f"cluster '{self.name}': device id")
        sites = {device.site for device in self.devices}
        for name in sorted(sites & set(ids)):
            raise InputError(f"cluster '{self.name}': '{name}' names a device and a site; rename one")
        for link in self.links:
            for end in (link.source, link.target):
                if end not in sites and end not in ids:
                    raise InputError(
                        f"cluster '{self.name}': link {link.source} -> {link.target}: unknown device or "
                        f"site '{end}'; known devices: {', '.join(ids)}; sites: {', '.join(sorted(sites))}"
                    )
            if link.source == link.target and link.source in ids:
                raise InputError(
                    f"cluster '{self.name}': link {link.source} -> {link.source} joins a device "
                    "to itself; remove it"
                )
        _refuse_doubles([f"{x.source} -> {x.target}" for x in self.links],
                        f"cluster '{self.name}': link")  # fmt: skip
        shares = () if self.data == EVERYWHERE else self.data
        for share in shares:
            if share.device not in ids:
                raise InputError(
                    f"cluster '{self.name}': data: unknown device '{share.device}'; "
                    f"known devices: {', '.join(ids)}"
                )
        _refuse_doubles([share.device for share in shares], f"cluster '{self.name}': data device")
        return self

    @cached_property
    def _by_id(self) -> dict[str, Device]:
        return {device.id: device for device in self.devices}

    @cached_property
    def _links(self) -> dict[tuple[str, str], Link]:
        return {(link.source, link.target): link for link in self.links}

    @property
    def ids(self) -> tuple[str, ...]:
        """Device ids in file order."""
        return tuple(device.id for device in self.devices)

    @property
    def core_share(self) -> float:
        """What part of one core speed 1.0 is: all of it unless the cluster is emulated."""
        return self.emulation.core_share if self.emulation else 1.0

    @property
    def data_shares(self) -> tuple[DataShare, ...]:
        """Who holds the data by the file: all where it is everywhere, the first device if it does not say."""
        if self.data == EVERYWHERE:
            return tuple(DataShare(device=device) for device in self.ids)
        return self.data or (DataShare(device=self.devices[0].id),)

    def data_devices(self, chosen: tuple[str, ...] = ()) -> tuple[DataShare, ...]:
        """Who gives which share of every batch: ``chosen`` if a job names devices, else those of the file.

        Empty if every device has all of the data: then rows start out wherever they are computed first.
        """
        if not chosen:
            return () if self.data == EVERYWHERE else self.data_shares
        known = {} if self.data == EVERYWHERE else {share.device: share.share for share in self.data}
        return tuple(
            DataShare(device=self.device(d).id, share=known.get(d, 1.0)) for d in dict.fromkeys(chosen)
        )

    def device(self, device_id: str) -> Device:
        """The device of that id; ``InputError`` if there is none."""
        found = self._by_id.get(device_id)
        if found is None:
            raise InputError(
                f"cluster '{self.name}': unknown device '{device_id}'; known: {', '.join(self.ids)}"
            )
        return found

    def connected(self, source: str, target: str) -> bool:
        """Whether some link leads from one device to another."""
        return source == target or self._link(self.device(source), self.device(target)) is not None

    def route(self, source: str, target: str) -> Route:
        """The way from one device to another; ``InputError`` if there is no link.

        A link by device pair goes before one by device and site, and that before one by site pair.
        """
        a, b = self.device(source), self.device(target)
        if a.id == b.id:
            return Route(float("inf"), 0.0, ())
        link = self._link(a, b)
        if link is None:
            raise InputError(
                f"cluster '{self.name}': no link from '{a.id}' (site {a.site}) to '{b.id}' "
                f"(site {b.site}); add one by device pair or by site pair"
            )
        rate = link.bandwidth_bytes_per_s
        if link.source == link.target:  # a switch: each port has the bandwidth
            resources = [(f"port:{a.id}>{a.site}", rate), (f"port:{b.site}>{b.id}", rate)]
        else:
            resources = [(f"link:{link.source}>{link.target}", rate)]
        if a.up_bytes_per_s is not None:
            resources.append((f"up:{a.id}", a.up_bytes_per_s))
        if b.down_bytes_per_s is not None:
            resources.append((f"down:{b.id}", b.down_bytes_per_s))
        return Route(min(r for _, r in resources), link.latency_s, tuple(resources))

    def precision(self, source: str, target: str) -> Precision:
        """How activations and gradients travel from one device to another."""
        link = self._link(self.device(source), self.device(target))
        return "full" if link is None or source == target else link.precision

    def _link(self, a: Device, b: Device) -> Link | None:
        for pair in ((a.id, b.id), (a.id, b.site), (a.site, b.id), (a.site, b.site)):
            if pair in self._links:
                return self._links[pair]
        return None


def _renamed(data: Any, names: dict[str, str]) -> Any:
    if not isinstance(data, dict):
        return data
    return {names.get(key, key): value for key, value in cast("dict[str, Any]", data).items()}


def _refuse_doubles(names: list[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{what} '{name}' is listed twice; remove one")
        seen.add(name)


def _directed(entry: Any) -> list[Any]:
    """``between = [a, b]`` with ``bandwidth`` or ``up``/``down`` to one link each way."""
    if isinstance(entry, Link) or not isinstance(entry, dict):
        return [entry]
    data: dict[str, Any] = _renamed(entry, {"from": "source", "to": "target",
                                            "bandwidth": "bandwidth_bytes_per_s",
                                            "latency": "latency_s"})  # fmt: skip
    if "between" not in data:
        return [data]
    ends = data.pop("between")
    if not isinstance(ends, (list, tuple)) or len(cast("Sequence[Any]", ends)) != 2:
        raise InputError(f"link between {ends}: needs exactly two devices or sites")
    both = data.pop("bandwidth_bytes_per_s", None)
    up, down = data.pop("up", both), data.pop("down", both)
    if up is None or down is None:
        raise InputError(f"link between {ends[0]} and {ends[1]}: needs 'bandwidth', or 'up' and 'down'")
    forth: dict[str, Any] = {**data, "source": ends[0], "target": ends[1], "bandwidth_bytes_per_s": up}
    if ends[0] == ends[1]:
        return [forth]
    return [forth, {**data, "source": ends[1], "target": ends[0], "bandwidth_bytes_per_s": down}]
