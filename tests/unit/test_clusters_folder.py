"""Every file in ``clusters/``: it loads, says where it comes from, fits two cores, and joins every pair."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from planner_cases import make_graph, make_job, make_profile
from spanwise.core.cluster import Cluster
from spanwise.planner import Problem, make_plan

FOLDER = Path(__file__).parents[2] / "clusters"
FILES = sorted(path.name for path in FOLDER.glob("*.toml"))
MOST_CORES = 1.9  # 95 % of two
LEAST_SHARE = 0.02  # below it the kernel's quota is coarse
SERIES = {"2": (1, 1, 0), "4": (2, 1, 1), "8": (3, 2, 3), "12": (4, 4, 4), "16": (4, 6, 6)}
SPANTRAIN = {f"spantrain-{n}.toml": counts for n, counts in SERIES.items()} | {
    "spantrain-7-env1.toml": (2, 2, 3),
    "spantrain-7-env2.toml": (2, 2, 3),
}


def load(name: str) -> Cluster:
    return Cluster.load(FOLDER / name)


def mbit(cluster: Cluster, a: str, b: str) -> float:
    return cluster.route(a, b).bandwidth_bytes_per_s * 8 / 1e6


def core_share(cluster: Cluster) -> float:
    assert cluster.emulation is not None
    return cluster.emulation.core_share


def test_the_folder_has_what_its_page_lists() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(.+?\.toml)` \|", page, re.MULTILINE) == [
        *(f"spantrain-7-env{env}.toml" for env in (1, 2)),
        *(f"spantrain-{n}.toml" for n in SERIES),
        "edge-lan.toml",
        "two-site-wan.toml",
        "hiertrain-3.toml",
        "dynacomm-5.toml",
        "dsparse-7.toml",
        "home.toml",
    ]
    assert set(re.findall(r"^\| `(.+?\.toml)` \|", page, re.MULTILINE)) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_begins_with_where_it_comes_from(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    header = text[: text.index("\nname = ")]
    assert all(line.startswith("# ") or not line for line in header.splitlines())
    for word in ("Source", "Synthetic", "Bandwidth"):
        assert len(re.findall(rf"^# {word}: \S", header, re.MULTILINE)) == 1
    assert re.search(r"^# Bandwidth: (not scaled|divided by)", header, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("name", FILES)
def test_a_file_fits_two_cores(name: str) -> None:
    cluster = load(name)
    assert cluster.name == name.removesuffix(".toml")
    shares = [device.speed * core_share(cluster) for device in cluster.devices]
    assert sum(shares) <= MOST_CORES
    assert min(shares) >= LEAST_SHARE
    assert max(shares) <= 1
    assert all(device.threads == 1 for device in cluster.devices)


@pytest.mark.parametrize("name", FILES)
def test_devices_can_be_interfaces_and_reach_each_other(name: str) -> None:
    cluster = load(name)
    assert max(map(len, cluster.ids)) <= 15
    assert all(cluster.connected(a, b) for a in cluster.ids for b in cluster.ids)


@pytest.mark.parametrize("name", FILES)
def test_one_can_plan_on_it(name: str) -> None:
    cluster, graph = load(name), make_graph(8)
    plan = make_plan(Problem(graph, make_profile(graph, cluster), cluster, make_job(32)), "single")
    assert plan.batch == 32


@pytest.mark.parametrize("name", SPANTRAIN)
def test_spantrain_has_the_servers_and_links_of_its_notes(name: str) -> None:
    cluster = load(name)
    tiers = Counter(device.tier for device in cluster.devices)
    assert (tiers["cloud"], tiers["edge"], tiers["end"]) == SPANTRAIN[name]
    assert all(d.speed == {"cloud": 4, "edge": 2, "end": 1}[d.tier] for d in cluster.devices)
    assert all(d.site == d.tier and d.id.startswith(d.tier) for d in cluster.devices)
    assert cluster.data == "everywhere"
    for a in cluster.devices:
        for b in cluster.devices:
            if a.id != b.id:
                slow = "env2" not in name and a.tier != b.tier and "cloud" in (a.tier, b.tier)
                assert mbit(cluster, a.id, b.id) == (100 if slow else 500)
                assert cluster.route(a.id, b.id).latency_s == (1e-3 if a.site != b.site else 2e-4)


def test_the_scaling_series_adds_up_and_has_one_speed() -> None:
    found = {n: load(f"spantrain-{n}.toml") for n in SERIES}
    assert all(len(cluster.devices) == int(n) for n, cluster in found.items())
    assert len({core_share(cluster) for cluster in found.values()}) == 1


def test_edge_lan_has_slow_and_fast_ports() -> None:
    cluster = load("edge-lan.toml")
    assert len(cluster.devices) == len({d.speed for d in cluster.devices}) == 6
    assert mbit(cluster, "xavier-nx", "tx2") == 1000
    slow = [d.id for d in cluster.devices if d.up_bytes_per_s == d.down_bytes_per_s == 12.5e6]
    assert slow == ["nano", "pi-4", "pi-3"]
    assert mbit(cluster, "xavier-nx", "pi-3") == mbit(cluster, "pi-3", "xavier-nx") == 100


def test_two_site_wan_is_thin_between_the_sites() -> None:
    cluster = load("two-site-wan.toml")
    assert Counter(d.site for d in cluster.devices) == {"north": 3, "south": 3}
    assert {d.speed for d in cluster.devices} == {1, 2.8, 4, 10}
    assert mbit(cluster, "north-1", "north-2") == mbit(cluster, "south-1", "south-3") == 100
    across = cluster.route("north-1", "south-1")
    assert (across.bandwidth_bytes_per_s * 8 / 1e6, across.latency_s) == (20, 0.02)


def test_the_data_of_hiertrain_and_of_a_home_is_on_one_device() -> None:
    for name, device in (("hiertrain-3.toml", "device"), ("home.toml", "laptop")):
        assert [share.device for share in load(name).data_devices()] == [device]
    assert [d.tier for d in load("hiertrain-3.toml").devices] == ["end", "edge", "cloud"]


def test_dynacomm_has_a_server_with_the_fastest_links() -> None:
    cluster, graph = load("dynacomm-5.toml"), make_graph(8)
    problem = Problem(graph, make_profile(graph, cluster), cluster, make_job(32))
    assert [sync.server for sync in make_plan(problem, "dynacomm").servers] == ["server"]
    assert {mbit(cluster, "server", d) for d in cluster.ids if d != "server"} == {50}


def test_dsparse_has_seven_memory_sizes() -> None:
    budgets = [d.memory_bytes / 2**20 for d in load("dsparse-7.toml").devices]
    assert len(set(budgets)) == len(budgets) == 7
    assert 1 - sum(budgets) / 7 / 661 == pytest.approx(0.596, abs=1e-3)
