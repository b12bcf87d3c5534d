"""Predicted against measured, in numbers."""

from __future__ import annotations

from spanwise.core.timeline import Timeline


def summarize(
    simulated: Timeline | None, measured: Timeline | None, *, batch: int | None = None
) -> dict[str, object]:
    """Both sides of a run under the keys that ``--json`` prints.

    Args:
        simulated: what was predicted, if it was.
        measured: what happened, if it ran.
        batch: rows of a global batch; without it ``throughput_samples_per_s`` is left out.

    Returns:
        ``step_time_s``, ``throughput_samples_per_s`` and ``devices`` (id to ``utilization``,
        ``peak_memory_bytes``, ``sent_bytes``) as measured, or as predicted where nothing was measured;
        ``predicted`` and ``measured`` with the same keys each; ``error_ratio``, predicted over
        measured step time minus one (negative: the run was slower than predicted). The keys are always
        there; a side that does not exist holds None and no devices.
    """
    predicted_side, measured_side = _side(simulated, batch), _side(measured, batch)
    shown = predicted_side if measured is None else measured_side
    return {
        **shown,
        "predicted": predicted_side,
        "measured": measured_side,
        "error_ratio": error_ratio(
            None if simulated is None else simulated.step_time_s,
            None if measured is None else measured.step_time_s,
        ),
    }


def error_ratio(predicted_s: float | None, measured_s: float | None) -> float | None:
    """Predicted over measured minus one; None unless both are known and positive."""
    if not predicted_s or not measured_s:
        return None
    return predicted_s / measured_s - 1


def _side(timeline: Timeline | None, batch: int | None) -> dict[str, object]:
    step_s = None if timeline is None else timeline.step_time_s
    rate = {} if batch is None else {"throughput_samples_per_s": batch / step_s if step_s else None}
    uses = () if timeline is None else timeline.devices
    return {
        "step_time_s": step_s,
        **rate,
        "devices": {
            use.device: {
                "utilization": use.utilization,
                "peak_memory_bytes": use.peak_memory_bytes,
                "sent_bytes": use.sent_bytes,
            }
            for use in uses
        },
    }
