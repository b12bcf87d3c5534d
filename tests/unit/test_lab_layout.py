"""A lab on paper: which clusters can be one, and which way every pair takes."""

from __future__ import annotations

from typing import Any

import pytest

from spanwise.core.cluster import Cluster
from spanwise.core.errors import InputError
from spanwise.lab import Lab
from spanwise.lab.layout import Layout, Share, changed_cluster

LINKS = [
    {"between": ["x", "x"], "bandwidth": "500 Mbit/s", "latency": "0.2 ms"},
    {"between": ["y", "y"], "bandwidth": "80 Mbit/s", "latency": "3 ms"},
    {"between": ["x", "y"], "bandwidth": "20 Mbit/s", "latency": "10 ms"},
]


def cluster(links: list[dict[str, Any]] = LINKS, **changes: Any) -> Cluster:
    devices = [
        {"id": "a", "site": "x"},
        {"id": "b", "site": "x", "speed": 0.5, "up": "40 Mbit/s"},
        {"id": "c", "site": "y", "speed": 0.25},
        {"id": "d", "site": "y", "speed": 0.15},
    ]
    return Cluster.parse(
        {"name": "four", "devices": devices, "links": links, "emulation": {"core_share": 0.9}, **changes}
    )


def layout(machines: Cluster | None = None, cores: int = 2) -> Layout:
    return Layout.of("abc123", machines or cluster(), cores)


def test_neighbours_without_latency_are_direct_and_all_others_go_through_the_relay() -> None:
    plan = layout()
    assert plan.direct("a", "b")
    assert not plan.direct("c", "d")  # the bridge cannot wait 3 ms
    assert not plan.direct("a", "c")
    ways = {(w.source, w.target): w for w in plan.ways()}
    assert set(ways) == {(p, q) for p in "abcd" for q in "abcd" if p != q and {p, q} != {"a", "b"}}
    assert plan.detours("c") == ("d",)
    assert plan.detours("a") == ()


def test_the_relay_meters_shared_pipes_and_leaves_device_ports_to_the_cable() -> None:
    ways = {(w.source, w.target): w for w in layout().ways()}
    assert ways["b", "c"].resources == (("link:x>y", 2.5e6),)
    assert ways["b", "c"].latency_s == 0.01
    assert [name for name, _ in ways["c", "d"].resources] == ["port:c>y", "port:y>d"]


def test_addresses_and_names_are_unique() -> None:
    plan = layout()
    addresses = [plan.address(d) for d in "abcd"] + [plan.control_address(d) for d in "abcd"]
    assert len({*addresses, plan.hub_address, plan.gateway("x"), plan.gateway("y")}) == 11
    assert len(set(plan.namespaces)) == 1 + 2 + 4
    assert all("abc123" in name for name in plan.namespaces)


def test_workers_see_addresses_and_no_emulation() -> None:
    placed = layout().placed()
    assert placed.emulation is None
    assert placed.device("c").address == "10.200.1.4"
    assert placed.route("a", "c") == cluster().route("a", "c")


def test_a_quota_is_never_below_what_the_kernel_takes() -> None:
    for cores in (0.9, 0.5, 0.127, 0.05, 0.002):
        share = Share.of(cores)
        assert share.quota_s >= 1e-3
        assert share.period_s <= 1.0
        assert share.quota_s / share.period_s == pytest.approx(cores, rel=0.01)


@pytest.mark.parametrize(
    ("machines", "words"),
    [
        (cluster(devices=[{"id": "a-very-long-device", "site": "x"}], links=[]),
         ["a-very-long-device", "18 letters", "allows 15", "shorten"]),
        (cluster(devices=[{"id": "eth0", "site": "x"}], links=[]), ["eth0", "rename"]),
        (cluster(devices=[{"id": "a", "site": "x", "torch_device": "cuda:0"}], links=[]), ["cuda:0", "cpu"]),
        (cluster(devices=[{"id": "a", "site": "x", "speed": 3}], links=[]),
         ["add up to 3", "2.7 cores", "95%", "1.9", "at most 0.6333"]),
        (cluster(emulation=None), ["add up to 1.9", "at core_share 1", "1.9"]),
    ],
)  # fmt: skip
def test_clusters_that_cannot_be_a_lab_are_refused_with_the_numbers(
    machines: Cluster, words: list[str]
) -> None:
    if machines.emulation is None:
        assert layout(machines).share("a") == 1.0  # exactly 95 % of two cores: allowed
        with pytest.raises(InputError) as caught:
            layout(machines, cores=1)
        words = ["add up to 1.9", "0.95"]
    else:
        with pytest.raises(InputError) as caught:
            layout(machines)
    assert all(word in str(caught.value) for word in words)


def test_a_changed_link_keeps_the_number_that_is_not_given() -> None:
    changed = changed_cluster(cluster(), "a", "c", bandwidth_bytes_per_s=1e6, latency_s=None)
    assert changed.route("a", "c").bandwidth_bytes_per_s == 1e6
    assert changed.route("c", "a").latency_s == 0.01
    assert changed.route("a", "d") == cluster().route("a", "d")
    thin = changed_cluster(cluster(), "x", "y", bandwidth_bytes_per_s=None, latency_s=0.5)
    assert thin.route("b", "d").latency_s == 0.5
    assert thin.route("b", "d").bandwidth_bytes_per_s == 2.5e6


def test_a_pair_with_a_link_of_its_own_leaves_the_bridge() -> None:
    changed = changed_cluster(cluster(), "a", "b", bandwidth_bytes_per_s=1e6, latency_s=None)
    assert not layout(changed).direct("a", "b")
    assert layout(changed).detours("a") == ("b",)


def test_a_link_that_is_not_there_cannot_be_changed() -> None:
    with pytest.raises(InputError, match="no link x -> z to change"):
        changed_cluster(cluster(), "x", "z", bandwidth_bytes_per_s=1.0, latency_s=None)


def test_shares_hold_again_after_the_last_of_nested_eased_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that start after others were eased would else take minutes with a twentieth of a core."""

    class Groups:
        def __init__(self) -> None:
            self.shares: dict[str, Share | None] = {}

        def set_share(self, device: str, share: Share | None) -> None:
            self.shares[device] = share

    lab, groups = Lab(cluster()), Groups()
    monkeypatch.setattr(Lab, "groups", groups)
    with lab.eased():
        with lab.eased():
            pass
        assert groups.shares == dict.fromkeys("abcd")
    assert groups.shares == {d: Share.of(lab.share(d)) for d in "abcd"}
    with pytest.raises(ZeroDivisionError), lab.eased():
        _ = 1 / 0
    assert None not in groups.shares.values()
