"""Profiles without measuring every device: one table for all by relative speed, or times from FLOPs."""

from __future__ import annotations

from collections.abc import Mapping

from spanwise.core.cluster import Cluster
from spanwise.core.model import Layer, ModelGraph
from spanwise.core.profile import DeviceTimes, LayerTimes, Profile, TimeTable

_ANALYTIC_ROWS = (1, 64)


def scaled_profile(graph: ModelGraph, tables: Mapping[int, TimeTable], cluster: Cluster) -> Profile:
    """The same tables for every device, slowed by its relative speed.

    Args:
        graph: the model.
        tables: by number of threads, times of this machine at full speed.
        cluster: where it is emulated on this machine, speed 1.0 is only its ``core_share`` of a core.
    """
    threads = sorted(tables)
    share = cluster.core_share
    return Profile(
        graph_digest=graph.digest,
        tables=tuple(tables[count] for count in threads),
        devices=tuple(
            DeviceTimes(
                device=device.id,
                table=threads.index(device.threads) if device.threads in tables else 0,
                factor=1 / (device.speed * share),
            )
            for device in cluster.devices
        ),
    )


def analytic_table(graph: ModelGraph, flops_per_s: float, bytes_per_s: float | None = None) -> TimeTable:
    """Layer times of a machine one does not have.

    Each layer takes the longer of its arithmetic and its memory traffic, as in Williams, Waterman and
    Patterson, "Roofline: an insightful visual performance model for multicore architectures", CACM 2009,
    section 3.

    Args:
        graph: the model.
        flops_per_s: sustained floating-point operations per second.
        bytes_per_s: sustained memory bandwidth; none leaves memory out.
    """
    layers: list[LayerTimes] = []
    for index, layer in enumerate(graph.layers):
        once, per_row = _traffic(graph, index, layer)
        forward: list[float] = []
        backward: list[float] = []
        weight: list[float] = []
        for rows in _ANALYTIC_ROWS:
            memory = (once + per_row * rows) / bytes_per_s if bytes_per_s else 0.0
            forward.append(max(layer.forward_flops * rows / flops_per_s, memory))
            # Backward reads what was kept and the gradients, and writes both gradients: twice the traffic.
            backward.append(max(layer.backward_flops * rows / flops_per_s, 2 * memory))
            weight.append(_weight_part(layer) * backward[-1])
        layers.append(
            LayerTimes(
                forward_s=tuple(forward),
                backward_s=tuple(backward),
                backward_input_s=tuple(b - w for b, w in zip(backward, weight, strict=True)),
                backward_weight_s=tuple(weight),
            )
        )
    # A step with momentum reads weight, gradient and momentum and writes two of them.
    update = 5 / bytes_per_s if bytes_per_s else 0.0
    return TimeTable(
        rows=_ANALYTIC_ROWS,
        layers=tuple(layers),
        update_s_per_byte=update,
        provenance="analytic",
        environment=f"{flops_per_s:.3g} FLOP/s" + (f", {bytes_per_s:.3g} B/s" if bytes_per_s else ""),
    )


def _weight_part(layer: Layer) -> float:
    """The part of a backward that only weights need and that can wait."""
    return layer.weight_flops / layer.backward_flops if layer.backward_flops else 0.0


def _traffic(graph: ModelGraph, index: int, layer: Layer) -> tuple[int, int]:
    """Bytes of forward: once per micro-batch (weights), and per row (in, out, kept for backward)."""
    into = sum(spec.row_bytes for spec in graph.cut_before(index))
    return layer.parameter_bytes, into + max(layer.cut_bytes, layer.saved_bytes)
