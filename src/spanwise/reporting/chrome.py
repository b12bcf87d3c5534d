"""Timelines as a Chrome trace, to be opened in Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Sequence

from spanwise.core.timeline import MemoryPoint, Span, Timeline

_US = 1e6


def chrome_trace(timelines: Sequence[Timeline]) -> dict[str, object]:
    """One process per timeline, one thread per lane, times in microseconds, memory as counters.

    Spans of a lane that overlap without nesting would be dropped by viewers, so they go to a further
    thread of the same name. Format: "Trace Event Format", Chromium project.
    """
    events: list[dict[str, object]] = []
    for pid, timeline in enumerate(timelines, start=1):
        events.append(_name("process_name", pid, 0, timeline.origin))
        events.append(_sort("process_sort_index", pid, 0, pid))
        tid = 0
        for lane, spans in _lanes(timeline.spans).items():
            for number, track in enumerate(_tracks(spans)):
                tid += 1
                events.append(
                    _name("thread_name", pid, tid, lane if number == 0 else f"{lane} ({number + 1})")
                )
                events.append(_sort("thread_sort_index", pid, tid, tid))
                events += [_complete(span, pid, tid) for span in track]
        events += [_counter(point, pid) for point in timeline.memory]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _sort(kind: str, pid: int, tid: int, index: int) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": {"sort_index": index}}


def _complete(span: Span, pid: int, tid: int) -> dict[str, object]:
    return {
        "ph": "X",
        "name": span.action if span.kind != "wait" else f"wait for {span.action}",
        "cat": span.kind,
        "pid": pid,
        "tid": tid,
        "ts": span.start_s * _US,
        "dur": span.seconds * _US,
        "args": {"step": span.step},
    }


def _counter(point: MemoryPoint, pid: int) -> dict[str, object]:
    return {
        "ph": "C",
        "name": f"memory {point.device}",
        "pid": pid,
        "tid": 0,
        "ts": point.at_s * _US,
        "args": {"bytes": point.bytes},
    }


def _lanes(spans: Sequence[Span]) -> dict[str, list[Span]]:
    """Devices first, then links, each in order of first mention."""
    lanes: dict[str, list[Span]] = {}
    for span in spans:
        lanes.setdefault(span.lane, []).append(span)
    return dict(sorted(lanes.items(), key=lambda item: ">" in item[0]))


def _tracks(spans: list[Span]) -> list[list[Span]]:
    """Spans spread over as few tracks as keep those of one track apart."""
    tracks: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s.start_s, s.end_s)):
        free = next((t for t in tracks if t[-1].end_s <= span.start_s + 1e-9), None)
        if free is None:
            tracks.append([span])
        else:
            free.append(span)
    return tracks
