"""Devices of one machine, as in a lab: how much dearer compute is depends on how busy the others are."""

from __future__ import annotations

from spanwise.core.cluster import Cluster
from spanwise.core.profile import DeviceTimes, Profile
from spanwise.core.timeline import Timeline


def shares_machine(profile: Profile) -> bool:
    """Whether some device's times depend on what the others do."""
    return any(entry.alone < 1 for entry in profile.devices)


def relieved(profile: Profile, cluster: Cluster, first: Timeline) -> Profile:
    """The profile with times between "alone" and "all at work", by how busy the others were in ``first``.

    A device that takes turns with others on a core comes back to caches that they have used, so the same work
    takes more processor time. Profiles hold the times with all at work; where the others of a plan are idle
    for a part of the step, that part of the extra is taken off.
    """
    work = {d.id: first.device(d.id).utilization * d.speed for d in cluster.devices}
    speeds = {d.id: d.speed for d in cluster.devices}
    devices: list[DeviceTimes] = []
    for entry in profile.devices:
        others = sum(speeds.values()) - speeds.get(entry.device, 0.0)
        load = (sum(work.values()) - work.get(entry.device, 0.0)) / others if others else 0.0
        part = entry.alone + (1 - entry.alone) * min(load, 1.0)
        devices.append(entry.model_copy(update={"factor": entry.factor * part}))
    return profile.model_copy(update={"devices": tuple(devices)})
