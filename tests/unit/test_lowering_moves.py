"""What changes owner between two plans."""

from __future__ import annotations

import pytest

from plan_cases import chain, plan, stage
from spanwise.core.cluster import Cluster
from spanwise.core.errors import PlanError
from spanwise.core.profile import LinkTimes
from spanwise.lowering import Move, move_bytes, moves


def cluster(*links: tuple[str, str, str]) -> Cluster:
    return Cluster.parse(
        {
            "devices": [{"id": d, "site": f"at-{d}"} for d in "abcd"],
            "links": [{"between": [x, y], "bandwidth": rate} for x, y, rate in links],
        }
    )


ALL = cluster(*((x, y, "10 Mbit/s") for i, x in enumerate("abcd") for y in "abcd"[i + 1 :]))
GRAPH = chain(4)


def test_the_same_layers_on_the_same_devices_move_nothing() -> None:
    old = plan(GRAPH, stage(0, 2, "a:4 b:4", 2), stage(2, 4, "c:8"))
    new = plan(GRAPH, stage(0, 2, "b:1 a:3", 2), stage(2, 4, "c:4"), micro_batches=4)
    assert moves(old, new, GRAPH, ALL) == ()


def test_a_border_moves_the_layers_between() -> None:
    old = plan(GRAPH, stage(0, 2, "a:8", 2), stage(2, 4, "b:8"))
    new = plan(GRAPH, stage(0, 3, "a:8", 2), stage(3, 4, "b:8"))
    found = moves(old, new, GRAPH, ALL)
    assert found == (Move("b", "a", ("w2",)),)
    assert move_bytes(found[0], GRAPH, 2) == 3 * 12


def test_holders_share_the_work_by_how_fast_they_are() -> None:
    old = plan(GRAPH, stage(0, 4, "a:4 b:4"))
    new = plan(GRAPH, stage(0, 4, "c:8"), sources="a:4 b:4")
    alike = {m.source: m.parameters for m in moves(old, new, GRAPH, ALL)}
    assert alike.keys() == {"a", "b"}
    assert sorted(alike["a"] + alike["b"]) == ["w0", "w1", "w2", "w3"]
    near = cluster(("a", "c", "1 Mbit/s"), ("b", "c", "1 Gbit/s"), ("a", "b", "1 Gbit/s"))
    assert moves(old, new, GRAPH, near) == (Move("b", "c", ("w0", "w1", "w2", "w3")),)


def test_a_tied_parameter_moves_once_to_each_that_lacks_it() -> None:
    graph = chain(4, tied=(0, 3))
    old = plan(graph, stage(0, 2, "a:8", 2), stage(2, 4, "b:8"))
    new = plan(graph, stage(0, 2, "a:8", 2), stage(2, 4, "c:8"))
    got = [name for move in moves(old, new, graph, ALL) for name in move.parameters]
    assert sorted(got) == ["w-tied", "w2", "w3"]
    assert {move.target for move in moves(old, new, graph, ALL)} == {"c"}


def test_buffers_come_from_all_holders() -> None:
    layers = tuple(
        layer.model_copy(update={"buffers": (f"mean{i}",), "buffer_bytes": 8})
        for i, layer in enumerate(GRAPH.layers)
    )
    graph = GRAPH.model_copy(update={"layers": layers})
    old = plan(graph, stage(0, 4, "a:6 b:2"))
    new = plan(graph, stage(0, 4, "a:4 c:4"))
    found = moves(old, new, graph, ALL)
    assert {m.source: m.buffers for m in found} == dict.fromkeys("ab", ("mean0", "mean1", "mean2", "mean3"))
    assert all(m.target == "c" for m in found)


def test_no_way_to_a_device_that_lacks_something() -> None:
    old = plan(GRAPH, stage(0, 4, "a:8"))
    new = plan(GRAPH, stage(0, 4, "d:8"), sources="a:8")
    apart = cluster(("a", "b", "1 Mbit/s"), ("b", "c", "1 Mbit/s"), ("c", "d", "1 Mbit/s"))
    with pytest.raises(PlanError, match=r"'d' lacks 'w0', and none of its holders \(a\) has a link to it"):
        moves(old, new, GRAPH, apart)


def test_over_a_slow_link_a_parameter_goes_once_and_is_passed_on() -> None:
    old = plan(GRAPH, stage(0, 4, "a:8"))
    new = plan(GRAPH, stage(0, 4, "b:4 c:4"), sources="a:8")
    two_sites = Cluster.parse(
        {
            "devices": [{"id": "a", "site": "far"}, {"id": "b", "site": "here"}, {"id": "c", "site": "here"}],
            "links": [
                {"between": ["far", "here"], "bandwidth": "1 Mbit/s"},
                {"between": ["here", "here"], "bandwidth": "100 Mbit/s"},
            ],
        }
    )
    found = moves(old, new, GRAPH, two_sites)
    direct = [(m.target, m.parameters) for m in found if not m.relayed]
    passed = [(m.source, m.target, m.parameters) for m in found if m.relayed]
    assert sorted(name for _, names in direct for name in names) == ["w0", "w1", "w2", "w3"]
    assert sorted(name for _, _, names in passed for name in names) == ["w0", "w1", "w2", "w3"]
    assert all((other, names) in direct for other, _, names in passed)


def test_what_was_measured_says_over_which_links_state_moves() -> None:
    old = plan(GRAPH, stage(0, 4, "a:4 b:4"))
    new = plan(GRAPH, stage(0, 4, "c:8"), sources="a:4 b:4")
    slow = [LinkTimes(source="a", target="c", latency_s=0.0, bandwidth_bytes_per_s=1e3)]
    assert moves(old, new, GRAPH, ALL, slow) == (Move("b", "c", ("w0", "w1", "w2", "w3")),)
    assert {m.source for m in moves(old, new, GRAPH, ALL)} == {"a", "b"}
