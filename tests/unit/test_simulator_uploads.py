"""Uploads that start at their own times and share a link."""

from __future__ import annotations

import pytest

from spanwise.core.cluster import Cluster
from spanwise.core.errors import InputError
from spanwise.simulator.uploads import Upload, arrivals

CLUSTER = Cluster.parse(
    {
        "devices": [
            {"id": "hub", "site": "room"}, {"id": "a", "site": "hall"}, {"id": "b", "site": "hall"},
            {"id": "far", "site": "nowhere"},
        ],
        "links": [{"between": ["room", "hall"], "bandwidth": "1 MB/s", "latency": "10 ms"}],
    }
)  # fmt: skip


def test_a_shared_link_and_one_who_is_there_already():
    apart = arrivals(CLUSTER, [Upload("a", 0.0, 1_000_000), Upload("b", 5.0, 2_000_000)], "hub")
    assert apart == pytest.approx((1.01, 7.01))
    together = arrivals(CLUSTER, [Upload("a", 0.0, 1_000_000), Upload("b", 0.0, 2_000_000)], "hub")
    assert together == pytest.approx((2.01, 3.01))
    late = arrivals(CLUSTER, [Upload("a", 0.0, 1_000_000), Upload("b", 0.5, 1_000_000)], "hub")
    assert late == pytest.approx((1.51, 2.01))
    assert arrivals(CLUSTER, [Upload("hub", 3.0, 9)], "hub") == (3.0,)
    with pytest.raises(InputError, match="no link from 'far'"):
        arrivals(CLUSTER, [Upload("far", 0.0, 1)], "hub")
