"""Segmentation for messages whose time is not an overhead and a time a byte.

Where a connection starts slowly or its rate depends on the size, the arrival of a segment depends on which
segments came before, and the threshold method of ``chain.py`` is not exact any more. Here all pairs (link
free at, compute done at) are kept with which a prefix of the layers can end and that no other pair beats in
both: later segments only profit from earlier times, so a pair that is beaten never comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from spanwise.core.errors import InputError
from spanwise.planner.segments.chain import Ends, Segmentation, check_ends, remaining

MessageNs = Callable[[int, int], int]  # time of one message with layers [start, stop)


class _Label(NamedTuple):
    """A way in which the first layers may end, and the one that it extends."""

    free: int
    done: int
    layers: int
    before: _Label | None


def makespan_under_ns(message_ns: MessageNs, compute_ns: Sequence[int], ends: Ends) -> int:
    """When pulls and forward, or backward and pushes, end under these segments.

    Raises:
        PlanError: the segments do not cover the layers.
    """
    check_ends(ends, len(compute_ns))
    free = done = 0
    for start, stop in zip((0, *ends[:-1]), ends, strict=True):
        free += message_ns(start, stop)
        done = max(done, free) + sum(compute_ns[start:stop])
    return done


def best_segments_under(message_ns: MessageNs, compute_ns: Sequence[int]) -> Segmentation:
    """The segmentation that ends first for any time of messages; exact.

    Pairs with which even the bare compute that is left ends later than one message for everything, or than a
    message for each layer, are dropped at once.

    Raises:
        InputError: there is no layer, or a time is negative.
    """
    layers = len(compute_ns)
    if not layers or min(compute_ns) < 0:
        raise InputError(
            f"segments: compute times {tuple(compute_ns)} ns; give one of at least 0 for every layer"
        )
    left = remaining(compute_ns)
    most = min(makespan_under_ns(message_ns, compute_ns, ends) for ends in _plain(layers))
    labels = [[_Label(0, 0, 0, None)]]
    for stop in range(1, layers + 1):
        reached: list[_Label] = []
        for start in range(stop):
            seconds = message_ns(start, stop)
            if seconds < 0:
                raise InputError(
                    f"segments: a message with layers [{start}:{stop}) takes {seconds} ns; "
                    "times must not be negative"
                )
            compute = left[start] - left[stop]
            for label in labels[start]:
                free = label.free + seconds
                done = max(label.done, free) + compute
                if done + left[stop] <= most:
                    reached.append(_Label(free, done, stop, label))
        labels.append(_undominated(reached))
    best = labels[-1][-1]
    return Segmentation(_ends(best), best.done)


def _plain(layers: int) -> tuple[Ends, Ends]:
    return (layers,), tuple(range(1, layers + 1))


def _undominated(labels: list[_Label]) -> list[_Label]:
    """By rising time of the link, falling time of compute."""
    out: list[_Label] = []
    for label in sorted(labels, key=lambda entry: (entry.free, entry.done)):
        if not out or label.done < out[-1].done:
            out.append(label)
    return out


def _ends(label: _Label) -> Ends:
    found: list[int] = []
    at: _Label | None = label
    while at is not None and at.layers:
        found.append(at.layers)
        at = at.before
    return tuple(reversed(found))
