"""Layer times for every device of a cluster: from the cache, this machine, or the devices themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spanwise.core.cluster import Cluster
from spanwise.core.errors import InputError
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.profile import DeviceTimes, LinkTimes, Profile, TimeTable
from spanwise.profiler import known
from spanwise.profiler.scale import scaled_profile

if TYPE_CHECKING:
    from spanwise.api.prepare import Prepared
    from spanwise.runtime.pool import WorkerPool


def default_cache() -> Path:
    """The user's folder of profiles."""
    return Path.home() / ".cache" / "spanwise"


def graph_and_profile(job: Job, cluster: Cluster, cache: Path | None) -> tuple[ModelGraph, Profile]:
    """Graph and times of a job; does not import torch when the cache knows the job."""
    found = known.find(cache, job) if cache is not None else None
    wanted = {device.threads for device in cluster.devices}
    if found is None or not wanted <= found.tables.keys():
        from spanwise.api.prepare import prepare

        prepared = prepare(job)
        return prepared.traced.graph, profile_prepared(prepared, cluster, cache)
    return found.graph, scaled_profile(found.graph, found.tables, cluster)


def profile_prepared(prepared: Prepared, cluster: Cluster, cache: Path | None) -> Profile:
    """Measures what the cache does not know, on this machine, and scales it to the devices."""
    job, graph = prepared.job, prepared.traced.graph
    found = known.find(cache, job) if cache is not None else None
    tables = dict(found.tables) if found is not None and found.graph.digest == graph.digest else {}
    for threads in sorted({device.threads for device in cluster.devices} - tables.keys()):
        tables[threads] = measure_here(prepared, threads, cache)
    if cache is not None:
        entry = known.Known(graph=graph, tables=tables)
        known.keep(cache, job, entry)
    return scaled_profile(graph, tables, cluster)


def measure_here(prepared: Prepared, threads: int, cache: Path | None = None) -> TimeTable:
    """Times every layer on this machine, or reads the times of the same operations from ``cache``."""
    from spanwise.profiler.cache import cache_key, cached_table
    from spanwise.profiler.compute import measure_layers

    traced, rows = prepared.traced, known.profile_rows(prepared.job.batch)

    def measure() -> TimeTable:
        return measure_layers(traced, rows=rows, threads=threads, sample=prepared.sample(rows[-1]))

    if cache is None:
        return measure()
    key = cache_key(traced, device="cpu", threads=threads, rows=rows)
    return cached_table(cache, key, len(traced.graph), measure)


def profile_devices(prepared: Prepared, pool: WorkerPool) -> Profile:
    """Each device times the layers itself and every link is probed: for clusters of real devices."""
    from spanwise.api.services import profile_request, table_of
    from spanwise.profiler.network import fit_link

    graph = prepared.traced.graph
    head, payload = profile_request(prepared)
    frames: dict[str, Any] = {}
    for device in pool.devices:  # one after the other: workers of one machine would disturb each other
        where = pool.cluster.device(device).torch_device
        pool.coordinator.tell(device, "service", payload, name="profile", torch_device=where, **head)
        frames |= pool.coordinator.gather("served", (device,), 600.0)
    links: list[LinkTimes] = []
    for (a, b), samples in pool.probe_links().items():
        try:
            round_trip_s, rate = fit_link(samples)
        except InputError:  # too fast to tell the large messages from the small ones
            round_trip_s = min(seconds for _, seconds in samples)
            rate = max(nbytes / seconds for nbytes, seconds in samples)
        links.append(LinkTimes(source=a, target=b, bandwidth_bytes_per_s=rate, latency_s=round_trip_s / 2))
    return Profile(
        graph_digest=graph.digest,
        tables=tuple(table_of(frames[d].head) for d in pool.devices),
        devices=tuple(DeviceTimes(device=d, table=i) for i, d in enumerate(pool.devices)),
        links=tuple(links),
    )
