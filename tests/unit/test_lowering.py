from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from plan_cases import chain, plan, stage
from spanwise.core.errors import PlanError
from spanwise.core.plan import Plan, Replica, Stage, Sync
from spanwise.core.program import Action, Program
from spanwise.lowering import check, holders, lower, natural_syncs

GRAPH = chain(4)


def moves(program: Program, kind: str, payload: str) -> list[tuple[str, Action]]:
    return [(d, a) for d, actions in program.devices.items() for a in actions
            if a.kind == kind and a.payload == payload]  # fmt: skip


def kinds(program: Program, device: str) -> Counter[str]:
    return Counter(action.kind for action in program.devices[device])


@st.composite
def two_rows(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two ways to deal the same rows out to devices."""
    first = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    cuts = draw(st.sets(st.integers(1, max(1, sum(first) - 1)), max_size=4))
    edges = [0, *sorted(c for c in cuts if c < sum(first)), sum(first)]
    return first, [b - a for a, b in pairwise(edges)]


def owners(rows: list[int], prefix: str) -> list[str]:
    return [f"{prefix}{i}" for i, count in enumerate(rows) for _ in range(count)]


@given(two_rows(), st.booleans())
def test_rows_travel_between_uneven_stages_as_brute_force_says(
    rows: tuple[list[int], list[int]], shared: bool
) -> None:
    """Row by row: whoever has it sends it to whoever needs it, unless they are one device."""
    names = ("d", "d" if shared else "e")
    on = [" ".join(f"{p}{i}:{n}" for i, n in enumerate(r)) for p, r in zip(names, rows, strict=True)]
    program = lower(plan(GRAPH, stage(0, 2, on[0]), stage(2, 4, on[1]), micro_batches=1), GRAPH)
    before, after = (owners(r, p) for p, r in zip(names, rows, strict=True))
    expected = {(a, b, row) for row, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
    forth = {(d, a.peer, row) for d, a in moves(program, "send", "activation") for row in range(*a.rows)}
    back = {(a.peer, d, row) for d, a in moves(program, "send", "gradient") for row in range(*a.rows)}
    assert forth == expected
    assert back == expected
    for _, action in moves(program, "send", "activation"):
        assert action.nbytes == 16 * (action.rows[1] - action.rows[0])
    assert {
        (d, a.peer, row) for d, a in moves(program, "send", "label") for row in range(*a.rows)
    } == expected


def test_one_device_moves_nothing() -> None:
    program = lower(plan(GRAPH, stage(0, 4, "a:8", 2), micro_batches=3), GRAPH)
    assert kinds(program, "a") == {"load": 3, "forward": 3, "backward": 3, "step": 1}
    assert program.held == {"a": ("w0", "w1", "w2", "w3")}
    assert program.buckets == ()


def test_stages_on_one_device_need_no_transfer() -> None:
    program = lower(plan(GRAPH, stage(0, 1, "a:8", 2), stage(1, 4, "a:8")), GRAPH)
    assert kinds(program, "a") == {"load": 2, "forward": 4, "backward": 4, "step": 1}


def test_u_shape_keeps_samples_and_labels_at_home() -> None:
    program = lower(
        plan(GRAPH, stage(0, 1, "end:8", 2), stage(1, 3, "cloud:8", 2), stage(3, 4, "end:8")), GRAPH
    )
    assert not moves(program, "send", "input")
    assert not moves(program, "send", "label")
    assert kinds(program, "cloud") == {"recv": 4, "forward": 2, "send": 4, "backward": 2, "step": 1}


def test_a_source_that_computes_nothing_only_loads_and_sends() -> None:
    program = lower(plan(GRAPH, stage(0, 2, "a:8"), stage(2, 4, "b:8"), sources="d:5 a:3"), GRAPH)
    assert kinds(program, "d") == {"load": 2, "send": 4}
    assert {(a.payload, a.rows, a.peer) for a in program.devices["d"] if a.kind == "send"} == {
        ("input", (0, 5), "a"), ("label", (0, 5), "b")}  # fmt: skip
    assert program.held["d"] == ()


def test_a_model_without_labels_sends_none() -> None:
    graph = type(GRAPH).parse({**GRAPH.to_data(), "labels": []})
    program = lower(plan(graph, stage(0, 2, "a:8"), stage(2, 4, "b:8")), graph)
    assert not moves(program, "send", "label")


class TestSyncs:
    def test_replicas_sum_their_own_stage_only(self) -> None:
        found = plan(GRAPH, stage(0, 2, "a:3 b:5"), stage(2, 4, "c:8"))
        assert found.syncs == (Sync(layers=((0, 2),), devices=("a", "b")),)
        program = lower(found, GRAPH)
        assert program.buckets == ((("w0", "w1"),),)
        reduces = [a for a in program.devices["a"] if a.kind == "reduce"]
        assert [(a.sync, a.segment, a.nbytes, a.members) for a in reduces] == [(0, 0, 12, ("a", "b"))]

    def test_a_tied_weight_has_its_own_sync_over_both_stages(self) -> None:
        graph = chain(4, tied=(0, 3))
        stages = (stage(0, 2, "a:3 b:5"), stage(2, 4, "c:8"))
        assert holders(stages, graph)["w-tied"] == ("a", "b", "c")
        assert natural_syncs(stages, graph) == (
            Sync(layers=((0, 2),), devices=("a", "b")),
            Sync(layers=((0, 1), (3, 4)), devices=("a", "b", "c")),
        )
        program = lower(plan(graph, *stages), graph)
        assert program.buckets == ((("w0", "w1"),), (("w-tied",),))
        assert [a.sync for a in program.devices["c"] if a.kind == "reduce"] == [1]

    def test_a_tied_weight_inside_one_stage_needs_none(self) -> None:
        graph = chain(4, tied=(0, 1))
        assert natural_syncs((stage(0, 2, "a:8"), stage(2, 4, "b:8")), graph) == ()

    def test_segments_are_consecutive_and_about_equal(self) -> None:
        found = plan(GRAPH, stage(0, 4, "a:4 b:4"))
        for count, expected in (
            (2, (("w0", "w1", "w2"), ("w3",))),
            (99, (("w0",), ("w1",), ("w2",), ("w3",))),
        ):
            syncs = (found.syncs[0].model_copy(update={"segments": count}),)
            program = lower(found.model_copy(update={"syncs": syncs}), GRAPH)
            assert program.buckets == (expected,)

    def test_segments_by_layers_have_what_these_use_first(self) -> None:
        """A weight that layers 0 and 2 use has its gradient when layer 0 is done."""
        graph = chain(4, tied=(0, 2))
        found = plan(graph, stage(0, 4, "a:4 b:4"))
        for ends, expected in (
            ((4,), (("w-tied", "w0", "w1", "w2", "w3"),)),
            ((1, 2, 4), (("w-tied", "w0"), ("w1",), ("w2", "w3"))),
            ((2, 3, 4), (("w-tied", "w0", "w1"), ("w2",), ("w3",))),
        ):
            syncs = (found.syncs[0].model_copy(update={"ends": ends}),)
            program = lower(found.model_copy(update={"syncs": syncs}), graph)
            assert tuple(tuple(sorted(names)) for names in program.buckets[0]) == expected

    def test_sums_begin_when_their_last_gradient_is_there(self) -> None:
        """The later stage of a device is ready first, so its sum need not wait for the earlier one."""
        found = plan(GRAPH, stage(0, 2, "a:4 b:4", 2), stage(2, 4, "a:4 c:4", 1))
        actions = lower(found, GRAPH).devices["a"]
        order = [(a.kind, a.sync if a.kind == "reduce" else a.stage) for a in actions
                 if a.kind == "reduce" or (a.kind == "backward" and a.micro_batch == 1)]  # fmt: skip
        assert order == [("backward", 1), ("reduce", 1), ("backward", 0), ("reduce", 0)]


def test_clipping_adds_one_exchange_over_all_that_compute() -> None:
    found = plan(GRAPH, stage(0, 2, "a:3 b:5"), stage(2, 4, "c:8"), sources="d:8")
    plain, clipped = lower(found, GRAPH), lower(found, GRAPH, clip=True)
    for device in "abc":
        assert clipped.devices[device][:-2] == plain.devices[device][:-1]
        assert list(map(str, clipped.devices[device][-2:])) == ["norm over a,b,c", "step"]
    assert clipped.devices["d"] == plain.devices["d"]


class TestRefused:
    def test_a_plan_for_another_model(self) -> None:
        with pytest.raises(PlanError, match=r"was made for model .+, not for 'chain'.*plan again"):
            lower(plan(chain(5), stage(0, 5, "a:8")), GRAPH)

    def test_a_plan_that_covers_too_few_or_too_many_layers(self) -> None:
        for stop in (3, 5):
            found = plan(chain(stop), stage(0, stop, "a:8"))
            with pytest.raises(PlanError, match=rf"covers layers \[0:{stop}\), model 'chain' has 4"):
                lower(found.model_copy(update={"graph_digest": GRAPH.digest}), GRAPH)

    def syncs(self, *syncs: Sync) -> Plan:
        return plan(GRAPH, stage(0, 4, "a:4 b:4")).model_copy(update={"syncs": syncs})

    def test_a_missing_sync(self) -> None:
        with pytest.raises(PlanError, match="'w0' is held by a, b and no sync sums its gradient"):
            lower(self.syncs(), GRAPH)
        with pytest.raises(PlanError, match="'w3' is held by a, b and no sync"):
            lower(self.syncs(Sync(layers=((0, 3),), devices=("a", "b"))), GRAPH)

    def test_a_doubled_sync(self) -> None:
        sync = Sync(layers=((0, 4),), devices=("a", "b"))
        with pytest.raises(PlanError, match="gradient of 'w0' is summed twice"):
            lower(self.syncs(sync, sync), GRAPH)

    def test_a_sync_for_nothing(self) -> None:
        sync = Sync(layers=((0, 4),), devices=("a", "b"))
        with pytest.raises(PlanError, match="sync 1 over a, c covers no parameter"):
            lower(self.syncs(sync, Sync(layers=((0, 1),), devices=("a", "c"))), GRAPH)

    def test_rising_warm_up_never_ends(self) -> None:
        """The plan itself refuses it; smuggled past, the proof of termination does."""
        stages = tuple(Stage(start=s, stop=s + 2, replicas=(Replica(device=d, rows=8),), warmup=w)
                       for s, d, w in ((0, "a", 1), (2, "b", 2)))  # fmt: skip
        found = plan(GRAPH, stages[0], stages[1].model_copy(update={"warmup": 1}), micro_batches=3)
        with pytest.raises(PlanError, match=r"never ends; waiting: a at 'recv gradient .*; b at 'recv act"):
            lower(found.model_copy(update={"stages": stages}), GRAPH)

    def test_rising_warm_up_on_shared_devices_has_no_order(self) -> None:
        good = plan(GRAPH, stage(0, 1, "a:8"), stage(1, 2, "b:8"), stage(2, 4, "a:8"), micro_batches=3)
        stages = tuple(s.model_copy(update={"warmup": i + 1}) for i, s in enumerate(good.stages))
        with pytest.raises(PlanError, match="no order of its 18 forwards and backwards can end"):
            lower(good.model_copy(update={"stages": stages}), GRAPH)


TIED = chain(4, tied=(0, 3))
SOUND = [
    (plan(GRAPH, stage(0, 4, "a:8", 2)), GRAPH),
    (plan(GRAPH, stage(0, 2, "a:3 b:5", 2), stage(2, 4, "c:6 d:2"), sources="e:4 a:4"), GRAPH),
    (plan(GRAPH, stage(0, 1, "a:8", 2), stage(1, 3, "b:8", 2), stage(3, 4, "a:8")), GRAPH),
    (plan(TIED, stage(0, 2, "a:3 b:5", 2), stage(2, 4, "c:8"), schedule="gpipe"), TIED),
]
NUMBERS = ("stage", "micro_batch", "transfer", "nbytes", "sync", "segment")


def altered(action: Action, data: st.DataObject) -> Action:
    """The same kind of action with one of the fields that its text shows changed."""
    text = str(action)
    changes = [action._replace(**{name: getattr(action, name) + 1}) for name in NUMBERS]
    a, b = action.rows
    changes += [action._replace(rows=(a, b + 1)), action._replace(rows=(a + 1, b))]
    changes += [action._replace(peer="stranger"), action._replace(members=(*action.members, "stranger"))]
    if action.payload is not None:
        changes.append(action._replace(payload="label" if action.payload != "label" else "input"))
    visible = [change for change in changes if str(change) != text]
    assume(visible)
    return data.draw(st.sampled_from(visible), label="altered")


@given(st.data())
def test_a_sound_program_with_one_action_wrong_is_refused(data: st.DataObject) -> None:
    found, graph = data.draw(st.sampled_from(SOUND), label="plan")
    program = lower(found, graph, clip=data.draw(st.booleans(), label="clip"))
    device = data.draw(st.sampled_from(sorted(program.devices)), label="device")
    actions = list(program.devices[device])
    at = data.draw(st.integers(0, len(actions) - 1), label="at")
    match data.draw(st.sampled_from(["delete", "double", "alter", "move"]), label="what"):
        case "delete":
            # Whether gradients are clipped is not in the plan: without its only norm a Program is sound.
            assume(actions[at].kind != "norm" or len(program.devices) > 1)
            del actions[at]
        case "double":
            actions.insert(data.draw(st.integers(0, len(actions)), label="to"), actions[at])
        case "alter":
            actions[at] = altered(actions[at], data)
        case _:  # a step moved anywhere, compute moved behind what needs it
            assume(actions[at].kind in ("step", "norm", "backward"))
            moved = actions.pop(at)
            later = actions[-1:] if moved.kind == "backward" else actions[:1]
            assume(actions and moved not in later)
            actions.insert(len(actions) if moved.kind == "backward" else 0, moved)
    check(program, found, graph)
    with pytest.raises(PlanError):
        check(replace(program, devices={**program.devices, device: tuple(actions)}), found, graph)


def test_a_device_that_is_missing_altogether() -> None:
    found, graph = SOUND[0]
    with pytest.raises(PlanError, match=r"a lacks 'load m0 \[0:8\)'"):
        check(Program({}, {}, ()), found, graph)
    doubled = {**lower(found, graph).devices, "z": (Action("step"),)}
    with pytest.raises(PlanError, match="'step' on z is done twice or is not in the plan"):
        check(Program(doubled), found, graph)


def test_buckets_for_every_sync() -> None:
    found, graph = SOUND[1]
    program = lower(found, graph)
    with pytest.raises(PlanError, match="buckets for 0 of the plan's 2 syncs"):
        check(replace(program, buckets=()), found, graph)


def test_compute_that_is_done_twice() -> None:
    found, graph = SOUND[0]
    actions = lower(found, graph).devices["a"]
    twice = next(a for a in actions if a.kind == "forward")
    with pytest.raises(PlanError, match=r"'forward s0 m0 \[0:8\)' on a is done twice"):
        check(Program({"a": (twice, *actions)}), found, graph)
