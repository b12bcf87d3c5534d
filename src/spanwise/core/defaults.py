"""The embedded three-tier cluster: the first run needs nothing."""

from __future__ import annotations

from spanwise.core.cluster import Cluster

# Speeds add up to 1.9 cores; at core_share 0.65 two cores hold them with room for the coordinator and the
# pacing of messages, so that what is measured is the emulated cluster and not the machine's scheduler.
DEFAULT_CLUSTER_TOML = """\
name = "three-tier"
description = "1 cloud server, 1 edge box and 2 end devices with the data, emulated on this machine"
data = ["end-1", "end-2"]

[emulation]
core_share = 0.65

[[devices]]
id = "cloud"
tier = "cloud"
site = "datacenter"
memory = "4 GiB"
speed = 1.0

[[devices]]
id = "edge"
tier = "edge"
site = "plant"
memory = "2 GiB"
speed = 0.5

[[devices]]
id = "end-1"
tier = "end"
site = "plant"
memory = "1 GiB"
speed = 0.25

[[devices]]
id = "end-2"
tier = "end"
site = "plant"
memory = "512 MiB"
speed = 0.15

[[links]]
between = ["datacenter", "plant"]
bandwidth = "50 Mbit/s"
latency = "10 ms"

[[links]]
between = ["plant", "plant"]
bandwidth = "200 Mbit/s"
latency = "1 ms"
"""


def default_cluster() -> Cluster:
    """1 cloud (speed 1.0), 1 edge (0.5), 2 end devices (0.25, 0.15); WAN 50 Mbit/s 10 ms, LAN 200 Mbit/s."""
    return Cluster.from_toml(DEFAULT_CLUSTER_TOML, "default cluster")
