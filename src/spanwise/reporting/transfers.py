"""Names for measured messages: a network sees bytes only, the Program knows what they were."""

from __future__ import annotations

import re
from itertools import groupby

from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.program import Action
from spanwise.core.timeline import Span, Timeline
from spanwise.lowering import lower

_BYTES = re.compile(r"(\d+)B")


def name_transfers(timeline: Timeline, plan: Plan, graph: ModelGraph) -> Timeline:
    """The timeline with each bare message (``1024B`` on a link lane) under the action that sent it.

    Messages of a lane arrive in the order in which they were sent, so the k-th message of a size is the k-th
    send of that size in the Program. Where their numbers differ (a step recorded in part), only the payload
    is named, and only if it is the same for all. What is left between the members of a sync is their gradient
    sum; anything else keeps its bytes.
    """
    if all(_size(span) is None for span in timeline.spans):
        return timeline
    told = _own_step(timeline.spans)
    bare = [span for span in told if _size(span) is not None]
    sends = _sends(plan, graph)
    names: dict[int, tuple[str, str]] = {}
    bare.sort(key=lambda s: (*_key(s), s.start_s))
    for (_, lane, nbytes), group in groupby(bare, key=_key):
        spans = list(group)
        for span, name in zip(spans, _names(lane, nbytes, len(spans), sends, plan), strict=True):
            names[id(span)] = name
    renamed = (
        s.model_copy(update=dict(zip(("kind", "action"), names[id(s)], strict=True))) if id(s) in names else s
        for s in told
    )
    return timeline.model_copy(update={"spans": tuple(renamed)})


def _size(span: Span) -> int | None:
    match = _BYTES.fullmatch(span.action) if ">" in span.lane else None
    return None if match is None else int(match.group(1))


def _own_step(spans: tuple[Span, ...]) -> list[Span]:
    """Messages that left before their sender ended a step, but arrived after it, belong to that step."""
    ends: dict[tuple[str, int], float] = {}
    for span in spans:
        if ">" not in span.lane:
            key = span.lane, span.step
            ends[key] = max(span.end_s, ends.get(key, span.end_s))

    def late(span: Span) -> bool:
        before = ends.get((span.lane.partition(">")[0], span.step - 1))
        return _size(span) is not None and before is not None and span.start_s < before

    return [s.model_copy(update={"step": s.step - 1}) if late(s) else s for s in spans]


def _key(span: Span) -> tuple[int, str, int]:
    return span.step, span.lane, _size(span) or 0


def _sends(plan: Plan, graph: ModelGraph) -> dict[tuple[str, int], list[Action]]:
    """Sends of a step by lane and size, in program order."""
    out: dict[tuple[str, int], list[Action]] = {}
    for device, actions in lower(plan, graph).devices.items():
        for action in actions:
            if action.kind == "send":
                out.setdefault((f"{device}>{action.peer}", action.nbytes), []).append(action)
    return out


def _names(
    lane: str, nbytes: int, count: int, sends: dict[tuple[str, int], list[Action]], plan: Plan
) -> list[tuple[str, str]]:
    """Kind and action text of each of ``count`` messages."""
    known = sends.get((lane, nbytes), [])
    if len(known) == count:
        return [("send", str(action)) for action in known]
    payloads = {action.payload for action in known}
    if len(payloads) == 1:
        return [("send", f"{payloads.pop()} {nbytes}B")] * count
    ends = set(lane.split(">"))
    if not known and any(ends <= set(sync.devices) for sync in plan.syncs):
        return [("reduce", f"part of a gradient sum {nbytes}B")] * count
    return [("transfer", f"{nbytes}B")] * count
