"""Receives are posted ahead, into the next step only where there is one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from plan_cases import chain
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.lowering import lower
from spanwise.runtime.exchange import Exchange
from spanwise.runtime.inbox import Inbox
from spanwise.runtime.parts import DeviceParts
from spanwise.runtime.tags import STEP_TAGS, Tags
from spanwise.runtime.transport import Tensors

ROWS, MICRO_BATCHES = 2, 6


class Done:
    def wait(self, timeout_s: float) -> None:
        """At once."""


@dataclass
class Posted:
    """A Transport that notes what is received."""

    tags: list[int] = field(default_factory=list[int])
    buffers: list[Tensors] = field(default_factory=list[Tensors])

    def send(self, peer: str, tag: int, tensors: Tensors) -> Done:
        raise AssertionError((peer, tag, tensors))

    def recv(self, peer: str, tag: int, buffers: Tensors) -> Done:
        assert peer == "camera"
        self.tags.append(tag)
        self.buffers.append(buffers)
        return Done()

    def close(self) -> None: ...


def inbox() -> tuple[Inbox, Posted, Tags, list[int]]:
    """Of a device that computes all, with the rows on another; its receives in the order of their need."""
    graph = chain(2)
    plan = Plan(
        strategy="test", graph_digest=graph.digest, micro_batches=MICRO_BATCHES, micro_batch_rows=ROWS,
        sources=(Replica(device="camera", rows=ROWS),),
        stages=(Stage(start=0, stop=2, replicas=(Replica(device="box", rows=ROWS),)),),
    )  # fmt: skip
    program = lower(plan, graph)
    tags, posted = Tags.of(program), Posted()
    exchange = Exchange("box", plan, program, {}, None)
    parts = DeviceParts("box", {}, {}, None)
    wanted = [a.transfer for a in program.devices["box"] if a.kind == "recv"]
    return Inbox(parts, plan, graph, program, posted, exchange, tags), posted, tags, wanted


def take_all(box: Inbox, wanted: list[int]) -> None:
    actions = {a.transfer: a for a in box._recvs}  # pyright: ignore[reportPrivateUsage]
    for transfer in wanted:
        receipt = box.take(actions[transfer])
        assert receipt is not None
        receipt.pending.wait(1.0)
        box.post()


def test_a_few_are_posted_at_once_and_the_next_steps_when_all_of_this_one_are() -> None:
    box, posted, tags, wanted = inbox()
    box.begin(3, more=True)
    assert posted.tags == [3 * tags.stride + t for t in wanted[: len(posted.tags)]]
    few = len(posted.tags)
    assert few < len(wanted)
    take_all(box, wanted)
    assert posted.tags[len(wanted) :] == [4 * tags.stride + t for t in wanted[:few]]
    box.begin(4, more=False)
    take_all(box, wanted)
    # Nothing twice, and nothing for a step that may never come.
    assert posted.tags == [step * tags.stride + t for step in (3, 4) for t in wanted]
    assert len(set(posted.tags)) == len(posted.tags)


def test_rows_that_come_early_are_not_those_of_this_step() -> None:
    box, posted, _, wanted = inbox()
    box.begin(0, more=True)
    take_all(box, wanted)
    for number, buffers in enumerate(posted.buffers):
        for buffer in buffers:
            buffer.fill_(float(number))
    now = box.whole("input", -1, 0)
    box.begin(1, more=False)
    then = box.whole("input", -1, 0)
    assert torch.equal(now[0], torch.zeros_like(now[0]))
    assert torch.equal(then[0], torch.full_like(then[0], float(len(wanted))))


def test_numbers_come_again_long_after_their_messages_are_done_and_are_never_those_of_moves() -> None:
    _, _, tags, _ = inbox()
    turn = STEP_TAGS // tags.stride
    for step in (0, 1, turn - 1, turn, 10**9):
        found = [tags.tag(s, number) for s in (step, step + 1) for number in range(tags.stride)]
        assert len(set(found)) == len(found)
        assert 0 <= min(found) <= max(found) < STEP_TAGS
    assert tags.tag(turn - 1, 0) > tags.tag(turn, 0) == tags.tag(0, 0)
