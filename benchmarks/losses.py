"""Which term eats what a plan stays behind the compute bound: the same plan simulated, terms taken away.

Network, processor time of messages and the price of a CPU quota go one after the other; what then is left
over the bound are waits of the schedule, devices without work, rows and layers that do not divide evenly, and
layers that take longer per row on few rows. The order matters a little; it is the same for every cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from arena import predicted_s

from spanwise.api.prepare import Prepared
from spanwise.core.cluster import Cluster
from spanwise.core.plan import Plan
from spanwise.core.profile import Profile

_FREE = 1e6  # a network so many times faster costs nothing
CAUSES = ("network", "messages", "quota", "rest")


def losses(prepared: Prepared, plan: Plan, times: Profile, cluster: Cluster) -> Mapping[str, float]:
    """Seconds of the predicted step by cause, and ``bound``: what would be left if compute were all."""
    nothing = dict.fromkeys(("message_s", "message_s_per_byte", "sum_s_per_byte"), 0.0)
    silent = times.model_copy(update={"tables": tuple(t.model_copy(update=nothing) for t in times.tables)})
    free = _free_network(cluster)
    steps = (
        predicted_s(prepared, plan, times, cluster),
        predicted_s(prepared, plan, times.model_copy(update={"links": ()}), free),
        predicted_s(prepared, plan, silent.model_copy(update={"links": ()}), free),
        predicted_s(prepared, plan, _whole_cores(silent, cluster), free),
        bound_s(times, cluster, plan.batch),
    )
    return dict(zip(CAUSES, (a - b for a, b in pairwise(steps)), strict=True)) | {"bound": steps[-1]}


def bound_s(times: Profile, cluster: Cluster, batch: int) -> float:
    """Seconds if all devices computed all the time, undisturbed, at the number of rows that suits best."""
    return batch * least_row_s(times) / (sum(d.speed for d in cluster.devices) * cluster.core_share)


def least_row_s(times: Profile) -> float:
    """Seconds of a row on one undisturbed core, at the number of rows that suits best."""
    table = times.tables[0]
    seconds = [sum(x.forward_s[i] + x.backward_s[i] for x in table.layers) for i in range(len(table.rows))]
    return min(s / rows for s, rows in zip(seconds, table.rows, strict=True))


def _free_network(cluster: Cluster) -> Cluster:
    links = tuple(
        x.model_copy(update={"bandwidth_bytes_per_s": x.bandwidth_bytes_per_s * _FREE, "latency_s": 0.0})
        for x in cluster.links
    )
    devices = tuple(
        d.model_copy(update={"up_bytes_per_s": None, "down_bytes_per_s": None}) for d in cluster.devices
    )
    return cluster.model_copy(update={"links": links, "devices": devices})


def _whole_cores(times: Profile, cluster: Cluster) -> Profile:
    """Every device as fast as its part of a core is undisturbed."""
    devices = tuple(
        d.model_copy(
            update={"factor": 1 / (cluster.device(d.device).speed * cluster.core_share), "alone": 1.0}
        )
        for d in times.devices
    )
    return times.model_copy(update={"devices": devices, "links": ()})
