from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from spanwise.core.cluster import Cluster, Device, Link
from spanwise.core.defaults import DEFAULT_CLUSTER_TOML, default_cluster
from spanwise.core.errors import InputError

TWO_SITES: dict[str, Any] = {
    "name": "lab",
    "devices": [
        {"id": "a1", "site": "a", "up": "8 Mbit/s"},
        {"id": "a2", "site": "a"},
        {"id": "b1", "site": "b", "down": "4 Mbit/s"},
        {"id": "b2", "site": "b"},
    ],
    "links": [
        {"between": ["a", "b"], "up": "16 Mbit/s", "down": "80 Mbit/s", "latency": "5 ms"},
        {"between": ["a", "a"], "bandwidth": "800 Mbit/s", "latency": "1 ms"},
        {"from": "b", "to": "b2", "bandwidth": 7e6},
        {"from": "a2", "to": "b1", "bandwidth": 9e6},
    ],
}


def lab(**changes: Any) -> Cluster:
    return Cluster.parse({**TWO_SITES, **changes})


def refused(message: str, **changes: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        lab(**changes)
    assert "\n" not in str(caught.value)


class TestRoutes:
    def test_two_sites_share_one_pipe_each_way(self) -> None:
        forth = lab().route("a2", "b2")
        assert (forth.bandwidth_bytes_per_s, forth.latency_s) == (2e6, 0.005)
        assert forth.resources == (("link:a>b", 2e6),)
        assert lab().route("b1", "a2").resources == (("link:b>a", 1e7),)

    def test_a_site_is_a_switch_with_a_port_a_device_and_way(self) -> None:
        route = lab().route("a2", "a1")
        assert route.resources == (("port:a2>a", 1e8), ("port:a>a1", 1e8))
        assert {n for n, _ in route.resources}.isdisjoint(n for n, _ in lab().route("a1", "a2").resources)

    def test_the_ports_of_devices_add_capacities(self) -> None:
        assert lab().route("a1", "b1").resources == (("link:a>b", 2e6), ("up:a1", 1e6), ("down:b1", 5e5))
        assert lab().route("a1", "b1").bandwidth_bytes_per_s == 5e5
        assert lab().route("b1", "a1").resources == (("link:b>a", 1e7),)

    def test_a_device_pair_goes_before_device_and_site_before_sites(self) -> None:
        assert lab().route("a2", "b1").resources[0] == ("link:a2>b1", 9e6)
        assert lab().route("b1", "b2").resources == (("link:b>b2", 7e6),)
        assert lab().route("a1", "b1").resources[0] == ("link:a>b", 2e6)

    def test_a_device_reaches_itself_at_once(self) -> None:
        route = lab().route("a1", "a1")
        assert (route.bandwidth_bytes_per_s, route.latency_s, route.resources) == (math.inf, 0.0, ())
        assert lab().connected("a1", "a1")

    def test_links_are_directed(self) -> None:
        assert lab().connected("b1", "b2")
        assert not lab().connected("b2", "b1")

    def test_no_link(self) -> None:
        with pytest.raises(InputError, match=r"no link from 'b2' \(site b\) to 'b1' \(site b\); add one"):
            lab().route("b2", "b1")

    def test_unknown_device(self) -> None:
        for ask in (
            lambda: lab().route("a1", "c"),
            lambda: lab().connected("c", "a1"),
            lambda: lab().device("c"),
        ):
            with pytest.raises(InputError, match="unknown device 'c'; known: a1, a2, b1, b2"):
                ask()


class TestRules:
    def test_unknown_end_of_a_link(self) -> None:
        link = {"between": ["a1", "moon"], "bandwidth": 1}
        refused(
            "link a1 -> moon: unknown device or site 'moon'; known devices: a1,.*sites: a, b", links=[link]
        )

    def test_doubled_ids(self) -> None:
        refused("device id 'x' is listed twice", devices=[{"id": "x"}, {"id": "x"}], links=[])

    def test_a_name_is_a_device_or_a_site(self) -> None:
        refused("'x' names a device and a site", devices=[{"id": "x", "site": "x"}], links=[])

    def test_doubled_links(self) -> None:
        link = {"from": "a", "to": "b", "bandwidth": 1}
        refused("link 'a -> b' is listed twice", links=[link, link])
        refused("link 'a -> b' is listed twice", links=[link, {"between": ["b", "a"], "bandwidth": 1}])

    def test_a_link_from_a_device_to_itself(self) -> None:
        refused("joins a device to itself", links=[{"between": ["a1", "a1"], "bandwidth": 1}])

    def test_between_needs_two_ends_and_a_rate(self) -> None:
        refused("needs exactly two", links=[{"between": ["a"], "bandwidth": 1}])
        refused("needs exactly two", links=[{"between": "a", "bandwidth": 1}])
        refused("needs 'bandwidth', or 'up' and 'down'", links=[{"between": ["a", "b"]}])
        refused("needs 'bandwidth', or 'up' and 'down'", links=[{"between": ["a", "b"], "up": 1}])

    def test_up_beside_bandwidth_means_down_is_bandwidth(self) -> None:
        cluster = lab(links=[{"between": ["a", "b"], "up": 1, "bandwidth": 2}])
        assert [x.bandwidth_bytes_per_s for x in cluster.links] == [1, 2]

    def test_rates_must_be_positive(self) -> None:
        refused("greater than 0", links=[{"between": ["a", "b"], "bandwidth": 0}])
        refused("'fast' is not a quantity", links=[{"between": ["a", "b"], "bandwidth": "fast"}])

    @pytest.mark.parametrize("bad", ["", "-a", "a b", "a>b", "a/b", "x" * 64, "ä"])
    def test_ids_survive_file_names_and_actions(self, bad: str) -> None:
        refused("must be 1 to 63 letters", devices=[{"id": bad}], links=[])

    def test_a_cluster_has_a_device(self) -> None:
        refused("devices", devices=[], links=[])

    def test_unknown_keys(self) -> None:
        refused("colour", colour="red")
        refused("devices.0.ram", devices=[{"id": "a", "ram": 1}], links=[])


class TestData:
    def test_forms(self) -> None:
        def shares(data: object) -> list[tuple[str, float]]:
            return [(x.device, x.share) for x in lab(data=data).data_shares]

        assert shares(["b1", "a1"]) == [("b1", 1.0), ("a1", 1.0)]
        assert shares({"b1": 3, "a1": 0.5}) == [("b1", 3.0), ("a1", 0.5)]
        assert shares([{"device": "b1", "share": 2}, "a1"]) == [("b1", 2.0), ("a1", 1.0)]

    def test_the_first_device_has_it_unless_told(self) -> None:
        assert [x.device for x in lab().data_shares] == ["a1"]

    def test_everywhere(self) -> None:
        cluster = lab(data="everywhere")
        assert [x.device for x in cluster.data_shares] == ["a1", "a2", "b1", "b2"]
        assert cluster.data_devices() == ()
        for again in (Cluster.from_toml(cluster.to_toml()), Cluster.from_json(cluster.to_json())):
            assert again == cluster
        assert Cluster.parse({**cluster.to_data(), "data": ["b1"]}) == lab(data=["b1"])

    def test_a_job_names_others(self) -> None:
        def chosen(data: object, *devices: str) -> list[tuple[str, float]]:
            return [(x.device, x.share) for x in lab(data=data).data_devices(devices)]

        assert chosen("everywhere", "b1", "a1", "b1") == [("b1", 1.0), ("a1", 1.0)]
        assert chosen({"b1": 3, "a1": 0.5}, "b1", "a2") == [("b1", 3.0), ("a2", 1.0)]
        assert chosen({"b1": 3, "a1": 0.5}) == [("b1", 3.0), ("a1", 0.5)]
        with pytest.raises(InputError, match="unknown device 'c'"):
            chosen("everywhere", "c")

    @pytest.mark.parametrize("word", ["Everywhere", "a1", ""])
    def test_another_word_is_not_a_place(self, word: str) -> None:
        refused(rf"data = '{word}': must be 'everywhere', a list .* write data = \['{word}'\]", data=word)

    @pytest.mark.parametrize("data", [7, True, [7], {"a1": "much"}, ["everywhere"]])
    def test_other_forms(self, data: object) -> None:
        refused("data", data=data)

    def test_rules(self) -> None:
        refused("data: unknown device 'c'", data=["c"])
        refused("data device 'a1' is listed twice", data=["a1", "a1"])
        refused("greater than 0", data={"a1": 0})


class TestKeys:
    def test_people_write_short_keys_with_units(self) -> None:
        text = 'id = "x"\nmemory = "2 GiB"\nup = "8 Mbit/s"\ndown = "16 Mbit/s"'
        device = Device.from_toml(text)
        assert (device.memory_bytes, device.up_bytes_per_s, device.down_bytes_per_s) == (2 * 2**30, 1e6, 2e6)

    def test_files_write_long_keys(self) -> None:
        data = lab().to_data()
        assert data["devices"][0]["up_bytes_per_s"] == 1e6
        assert data["links"][0] == {
            "source": "a",
            "target": "b",
            "bandwidth_bytes_per_s": 2e6,
            "latency_s": 0.005,
            "precision": "full",
        }

    def test_links_may_be_values(self) -> None:
        link = Link(source="a", target="b", bandwidth_bytes_per_s=5)
        assert Cluster(devices=lab().devices, links=(link,)).links == (link,)

    def test_values_are_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            lab().name = "other"  # type: ignore[misc]


def test_the_default_cluster() -> None:
    cluster = default_cluster()
    assert cluster == Cluster.from_toml(DEFAULT_CLUSTER_TOML)
    assert cluster.emulation is not None
    assert all(cluster.connected(a, b) for a in cluster.ids for b in cluster.ids)
    assert [x.device for x in cluster.data_shares] == ["end-1", "end-2"]
    wan = cluster.route("edge", "cloud")
    assert (wan.bandwidth_bytes_per_s, wan.latency_s) == (50e6 / 8, 0.01)


def test_the_page_shows_the_default_cluster() -> None:
    page = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text(encoding="utf-8")
    first = page.split("```toml\n")[1].split("```")[0]
    assert Cluster.from_toml(first) == default_cluster()


def test_links_may_have_reduced_precision() -> None:
    cluster = Cluster.parse(
        {
            "devices": [{"id": "a", "site": "x"}, {"id": "b", "site": "y"}, {"id": "c", "site": "y"}],
            "links": [
                {"between": ["x", "y"], "bandwidth": "10 Mbit/s", "precision": "half"},
                {"from": "a", "to": "c", "bandwidth": "10 Mbit/s", "precision": "int8"},
                {"between": ["y", "y"], "bandwidth": "1 Gbit/s"},
            ],
        }
    )
    found = {(s, t): cluster.precision(s, t) for s in "abc" for t in "abc" if s != t}
    half = dict.fromkeys([("a", "b"), ("b", "a"), ("c", "a")], "half")
    assert found == {**half, ("a", "c"): "int8", ("b", "c"): "full", ("c", "b"): "full"}
    with pytest.raises(InputError, match="precision"):
        Cluster.parse({"devices": [{"id": "a"}], "links": [
            {"between": ["site", "site"], "bandwidth": 1.0, "precision": "quarter"}]})  # fmt: skip
