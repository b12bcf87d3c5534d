"""Devices of one machine: compute is as dear as the others are busy."""

from __future__ import annotations

import pytest

from simulator_cases import B, F, chain, make, run, times, two
from spanwise.core.profile import Profile


def shared(profile: Profile, alone: float) -> Profile:
    devices = tuple(entry.model_copy(update={"alone": alone}) for entry in profile.devices)
    return profile.model_copy(update={"devices": devices})


def test_one_device_at_work_pays_nothing_for_the_others() -> None:
    graph, cluster = chain(1), two()
    plan = make(graph, [("a:1", 1)], sources="a:1")
    profile = times(graph, cluster)
    assert run(plan, graph, profile, cluster).step_time_s == pytest.approx(F + B)
    assert run(plan, graph, shared(profile, 0.8), cluster).step_time_s == pytest.approx(0.8 * (F + B))


def test_all_at_work_all_the_time_pay_in_full() -> None:
    graph, cluster = chain(1), two()
    plan = make(graph, [("a:1 b:1", 1)], sources="a:1 b:1")
    profile = times(graph, cluster)
    full = run(plan, graph, profile, cluster).step_time_s
    assert run(plan, graph, shared(profile, 0.8), cluster).step_time_s == pytest.approx(full)


def test_what_is_paid_grows_with_how_busy_the_others_are() -> None:
    """Two stages, one micro-batch: each device rests while the other works, so half of the extra is paid."""
    graph, cluster = chain(2), two()
    plan = make(graph, [("a:1", 1), ("b:1", 1)], sources="a:1")
    profile = times(graph, cluster)
    full = run(plan, graph, profile, cluster).step_time_s
    assert full == pytest.approx(2 * (F + B))
    assert run(plan, graph, shared(profile, 0.8), cluster).step_time_s == pytest.approx(0.9 * full)


def test_messages_and_updates_are_compute_too() -> None:
    graph, cluster = chain(2, parameter_bytes=1000), two()
    plan = make(graph, [("a:1", 1), ("b:1", 1)], sources="a:1")
    profile = times(graph, cluster, message_s=0.5, update_s_per_byte=1e-3)
    full = run(plan, graph, profile, cluster).step_time_s
    assert run(plan, graph, shared(profile, 0.999999), cluster).step_time_s == pytest.approx(full, rel=1e-4)
    assert run(plan, graph, shared(profile, 0.5), cluster).step_time_s < 0.8 * full
