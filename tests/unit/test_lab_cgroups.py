"""Control groups of both versions, on trees that only look like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from spanwise.core.errors import ResourceError
from spanwise.lab.cgroups import GroupsV1, GroupsV2, detect, leftovers
from spanwise.lab.layout import Share


@pytest.fixture
def version_2(tmp_path: Path) -> Path:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    return tmp_path


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    for controller in ("cpu", "memory", "cpuacct"):
        (tmp_path / controller).mkdir()
    return tmp_path


def test_version_2_is_found_and_gets_its_limits(version_2: Path) -> None:
    groups = detect("abc", version_2)
    assert isinstance(groups, GroupsV2)
    (version_2 / "spanwise-abc" / "edge").mkdir(parents=True)
    (version_2 / "spanwise-abc" / "edge" / "memory.swap.max").write_text("max")  # a kernel with swap accounts
    groups.create("edge", Share(2.5e-3, 5e-3), 10**9)
    edge = version_2 / "spanwise-abc" / "edge"
    assert (edge / "cpu.max").read_text() == "2500 5000"
    assert (edge / "memory.max").read_text() == "1000000000"
    assert (edge / "memory.swap.max").read_text() == "0"
    assert (version_2 / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert (version_2 / "spanwise-abc" / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert groups.entries("edge") == (edge / "cgroup.procs",)
    groups.set_share("edge", None)
    assert (edge / "cpu.max").read_text().startswith("max ")


def test_version_2_accounts(version_2: Path) -> None:
    groups = detect("abc", version_2)
    groups.create("edge", None, None)
    edge = version_2 / "spanwise-abc" / "edge"
    (edge / "memory.peak").write_text("12345\n")
    (edge / "cpu.stat").write_text("usage_usec 2500000\nnr_throttled 3\nthrottled_usec 1500000\n")
    assert groups.peak_memory_bytes("edge") == 12345
    assert groups.cpu_s("edge") == 2.5
    assert groups.throttled_s("edge") == 1.5
    assert not (edge / "memory.max").exists()


def test_version_1_is_found_and_gets_its_limits(version_1: Path) -> None:
    groups = detect("abc", version_1)
    assert isinstance(groups, GroupsV1)
    groups.create("edge", Share(1e-3, 8e-3), 10**9)
    cpu, memory = (version_1 / c / "spanwise-abc" / "edge" for c in ("cpu", "memory"))
    assert (cpu / "cpu.cfs_period_us").read_text() == "8000"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "1000"
    assert (memory / "memory.limit_in_bytes").read_text() == "1000000000"
    assert len(groups.entries("edge")) == 3
    groups.set_share("edge", None)
    assert (cpu / "cpu.cfs_quota_us").read_text() == "-1"


def test_both_versions_name_what_was_left_behind(version_1: Path, tmp_path: Path) -> None:
    assert leftovers(version_1) == ()
    detect("abc", version_1).create("edge", None, None)
    assert leftovers(version_1) == ("abc",)


def test_a_machine_without_the_controllers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("hugetlb\n")
    with pytest.raises(ResourceError, match="version 2 offers hugetlb"):
        detect("abc", tmp_path)


def test_a_group_that_cannot_be_written_says_which_file(version_2: Path) -> None:
    groups = detect("abc", version_2)
    groups.create("edge", None, None)
    (version_2 / "spanwise-abc" / "edge" / "cpu.max").unlink()
    (version_2 / "spanwise-abc" / "edge" / "cpu.max").mkdir()
    with pytest.raises(ResourceError, match=r"cpu\.max does not take '1000 8000'"):
        groups.set_share("edge", Share(1e-3, 8e-3))
