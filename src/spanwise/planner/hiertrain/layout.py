"""Machines, links, roles and cuts in plain numbers, and a step time as maxima of lines: HierTrain's nouns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spanwise.core.cluster import Route
from spanwise.core.errors import InputError
from spanwise.planner.facts.tables import Floats

Exchange = Literal["ring", "server"]
Line = tuple[float, ...]  # seconds once, then seconds a row of the finisher and of every worker
Group = tuple[Line, ...]  # of which the greatest counts


@dataclass(frozen=True, slots=True)
class Machine:
    """What one machine takes; ``[layer]`` are sums over the layers before that one, 0 to N.

    Attributes:
        forward_s, backward_s: ``[layer]`` seconds a row.
        forward_once_s, backward_once_s: ``[layer]`` seconds a micro-batch, whatever its rows.
        update_s_per_byte: of the optimizer step.
        input_loads: capacities on the way of its raw rows, with seconds a row; none where the data lies.
        input_latency_s: of raw rows.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    forward_once_s: tuple[float, ...]
    backward_once_s: tuple[float, ...]
    update_s_per_byte: float = 0.0
    input_loads: tuple[tuple[str, float], ...] = ()
    input_latency_s: float = 0.0

    @property
    def sums(self) -> tuple[tuple[str, tuple[float, ...]], ...]:
        """What is summed over layers, with its name."""
        return (
            ("forward", self.forward_s),
            ("backward", self.backward_s),
            ("forward once", self.forward_once_s),
            ("backward once", self.backward_once_s),
        )

    @property
    def input_s(self) -> float:
        """Seconds a raw row is on its way if nothing else is."""
        return max((load for _, load in self.input_loads), default=0.0)


@dataclass(frozen=True, slots=True)
class Instance:
    """Machines, links and a chain of N layers in numbers.

    Attributes:
        rows: B, of the batch.
        machines: in any order; layouts name them by place.
        out_bytes, back_bytes: ``[layer]`` bytes a row of activations behind ``layer`` layers, and of their
            gradients; 0 behind the last.
        parameters: ``[start, stop]`` bytes.
        routes: between machines by place; a pair without a link is not in it.
        sources: machines that have the data. If none of them computes, raw rows of the next step are sent
            during the step before; none: as published, every step begins with its raw rows.
        exchange: how gradients of prefixes are summed: by rings over all that hold a layer, as our plans do,
            or as published on a server, the sum sent back. The server is the finisher, of layers that it does
            not hold the longest worker.

    Raises:
        InputError: there is no layer, machine or row, or a time or size is negative or not finite.
    """

    rows: int
    machines: tuple[Machine, ...]
    out_bytes: tuple[float, ...]
    back_bytes: tuple[float, ...]
    parameters: Floats
    routes: Mapping[tuple[int, int], Route]
    sources: tuple[int, ...] | None = None
    exchange: Exchange = "ring"

    def __post_init__(self) -> None:
        if self.layers < 1 or not self.machines or self.rows < 1:
            raise InputError(
                f"hiertrain: {self.layers} layers, {len(self.machines)} machines and {self.rows} rows; "
                "there must be at least one of each"
            )
        for number, machine in enumerate(self.machines):
            for what, sums in machine.sums:
                _check_sums(f"{what} of machine {number}", sums, self.layers)
            if not 0 <= machine.update_s_per_byte < np.inf:
                raise InputError(
                    f"hiertrain: machine {number} updates a byte in {machine.update_s_per_byte:g} s; "
                    "times must be finite and not negative, profile again"
                )
        for what, sizes in (("outputs", self.out_bytes), ("gradients", self.back_bytes)):
            _check_sizes(what, np.array(sizes), self.layers + 1)
        _check_sizes("parameters", self.parameters, self.layers + 1)

    @property
    def layers(self) -> int:
        """N."""
        return len(self.out_bytes) - 1

    def linked(self, a: int, b: int) -> bool:
        """Whether two machines reach each other."""
        return (a, b) in self.routes and (b, a) in self.routes

    def link_s(self, a: int, b: int) -> float:
        """Seconds a byte from one machine to another."""
        return 1 / self.routes[a, b].bandwidth_bytes_per_s


def _check_sums(what: str, sums: tuple[float, ...], layers: int) -> None:
    """``InputError`` unless each layer adds a time."""
    if len(sums) != layers + 1:
        raise InputError(f"hiertrain: {what} has {len(sums) - 1} layers of {layers}; profile this model")
    times = np.diff(np.array(sums))
    wrong = np.flatnonzero(~(np.isfinite(times) & (times >= 0)))
    if len(wrong):
        raise InputError(
            f"hiertrain: {what} takes {times[wrong[0]]:g} s for layer {wrong[0]}; "
            "times must be finite and not negative, profile again"
        )


def _check_sizes(what: str, sizes: Floats, count: int) -> None:
    """``InputError`` unless there are sizes for every place between layers."""
    least = float(np.min(sizes)) if len(sizes) == count else np.nan
    if not (least >= 0 and np.isfinite(sizes).all()):
        raise InputError(
            f"hiertrain: {what} of {len(sizes) - 1} layers, the least {least:g} bytes; "
            f"sizes must be known of all {count - 1}, finite and not negative"
        )


@dataclass(frozen=True, slots=True)
class Roles:
    """Who finishes all rows, who starts some, shortest prefix first, and whether the finisher starts some.

    If it does not, it holds no layer before the first cut.
    """

    finisher: int
    workers: tuple[int, ...] = ()
    starts: bool = True


@dataclass(frozen=True, slots=True)
class Layout:
    """Roles, and up to which layer each worker goes: ``1 <= cuts[0] <= ... <= N``."""

    roles: Roles
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Terms:
    """A step time: ``constant_s`` plus, for every group, its greatest line; at least a line of ``floor``."""

    constant_s: float
    groups: tuple[Group, ...]
    floor: Group = ()

    def seconds(self, rows: tuple[int, ...]) -> float:
        """With so many rows of a micro-batch started by the finisher and every worker."""
        return max(self.moving_s(rows), greatest(self.floor, rows))

    def moving_s(self, rows: tuple[int, ...]) -> float:
        """Without regard to the floor."""
        return self.constant_s + sum(greatest(group, rows) for group in self.groups)


def greatest(group: Group, rows: tuple[int, ...]) -> float:
    """The greatest line of a group; 0 if it is empty."""
    lines = (line[0] + sum(c * y for c, y in zip(line[1:], rows, strict=True)) for line in group)
    return max(lines, default=0.0)


def starters(roles: Roles) -> dict[int, int]:
    """Machines that start rows, by their place among the rows."""
    return {j: m for j, m in enumerate((roles.finisher, *roles.workers)) if j or roles.starts}


def runs_ahead(instance: Instance, roles: Roles) -> bool:
    """Whether raw rows of a step are sent during the one before, as no machine with data computes."""
    busy = (roles.finisher, *roles.workers)
    return instance.sources is not None and not any(machine in busy for machine in instance.sources)
