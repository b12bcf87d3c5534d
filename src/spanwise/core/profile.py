"""How long each layer takes on each device: measured, analytic or fitted."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import log2
from typing import Literal

from pydantic import Field, model_validator

from spanwise.core.errors import InputError
from spanwise.core.noun import Noun

Provenance = Literal["measured", "analytic", "fitted"]


class LayerTimes(Noun):
    """Seconds of one layer at the table's row counts, medians of several repeats.

    ``backward_input_s`` and ``backward_weight_s`` are those of the two halves of a backward, which together
    may take longer than ``backward_s``. Tables that do not have them take half of the backward for each.
    ``spread`` is the interquartile range over the median of forward plus backward at the largest row count.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    backward_input_s: tuple[float, ...] | None = None
    backward_weight_s: tuple[float, ...] | None = None
    spread: float = Field(default=0.0, ge=0)


class TimeTable(Noun):
    """Layer times on one kind of device at several row counts.

    ``update_s_per_byte`` is the optimizer step per byte of parameters, ``sum_s_per_byte`` what a gradient sum
    takes from the device itself per byte: into a flat buffer, plus a peer's, and back. ``message_s`` and
    ``message_s_per_byte`` are the compute that sending or receiving a message takes from it.
    """

    rows: tuple[int, ...] = Field(min_length=1)
    layers: tuple[LayerTimes, ...] = Field(min_length=1)
    update_s_per_byte: float = Field(default=0.0, ge=0)
    sum_s_per_byte: float = Field(default=0.0, ge=0)
    message_s: float = Field(default=0.0, ge=0)
    message_s_per_byte: float = Field(default=0.0, ge=0)
    provenance: Provenance = "measured"
    environment: str = ""

    @model_validator(mode="after")
    def _rectangular(self) -> TimeTable:
        if list(self.rows) != sorted(set(self.rows)) or self.rows[0] < 1:
            raise InputError(f"profile: row counts {self.rows} must be positive and rise")
        for index, layer in enumerate(self.layers):
            for values in (layer.forward_s, layer.backward_s, *halves_of(layer)):
                if len(values) != len(self.rows) or min(values) < 0:
                    raise InputError(f"profile: layer {index} needs {len(self.rows)} times, none negative")
        return self

    def forward(self, layer: int, rows: int) -> float:
        """Seconds of the forward pass of ``rows`` rows; 0 at 0 rows."""
        return _interpolate(self.rows, self.layers[layer].forward_s, rows)

    def backward(self, layer: int, rows: int) -> float:
        """Seconds of the backward pass of ``rows`` rows; 0 at 0 rows."""
        return _interpolate(self.rows, self.layers[layer].backward_s, rows)

    def halves(self, layer: int, rows: int) -> tuple[float, float]:
        """Seconds of the input half and of the weight half of the backward pass of ``rows`` rows."""
        into, weight = halves_of(self.layers[layer])
        return _interpolate(self.rows, into, rows), _interpolate(self.rows, weight, rows)

    def weight(self, layer: int, rows: int) -> float:
        """Seconds of the weight half alone."""
        return _interpolate(self.rows, halves_of(self.layers[layer])[1], rows)

    def stretched(self, factors: Mapping[int, float]) -> TimeTable:
        """The table with times longer by factors known at some row counts.

        Between these a factor is linear in the logarithm of the row count, outside it is that of the nearest.
        """
        by = tuple(_between(sorted(factors.items()), rows) for rows in self.rows)
        return self.model_copy(update={"layers": tuple(_stretched(layer, by) for layer in self.layers)})


def _between(known: Sequence[tuple[int, float]], rows: int) -> float:
    """Linear in the logarithm of the row count between known points, constant outside."""
    above = next((i for i, (count, _) in enumerate(known) if count >= rows), len(known))
    if above in (0, len(known)):
        return known[min(above, len(known) - 1)][1]
    (r0, f0), (r1, f1) = known[above - 1], known[above]
    return f0 + (f1 - f0) * log2(rows / r0) / log2(r1 / r0)


def _stretched(layer: LayerTimes, by: tuple[float, ...]) -> LayerTimes:
    times = {
        name: tuple(f * s for f, s in zip(by, seconds, strict=True))
        for name in ("forward_s", "backward_s", "backward_input_s", "backward_weight_s")
        if (seconds := getattr(layer, name)) is not None
    }
    return layer.model_copy(update=times)


def halves_of(layer: LayerTimes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """By row count, seconds of both halves of a layer's backward."""
    if layer.backward_input_s is None or layer.backward_weight_s is None:
        half = tuple(seconds / 2 for seconds in layer.backward_s)
        return half, half
    return layer.backward_input_s, layer.backward_weight_s


class DeviceTimes(Noun):
    """Which table holds for a device, and by which factor its times are longer.

    ``alone`` is the part of that which remains while all other devices rest: below 1 only for devices that
    share a machine, as those of a lab do.
    """

    device: str
    table: int = Field(default=0, ge=0)
    factor: float = Field(default=1.0, gt=0)
    alone: float = Field(default=1.0, gt=0, le=1)


class StageTimes(Noun):
    """Seconds of a stage of one plan on one device, as the device itself has timed it on its rows.

    For devices that train a part of it: that depends on which part, and on pages that a device which hands
    freed memory back at once must take anew. Times of layers that train as a whole do not tell. ``plan`` is
    the digest of the plan; a device's factor applies as it does to its table.
    """

    plan: str
    device: str
    stage: int = Field(ge=0)
    forward_s: float = Field(ge=0)
    backward_s: float = Field(ge=0)


class LinkTimes(Noun):
    """A measured link: latency and bandwidth from small and large messages."""

    source: str
    target: str
    bandwidth_bytes_per_s: float = Field(gt=0)
    latency_s: float = Field(ge=0)


class Profile(Noun):
    """Layer times for every device of a cluster; ``stages`` where plans were timed as they are."""

    graph_digest: str
    tables: tuple[TimeTable, ...] = Field(min_length=1)
    devices: tuple[DeviceTimes, ...] = Field(min_length=1)
    links: tuple[LinkTimes, ...] = ()
    stages: tuple[StageTimes, ...] | None = None

    @model_validator(mode="after")
    def _tables_exist(self) -> Profile:
        seen: set[str] = set()
        for entry in self.devices:
            if entry.device in seen:
                raise InputError(f"profile: device '{entry.device}' is listed twice; remove one")
            seen.add(entry.device)
            if entry.table >= len(self.tables):
                raise InputError(
                    f"profile: device '{entry.device}' refers to table {entry.table} of {len(self.tables)}"
                )
        return self

    @cached_property
    def _by_device(self) -> dict[str, tuple[TimeTable, float]]:
        return {d.device: (self.tables[d.table], d.factor) for d in self.devices}

    def table(self, device: str) -> tuple[TimeTable, float]:
        """The table that holds for a device and the factor on its times."""
        found = self._by_device.get(device)
        if found is None:
            raise InputError(
                f"profile: no times for device '{device}'; profile the cluster again "
                f"(has: {', '.join(self._by_device)})"
            )
        return found

    def forward_s(self, device: str, start: int, stop: int, rows: int) -> float:
        """Seconds of the forward pass through layers ``[start, stop)`` on ``rows`` rows."""
        table, factor = self.table(device)
        return factor * sum(table.forward(layer, rows) for layer in range(start, stop))

    def backward_s(self, device: str, start: int, stop: int, rows: int) -> float:
        """Seconds of the backward pass through layers ``[start, stop)`` on ``rows`` rows."""
        table, factor = self.table(device)
        return factor * sum(table.backward(layer, rows) for layer in range(start, stop))

    def halves_s(self, device: str, start: int, stop: int, rows: int) -> tuple[float, float]:
        """Seconds of the input and weight halves of the backward pass through layers ``[start, stop)``."""
        table, factor = self.table(device)
        halves = [table.halves(layer, rows) for layer in range(start, stop)]
        return factor * sum(into for into, _ in halves), factor * sum(weight for _, weight in halves)

    @cached_property
    def _by_stage(self) -> dict[tuple[str, str, int], StageTimes]:
        return {(s.plan, s.device, s.stage): s for s in self.stages or ()}

    def stage_s(self, plan: str, device: str, stage: int) -> tuple[float, float] | None:
        """Seconds of forward and backward of a stage of a plan (its digest), if the device timed it."""
        found = self._by_stage.get((plan, device, stage))
        _, factor = self.table(device)
        return None if found is None else (factor * found.forward_s, factor * found.backward_s)

    def update_s(self, device: str, parameter_bytes: int) -> float:
        """Seconds of the optimizer step over that many bytes of parameters."""
        table, factor = self.table(device)
        return factor * table.update_s_per_byte * parameter_bytes


def _interpolate(xs: tuple[int, ...], ys: tuple[float, ...], x: int) -> float:
    """Piecewise linear; outside the range along the outer segment, never negative; 0 at 0."""
    if x <= 0:
        return 0.0
    if len(xs) == 1:
        return ys[0] * x / xs[0]
    at = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    x0, x1, y0, y1 = xs[at - 1], xs[at], ys[at - 1], ys[at]
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))
