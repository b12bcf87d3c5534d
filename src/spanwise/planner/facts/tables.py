"""Layer times and memory of every device as prefix sums: any range of layers at any rows in one look-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from spanwise.core.cluster import Cluster
from spanwise.core.model import ModelGraph
from spanwise.core.profile import Profile, TimeTable, halves_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class PerDevice:
    """An array ``[device, ...]`` that keeps one entry for all devices with equal ones; read by index."""

    __slots__ = ("_entries", "_of")

    def __init__(self, entries: Floats, of: Ints) -> None:
        """``entries[of[device]]`` is what ``device`` has."""
        self._entries, self._of = entries, of

    @property
    def shape(self) -> tuple[int, ...]:
        """As if every device had an entry of its own."""
        return (len(self._of), *self._entries.shape[1:])

    def __getitem__(self, key: Any) -> Any:
        """As an array would."""
        first, *rest = cast("tuple[Any, ...]", key) if isinstance(key, tuple) else (key,)
        return self._entries[(self._of[first], *rest)]

    def mean(self) -> Floats:
        """Over all devices."""
        weights = np.bincount(self._of, minlength=len(self._entries)) / len(self._of)
        return np.tensordot(weights, self._entries, axes=1)

    def __add__(self, other: PerDevice) -> PerDevice:
        return PerDevice(self._entries + other._entries, self._of)


@dataclass(frozen=True, slots=True)
class Tables:
    """Arrays over devices in file order, layers ``0..L`` and rows ``0..batch``.

    Attributes:
        forward, backward: ``[device, layer, rows]`` seconds of layers ``[0, layer)``, not falling with rows.
        both: their sum.
        backward_input, backward_weight: likewise of the two halves of a backward.
        message_s: ``[device]`` seconds of compute that one message takes.
        update_s_per_byte: ``[device]`` of the optimizer step.
        parameters: ``[start, stop]`` bytes of parameters of a range, each tied one once.
        buffers, saved, saved_fixed: ``[layer]`` prefix sums of bytes, ``saved`` per row.
        into: ``[layer]`` bytes per row that enter layer ``layer``; ``into[L]`` is 0.
        back: ``[layer]`` bytes per row of the gradients that leave layer ``layer`` towards the front.
        budget: ``[device]`` bytes.
        mixing: ``[layer]`` how many layers before it have batch statistics.
        copies: optimizer copies of the parameters.
    """

    forward: PerDevice
    backward: PerDevice
    both: PerDevice
    backward_input: PerDevice
    backward_weight: PerDevice
    message_s: Floats
    update_s_per_byte: Floats
    parameters: Floats
    buffers: Floats
    saved: Floats
    saved_fixed: Floats
    into: Floats
    back: Floats
    budget: Floats
    mixing: Ints
    copies: int

    @classmethod
    def of(cls, graph: ModelGraph, profile: Profile, cluster: Cluster, batch: int, copies: int) -> Tables:
        """Interpolates every time table of the profile once at all rows up to ``batch``."""
        dense = {id(t): _dense(t, batch) for t in {id(t): t for t in profile.tables}.values()}
        chosen = [profile.table(device.id) for device in cluster.devices]
        alike: dict[tuple[int, float], int] = {}
        of = np.array([alike.setdefault((id(table), factor), len(alike)) for table, factor in chosen])
        forward, backward, backward_input, backward_weight = (
            PerDevice(np.stack([factor * dense[table][way] for table, factor in alike]), of)
            for way in range(4)
        )
        layers = graph.layers
        return cls(
            forward=forward,
            backward=backward,
            both=forward + backward,
            backward_input=backward_input,
            backward_weight=backward_weight,
            message_s=np.array([factor * table.message_s for table, factor in chosen]),
            update_s_per_byte=np.array([factor * table.update_s_per_byte for table, factor in chosen]),
            parameters=_parameters(graph),
            buffers=_prefix([layer.buffer_bytes for layer in layers]),
            saved=_prefix([layer.saved_bytes for layer in layers]),
            saved_fixed=_prefix([layer.saved_fixed_bytes for layer in layers]),
            into=np.array([graph.input_row_bytes, *(layer.cut_bytes for layer in layers)], dtype=np.float64),
            back=np.array([0, *(layer.gradient_cut_bytes for layer in layers)], dtype=np.float64),
            budget=np.array([device.memory_bytes for device in cluster.devices], dtype=np.float64),
            mixing=_prefix([int(layer.batch_statistics) for layer in layers]).astype(np.int64),
            copies=copies,
        )

    @property
    def layers(self) -> int:
        """L."""
        return self.forward.shape[1] - 1

    def least_rows(self, start: Ints | int, stop: Ints | int) -> Ints:
        """Rows of a micro-batch that a replica needs: one row has no variance to divide by."""
        return 1 + (self.mixing[stop] > self.mixing[start]).astype(np.int64)

    def fixed_bytes(self, start: Ints, stop: Ints, *, in_flight: Ints | int, synced: bool) -> Floats:
        """Bytes of a stage that do not grow with rows (see ``cost.stage_bytes``)."""
        state = self.parameters[start, stop] * (2 + self.copies + synced)
        held = self.buffers[stop] - self.buffers[start]
        return state + held + in_flight * (self.saved_fixed[stop] - self.saved_fixed[start])

    def row_bytes(self, start: Ints, stop: Ints, *, in_flight: Ints | int) -> Floats:
        """Bytes of a stage per row: activations in flight and message buffers."""
        messages = 2 * (self.into[start] + self.into[stop])
        return in_flight * (self.saved[stop] - self.saved[start] + self.into[stop]) + messages

    def row_cap(self, device: int, start: Ints, stop: Ints, *, in_flight: Ints | int, synced: bool) -> Ints:
        """Most rows that fit the budget of a device; below 1 = none."""
        free = self.budget[device] - self.fixed_bytes(start, stop, in_flight=in_flight, synced=synced)
        per_row = np.maximum(self.row_bytes(start, stop, in_flight=in_flight), 1e-9)
        return np.minimum(np.maximum(np.floor(free / per_row), -1.0), 2.0**31).astype(np.int64)


def _dense(table: TimeTable, batch: int) -> tuple[Floats, ...]:
    """Seconds ``[layer, rows]`` of forward, backward and its halves, prefix-summed over layers."""
    ways = zip(
        *((layer.forward_s, layer.backward_s, *halves_of(layer)) for layer in table.layers), strict=True
    )
    zero = np.zeros((1, batch + 1))
    return tuple(
        np.concatenate([zero, np.cumsum([_at_all_rows(table.rows, ys, batch) for ys in way], axis=0)])
        for way in ways
    )


def _at_all_rows(xs: tuple[int, ...], ys: tuple[float, ...], batch: int) -> Floats:
    """As ``TimeTable.forward`` at 0..batch; made not to fall, as noise must not make more rows cheaper."""
    at = np.arange(batch + 1, dtype=np.float64)
    if len(xs) == 1:
        return ys[0] * at / xs[0]
    x, y = np.array(xs, dtype=np.float64), np.array(ys)
    piece = np.minimum(np.maximum(np.searchsorted(x, at), 1), len(xs) - 1)
    slope = (y[piece] - y[piece - 1]) / (x[piece] - x[piece - 1])
    out = np.maximum(0.0, y[piece - 1] + slope * (at - x[piece - 1]))
    out[0] = 0.0
    return np.maximum.accumulate(out)


def _prefix(values: list[int]) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.array(values, dtype=np.float64))])


def _parameters(graph: ModelGraph) -> Floats:
    total = _prefix([layer.parameter_bytes for layer in graph.layers])
    out = np.maximum(total[None, :] - total[:, None], 0.0)
    edge = np.arange(len(graph) + 1)
    sizes = {p.name: p.bytes for p in graph.parameters}
    for name, users in graph.ties:
        inside = [(edge[:, None] <= u) & (u < edge[None, :]) for u in users]
        out -= sizes[name] * np.maximum(np.sum(inside, axis=0) - 1, 0)
    return out
