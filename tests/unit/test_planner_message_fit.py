"""Overhead and rate of a link from its own messages, on links whose truth is known."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest

from spanwise.core.observed import Arrival, Departure, DeviceStep, least_large, noted
from spanwise.planner.adapting.message_fit import KEPT_OF_SIZE, LinkMessages, MessageFit, fit_messages
from spanwise.planner.adapting.ratios import Message, link_messages

OVERHEAD_S, RATE = 0.005, 125e6  # 1 Gbit/s
SIZES = (20_000, 100_000, 1_000_000, 10_000_000)


def seen(
    sizes: list[int], seed: int, *, noise: float = 0.05, overhead: float = OVERHEAD_S, rate: float = RATE
) -> list[Message]:
    r = random.Random(seed)
    return [Message(n, (overhead + n / rate) * max(0.2, r.gauss(1.0, noise))) for n in sizes]


def test_exact_times_give_exact_numbers() -> None:
    fit = fit_messages(seen([1000, 200_000, 3_000_000, 50_000, 9_000], 0, noise=0.0))
    assert fit is not None
    assert fit.trusted
    assert fit.overhead_s == pytest.approx(OVERHEAD_S, rel=1e-9)
    assert fit.bytes_per_s == pytest.approx(RATE, rel=1e-9)
    assert fit.seconds(125_000) == pytest.approx(0.006)


@pytest.mark.parametrize("overhead", [0.0, 0.001, 0.005, 0.02])
def test_sizes_that_differ_are_trusted_and_right(overhead: float) -> None:
    errors: list[tuple[float, float]] = []
    for seed in range(100):
        fit = fit_messages(seen(list(SIZES) * 5, seed, overhead=overhead))
        assert fit is not None
        assert fit.trusted
        assert fit.overhead_s >= 0
        errors.append((abs(fit.overhead_s - overhead), abs(fit.bytes_per_s / RATE - 1)))
    assert median(e for e, _ in errors) <= max(0.05 * overhead, 2e-5)
    assert median(e for _, e in errors) < 0.03
    assert max(e for e, _ in errors) <= max(0.25 * overhead, 1e-4)


def test_hiccups_do_not_move_the_fit() -> None:
    """A fifth of the messages take up to ten times as long. Control: plain least squares is far off."""
    off: list[float] = []
    for seed in range(50):
        r = random.Random(seed)
        messages = [
            Message(m.nbytes, m.seconds * (r.uniform(2, 10) if i % 5 == 2 else 1))
            for i, m in enumerate(seen(list(SIZES) * 8, seed))
        ]
        fit = fit_messages(messages)
        assert fit is not None
        assert fit.overhead_s == pytest.approx(OVERHEAD_S, rel=0.15)
        assert fit.bytes_per_s == pytest.approx(RATE, rel=0.15)
        off.append(abs(plain_rate(messages) / RATE - 1))
    assert median(off) > 0.4


def plain_rate(messages: list[Message]) -> float:
    mean_n = sum(m.nbytes for m in messages) / len(messages)
    mean_s = sum(m.seconds for m in messages) / len(messages)
    return sum((m.nbytes - mean_n) ** 2 for m in messages) / sum(
        (m.nbytes - mean_n) * (m.seconds - mean_s) for m in messages
    )


@pytest.mark.parametrize(("spread", "least", "most"), [(0.05, 0.0, 0.05), (0.3, 0.0, 0.1), (0.9, 0.1, 0.9)])
def test_sizes_that_are_alike_are_not_trusted(spread: float, least: float, most: float) -> None:
    """Twelve messages around 10 MB: what is trusted is right, and what is not keeps what was believed."""
    trusted = 0
    for seed in range(200):
        r = random.Random(seed)
        sizes = [round(1e7 * r.uniform(1 - spread, 1 + spread)) for _ in range(12)]
        fit = fit_messages(seen(sizes, seed), believed_overhead_s=0.004)
        assert fit is not None
        trusted += fit.trusted
        if not fit.trusted:
            assert fit.overhead_s == 0.004
            assert fit.bytes_per_s == pytest.approx(RATE, rel=0.15)
    assert least * 200 <= trusted <= most * 200


def test_a_few_small_messages_make_the_overhead_known() -> None:
    for seed in range(50):
        fit = fit_messages(seen([10_000_000] * 12 + [4096] * 3, seed))
        assert fit is not None
        assert fit.trusted
        assert fit.overhead_s == pytest.approx(OVERHEAD_S, rel=0.2)


def test_few_or_odd_messages() -> None:
    assert fit_messages([]) is None
    assert fit_messages([Message(0, 1.0)]) is None
    assert fit_messages([Message(1000, math.nan), Message(1000, math.inf)]) is None
    assert fit_messages([Message(1000, 0.001)]) == MessageFit(0.0, pytest.approx(1e6), trusted=False)
    # The believed overhead is more than a message takes: half of that is left to its bytes.
    fit = fit_messages([Message(1000, 0.001)], believed_overhead_s=1.0)
    assert fit == MessageFit(0.0005, pytest.approx(2e6), trusted=False)
    # Large ones are no slower than small ones, and some took no time at all.
    for messages in ([Message(n, 0.01) for n in SIZES], [Message(n, 0.0) for n in SIZES]):
        fit = fit_messages(messages)
        assert fit is not None
        assert math.isfinite(fit.bytes_per_s)
        assert fit.bytes_per_s > 0
        assert fit.overhead_s >= 0


def follow(link: LinkMessages, steps: int, sizes: tuple[int, ...], seed: int, rate: float = RATE) -> None:
    for step in range(steps):
        link.add(seen(list(sizes), 1000 * seed + step, rate=rate), 0.5)


def test_old_messages_of_other_sizes_stay() -> None:
    """Probes at first, then large messages only: the overhead is still known after many of these."""
    link = LinkMessages()
    follow(link, 4, SIZES, 1)
    follow(link, 100, (10_000_000, 10_000_000), 2)
    assert link.fit is not None
    assert link.fit.trusted
    assert link.fit.overhead_s == pytest.approx(OVERHEAD_S, rel=0.1)
    assert sum(map(len, link._kept.values())) <= KEPT_OF_SIZE * len(SIZES)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_link_that_moves_is_followed_within_a_few_steps(factor: float) -> None:
    """What was seen before is forgotten; the overhead is kept until the sizes tell a new one."""
    link = LinkMessages()
    follow(link, 20, SIZES, 1)
    follow(link, 6, (10_000_000, 9_000_000), 2, rate=RATE * factor)
    assert link.fit is not None
    assert link.fit.bytes_per_s == pytest.approx(RATE * factor, rel=0.15)
    assert link.fit.overhead_s == pytest.approx(OVERHEAD_S, rel=0.25)


def test_noise_is_no_move() -> None:
    link = LinkMessages()
    follow(link, 60, SIZES, 3)
    assert sum(map(len, link._kept.values())) == KEPT_OF_SIZE * len(SIZES)
    link.add([], 0.5)
    assert link.fit is not None


def test_messages_of_a_run_are_what_is_fitted() -> None:
    """Handed over at once, they follow each other: each has the link for its own time only."""
    latency, at, sent, came = 0.003, 0.0, [], []
    for tag, nbytes in enumerate((*SIZES, *SIZES)):
        at += OVERHEAD_S + nbytes / RATE
        sent.append(Departure("server", tag, nbytes, 0.0))
        came.append(Arrival("cam", tag, at + latency, True))
    steps = (DeviceStep("cam", sent=tuple(sent)), DeviceStep("server", received=tuple(came)))
    messages = link_messages(steps, {("cam", "server"): latency})
    assert set(messages) == {("cam", "server")}
    fit = fit_messages(messages["cam", "server"])
    assert fit is not None
    assert fit.trusted
    assert fit.overhead_s == pytest.approx(OVERHEAD_S)
    assert fit.bytes_per_s == pytest.approx(RATE)


@pytest.mark.parametrize("small", [True, False])
def test_what_devices_report_of_steps_tells_overhead_from_rate(small: bool) -> None:
    """Activations and small messages beside them. Control: of the large ones alone no fit is sure."""
    sizes = [10_000_000, 20_000, 9_000_000, 300_000, 10_000_000]
    link = LinkMessages()
    for step in range(8):
        times = [m.seconds for m in seen(sizes, step)]
        least = 0 if small else least_large(sizes)
        chosen = [tag for tag in noted(enumerate(sizes)) if sizes[tag] >= least]
        ends = [sum(times[: tag + 1]) + 0.1 * tag for tag in range(len(sizes))]
        sent = tuple(Departure("server", tag, sizes[tag], ends[tag] - times[tag]) for tag in sorted(chosen))
        came = tuple(Arrival("cam", tag, ends[tag], True) for tag in sorted(chosen))
        steps = (DeviceStep("cam", sent=sent), DeviceStep("server", received=came))
        link.add(link_messages(steps, {})["cam", "server"], 1.0)
    assert link.fit is not None
    assert link.fit.trusted == small
    if small:
        assert link.fit.overhead_s == pytest.approx(OVERHEAD_S, rel=0.1)
        assert link.fit.bytes_per_s == pytest.approx(RATE, rel=0.1)
