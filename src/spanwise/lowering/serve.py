"""Parameter servers: what travels to and from them, and what they do in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.program import Action, Buckets, SegmentPayload
from spanwise.core.syncs import ServerSync
from spanwise.lowering.order import StageOp
from spanwise.lowering.syncs import Segments, pulled

Key = tuple[str, int, int, str, str]  # payload, stage or sync, micro-batch or segment, from, to


class Turn(NamedTuple):
    """What a server does with a segment: takes all gradients in, updates, or sends parameters."""

    kind: Literal["collect", "update", "send"]
    segment: int


def turns(sync: ServerSync, pushes: Segments, pulls: Segments) -> tuple[list[Turn], list[Turn]]:
    """What the server does in order, before and after the moment when it has all gradients.

    Pushes come in backward order. As aggregated: a segment is updated when it is in, and of the pulls those
    are sent that are next in order and wholly updated. Else each pull is sent after the updates it needs.
    """
    segments = [g for g in reversed(range(len(pushes))) if pushes[g]]
    waiting = [g for g in sync.order if pulls[g]]
    if not sync.as_aggregated:
        home = {name: g for g in segments for name in pushes[g]}
        open_ = set(segments)
        late: list[Turn] = []
        for pull in waiting:
            needed = sorted({home[name] for name in pulls[pull]} & open_)
            late += [*(Turn("update", g) for g in needed), Turn("send", pull)]
            open_.difference_update(needed)
        return [Turn("collect", g) for g in segments], late
    out: list[Turn] = []
    done: set[str] = set()
    for segment in segments:
        out += [Turn("collect", segment), Turn("update", segment)]
        done.update(pushes[segment])
        while waiting and done.issuperset(pulls[waiting[0]]):
            out.append(Turn("send", waiting.pop(0)))
    return out, []


class Serving:
    """The actions of pushes, pulls and updates; ``number`` gives both ends of a transfer the same number."""

    def __init__(self, plan: Plan, graph: ModelGraph, buckets: Buckets, number: Callable[[Key], int]) -> None:
        self.pulled = pulled(plan, graph, buckets)
        self._plan, self._buckets, self._number = plan, buckets, number
        self._users = graph.users
        self._sizes = {p.name: p.bytes for p in graph.parameters}
        self._served = {y: sync for y, sync in enumerate(plan.syncs) if isinstance(sync, ServerSync)}

    def push(self, device: str, number: int, segment: int) -> Action:
        """A device's gradients of a segment on their way to the server."""
        return self._exchange("send", "push", device, number, segment, self._served[number].server)

    def pulls(self, device: str, order: tuple[StageOp, ...]) -> dict[int, list[Action]]:
        """By position in a device's compute order: what it must have pulled before.

        Messages are taken in as the server sends them, so one that is needed later may come before.
        """
        first = {op.stage: at for at, op in reversed(list(enumerate(order))) if op.kind == "forward"}
        out: dict[int, list[Action]] = {}
        for number, sync in self._served.items():
            if device not in sync.clients:
                continue
            needed = len(order)
            for segment in reversed(sync.order):
                names = self.pulled[number][segment]
                if names:
                    needed = min(needed, *(at for stage, at in first.items() if self._uses(stage, names)))
                    pull = self._exchange("recv", "pull", device, number, segment, sync.server)
                    out.setdefault(needed, []).insert(0, pull)
        return out

    def served(self, device: str) -> tuple[list[Action], list[Action]]:
        """What a device does as a server, before and after the norm of all gradients."""
        before: list[Action] = []
        after: list[Action] = []
        for number, sync in self._served.items():
            if sync.server == device:
                found = turns(sync, self._buckets[number], self.pulled[number])
                for actions, part in zip((before, after), found, strict=True):
                    actions += [action for turn in part for action in self._turn(number, sync, turn)]
        return before, after

    def _uses(self, stage: int, names: tuple[str, ...]) -> bool:
        start, stop = self._plan.stages[stage].start, self._plan.stages[stage].stop
        return any(start <= layer < stop for name in names for layer in self._users[name])

    def _turn(self, number: int, sync: ServerSync, turn: Turn) -> list[Action]:
        match turn.kind:
            case "collect":
                kind, payload = "recv", "push"
            case "send":
                kind, payload = "send", "pull"
            case "update":
                nbytes = sum(self._sizes[name] for name in self._buckets[number][turn.segment])
                return [Action("update", sync=number, segment=turn.segment, nbytes=nbytes)]
        return [
            self._exchange(kind, payload, sync.server, number, turn.segment, peer) for peer in sync.clients
        ]

    def _exchange(
        self, kind: Literal["send", "recv"], payload: SegmentPayload, device: str, number: int, segment: int,
        peer: str,
    ) -> Action:  # fmt: skip
        """One end of a push or pull."""
        names = (self._buckets if payload == "push" else self.pulled)[number][segment]
        ends = (device, peer) if kind == "send" else (peer, device)
        return Action(
            kind, payload=payload, peer=peer, transfer=self._number((payload, number, segment, *ends)),
            nbytes=sum(self._sizes[name] for name in names), sync=number, segment=segment,
        )  # fmt: skip
