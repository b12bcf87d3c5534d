"""Plans and Programs over a parameter server: what is refused, and that each rule of the proof bites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from typing import Any

import pytest

from plan_cases import chain, plan, stage
from segment_cases import cut_sets
from server_cases import served, server_plan, star
from spanwise.core.errors import InputError, PlanError
from spanwise.core.plan import Plan
from spanwise.core.program import Action, Program
from spanwise.core.syncs import ServerSync
from spanwise.lowering import check, lower, moves
from spanwise.planner.segments.chain import Cuts

GRAPH, TIED = chain(4), chain(4, tied=(0, 3))
ROWS = {"d0": 3, "d1": 5}
SYNC = served(ROWS, Cuts((1, 3, 4), (2, 4)))
PLAN = server_plan(GRAPH, ROWS, SYNC)
EARLY = server_plan(GRAPH, ROWS, served(ROWS, Cuts((1, 4), (2, 4)), order=(1, 0)))


def sync(**more: Any) -> ServerSync:
    return ServerSync.parse({**SYNC.to_data(), **more})


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"pushes": [2, 2, 4]}, "push segments of layers from 0 on end at 2, 2, 4; ends must rise"),
        ({"pulls": [0, 4], "order": [0, 1]}, "pull segments .* ends must rise, each segment holds a layer"),
        ({"start": 2, "pulls": [4], "order": [0]}, "push segments of layers from 2 on end at 2, 4"),
        ({"pushes": [2, 3]}, "pushes end at layer 3, pulls at 4; all layers travel both ways"),
        ({"order": [0, 1]}, "order 0, 1 of 3 pulls; it must have each of them once"),
        ({"order": [0, 1, 1]}, "it must have each of them once"),
        ({"devices": ["d0", "d0"]}, "server 's' lists a device twice: d0, d0"),
        ({"devices": ["s"]}, "serves nobody but itself"),
    ],
)
def test_segments_that_are_none_are_refused(more: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        sync(**more)


@pytest.mark.parametrize("more", [{"pushes": []}, {"pulls": [], "order": []}, {"devices": []}])
def test_no_layers_and_no_devices_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least 1 item"):
        sync(**more)


def with_syncs(*found: ServerSync) -> Plan:
    return Plan.parse({**PLAN.to_data(), "syncs": found})


def test_a_layer_has_one_server() -> None:
    first = sync(server="t", pushes=[3], pulls=[3], order=[0])
    with pytest.raises(PlanError, match=r"layer 2 is served by 't' and by 's'; a layer has one server"):
        with_syncs(first, sync(start=2, pushes=[4], pulls=[4], order=[0]))
    both = with_syncs(first, sync(start=3, pushes=[4], pulls=[4], order=[0]))
    assert lower(both, GRAPH).owned == {"d0": (), "d1": (), "t": ("w0", "w1", "w2"), "s": ("w3",)}


def test_a_server_serves_layers_that_there_are_and_devices_that_hold_them() -> None:
    with pytest.raises(PlanError, match=r"serves layers \[0:9\) of 4"):
        with_syncs(sync(pushes=[9], pulls=[9], order=[0]))
    with pytest.raises(PlanError, match=r"sync 0 over d0 covers no parameter that exactly these devices"):
        lower(with_syncs(sync(devices=["d0"])), GRAPH)
    with pytest.raises(PlanError, match=r"'w3' is held by d0, d1 and no sync sums its gradient"):
        lower(with_syncs(sync(pushes=[3], pulls=[3], order=[0])), GRAPH)


def test_a_clipped_norm_needs_all_gradients_first() -> None:
    with pytest.raises(PlanError, match="clip_norm needs all gradients first"):
        lower(EARLY, GRAPH, clip=True)
    assert "norm over s" in str(lower(PLAN, GRAPH, clip=True))


def test_every_segmentation_order_and_server_passes_the_proof() -> None:
    """Tied weights included; every parameter goes once each way, with its first layer."""
    every = tuple(parameter.name for parameter in TIED.parameters)
    for push, pull in product(cut_sets(4), cut_sets(4)):
        orders = [None, *permutations(range(len(pull)))] if len(pull) < 4 else [None, (3, 1, 0, 2)]
        for order, server in product(orders, ("s", "d1")):
            found = server_plan(TIED, ROWS, served(ROWS, Cuts(pull, push), order=order, server=server))
            program = lower(found, TIED, clip=order is None)
            assert program.updated[server] == every
            for segments in (program.buckets[0], program.pulled[0]):
                assert sorted(name for names in segments for name in names) == sorted(every)


def test_parts_without_parameters_do_not_travel() -> None:
    bare = GRAPH.model_copy(
        update={"layers": (*GRAPH.layers[:3], GRAPH.layers[3].model_copy(update={"parameters": ()}))}
    )
    found = server_plan(bare, ROWS, served(ROWS, Cuts((3, 4), (1, 3, 4))))
    program = lower(found, bare)
    assert [a.segment for a in program.devices["d0"] if a.payload == "push"] == [1, 0]
    assert [a.segment for a in program.devices["d0"] if a.payload == "pull"] == [0]


def edited(found: Plan, device: str, edit: Callable[[list[Action]], None]) -> Program:
    program = lower(found, GRAPH)
    actions = list(program.devices[device])
    edit(actions)
    return replace(program, devices={**program.devices, device: tuple(actions)})


def at(actions: list[Action], text: str) -> int:
    return next(i for i, action in enumerate(actions) if str(action).startswith(text))


def moved(text: str, before: str) -> Callable[[list[Action]], None]:
    def edit(actions: list[Action]) -> None:
        action = actions.pop(at(actions, text))
        actions.insert(at(actions, before), action)

    return edit


def without(text: str) -> Callable[[list[Action]], None]:
    return lambda actions: actions.__delitem__(at(actions, text))


@pytest.mark.parametrize(
    ("found", "device", "edit", "why"),
    [
        (PLAN, "d0", moved("send push y0.1", "backward s2"), "stands in the wrong place"),
        (PLAN, "d0", moved("forward s1", "recv pull y0.1"), "'recv pull y0.1 .* stands in the wrong place"),
        (PLAN, "s", moved("update y0.0", "recv push y0.0"), "'recv push y0.0 .* stands in the wrong place"),
        (PLAN, "s", moved("send pull y0.0 to d1", "update y0.0"), "stands in the wrong place"),
        (PLAN, "s", without("update y0.1"), "stands in the wrong place|lacks 'update"),
        (PLAN, "s", without("send pull y0.2"), "'recv pull y0.2 .* on d0 has no send on s"),
        (PLAN, "d1", without("recv pull y0.0"), "has no receive on d1"),
        (EARLY, "s", moved("send pull y0.1", "update y0.1"), "stands in the wrong place"),
    ],
)
def test_each_rule_of_the_proof_bites(
    found: Plan, device: str, edit: Callable[[list[Action]], None], why: str
) -> None:
    check(lower(found, GRAPH), found, GRAPH)
    with pytest.raises(PlanError, match=why):
        check(edited(found, device, edit), found, GRAPH)


def test_a_segment_that_travels_twice_or_with_other_bytes_is_refused() -> None:
    program = lower(PLAN, GRAPH)
    push = next(a for a in program.devices["d0"] if a.payload == "push")
    again = [push._replace(transfer=99), push._replace(transfer=99, kind="recv", peer="d0")]
    doubled = {d: (*a, again[0]) if d == "d0" else (*a, again[1]) if d == "s" else a
               for d, a in program.devices.items()}  # fmt: skip
    with pytest.raises(PlanError, match="is sent twice"):
        check(replace(program, devices=doubled), PLAN, GRAPH)
    smaller = {
        d: tuple(a._replace(nbytes=1) if a.transfer == push.transfer else a for a in actions)
        for d, actions in program.devices.items()
    }
    with pytest.raises(PlanError, match="has 28 bytes there"):
        check(replace(program, devices=smaller), PLAN, GRAPH)


def test_a_segment_that_does_not_travel_is_missed() -> None:
    program = lower(PLAN, GRAPH)
    gone = next(a.transfer for a in program.devices["d1"] if str(a).startswith("recv pull y0.1"))
    left = {d: tuple(a for a in actions if a.transfer != gone) for d, actions in program.devices.items()}
    with pytest.raises(PlanError, match=r"pull y0\.1 from s to d1 is missing"):
        check(replace(program, devices=left), PLAN, GRAPH)


def test_the_norm_stands_before_every_update() -> None:
    program = lower(PLAN, GRAPH, clip=True)
    actions = list(program.devices["s"])
    actions.insert(at(actions, "send pull"), actions.pop(at(actions, "norm")))
    with pytest.raises(PlanError, match="'norm over s' on s stands in the wrong place"):
        check(replace(program, devices={**program.devices, "s": tuple(actions)}), PLAN, GRAPH)


def test_state_moves_to_and_from_the_server_and_copies_stay() -> None:
    """Between a ring and a server only optimizer state needs to move: who computes has the parameters."""
    cluster = star(2)
    ring = plan(GRAPH, stage(0, 4, "d0:3 d1:5"), micro_batches=1)
    names = tuple(p.name for p in GRAPH.parameters)
    there = moves(ring, PLAN, GRAPH, cluster)
    assert {move.target for move in there} == {"s"}
    assert sorted(name for move in there for name in move.parameters) == sorted(names)
    back = moves(PLAN, ring, GRAPH, cluster)
    assert [(move.source, move.target, move.parameters) for move in back] == [
        ("s", "d0", names), ("s", "d1", names),
    ]  # fmt: skip
    assert moves(PLAN, EARLY, GRAPH, cluster) == ()
