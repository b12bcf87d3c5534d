from __future__ import annotations

import pytest

from spanwise.core.errors import InputError
from spanwise.core.timeline import DeviceUse, Span, Timeline

USE = DeviceUse(device="a", busy_s=1, utilization=0.5, peak_memory_bytes=7, sent_bytes=3)


def test_a_span_has_a_length() -> None:
    assert Span(lane="a>b", kind="send", action="x", start_s=1.5, end_s=4).seconds == 2.5


def test_use_of_a_device() -> None:
    timeline = Timeline(origin="simulated", step_time_s=2, devices=(USE,))
    assert timeline.device("a") == USE
    idle = timeline.device("b")
    assert (idle.device, idle.busy_s, idle.utilization, idle.peak_memory_bytes, idle.sent_bytes) == (
        "b",
        0,
        0,
        0,
        0,
    )


@pytest.mark.parametrize(
    "change", [{"origin": "guessed"}, {"step_time_s": -1}, {"step_time_s": float("nan")}]
)
def test_rules(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        Timeline.parse({"origin": "measured", "step_time_s": 1, **change})
