"""Run folders with made-up but coherent content, for the tests of the reports."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from spanwise.core.cluster import Cluster, Device, Link
from spanwise.core.defaults import default_cluster
from spanwise.core.job import Job, Recipe
from spanwise.core.model import Layer, ModelGraph, Parameter, TensorSpec
from spanwise.core.plan import Plan, Replica, Stage
from spanwise.core.profile import DeviceTimes, LayerTimes, Profile, TimeTable
from spanwise.core.program import Action, Program
from spanwise.core.run_folder import RunFolder
from spanwise.core.timeline import DeviceUse, MemoryPoint, Span, Timeline
from spanwise.lowering import lower, natural_syncs

SHAPES = (
    (32, 32, 32), (16, 32, 32), (24, 32, 32), (24, 32, 32), (32, 16, 16), (32, 16, 16), (32, 16, 16),
    (64, 8, 8), (64, 8, 8), (64, 8, 8), (96, 8, 8), (96, 8, 8), (160, 4, 4), (160, 4, 4), (320, 4, 4),
    (1280, 1, 1),
)  # fmt: skip


def small_graph(name: str = "mobilenet_v2", layer_name: str = "features") -> ModelGraph:
    """A chain of 17 layers with the output shapes of MobileNetV2 on 32x32 images."""
    layers: list[Layer] = []
    for index, shape in enumerate((*SHAPES, None)):
        out = (
            ()
            if shape is None
            else (TensorSpec(name=f"t{index}", shape=shape, dtype="float32", item_bytes=4),)
        )
        elements = math.prod(shape or (1280,))
        flops = 2.0e6 + 90.0 * elements * (1 + index / 4)
        weight = Parameter(
            name=f"{layer_name}.{index}.weight", shape=(64, index + 1), bytes=256 * (index + 1) ** 2
        )
        last = shape is None
        layers.append(
            Layer(
                name="classifier" if last else f"{layer_name}.{index}",
                ops=(index * 4, index * 4 + 4),
                forward_flops=flops,
                backward_flops=2 * flops,
                parameters=(weight,),
                outputs=out,
                saved_bytes=8 * elements,
            )
        )
    image = TensorSpec(name="x", shape=(3, 32, 32), dtype="float32", item_bytes=4, differentiable=False)
    label = TensorSpec(name="y", shape=(), dtype="int64", item_bytes=8, differentiable=False)
    return ModelGraph(
        name=name, source_digest="0" * 16, layers=tuple(layers), inputs=(image,), labels=(label,)
    )


def hybrid_plan(graph: ModelGraph) -> Plan:
    """Three stages on the default cluster: both end devices, then the edge, then the cloud."""
    stages = (
        Stage(
            start=0,
            stop=3,
            replicas=(Replica(device="end-1", rows=5), Replica(device="end-2", rows=3)),
            warmup=5,
        ),
        Stage(start=3, stop=7, replicas=(Replica(device="edge", rows=8),), warmup=3),
        Stage(start=7, stop=17, replicas=(Replica(device="cloud", rows=8),), warmup=1),
    )
    return Plan(
        strategy="hpp",
        graph_digest=graph.digest,
        micro_batches=12,
        micro_batch_rows=8,
        sources=(Replica(device="end-1", rows=4), Replica(device="end-2", rows=4)),
        stages=stages,
        syncs=natural_syncs(stages, graph),
    )


def single_plan(graph: ModelGraph, device: str) -> Plan:
    """One device does it all."""
    everything = (Replica(device=device, rows=16),)
    stage = Stage(start=0, stop=len(graph), replicas=everything)
    return Plan(strategy="single", graph_digest=graph.digest, micro_batches=4, micro_batch_rows=16,
                sources=everything, stages=(stage,))  # fmt: skip


def wide_cluster(devices: int = 16) -> Cluster:
    """Four sites, the lowest two joined to everything, with a pair of direct links."""
    sites = ("barn", "field", "office", "rack")
    tiers = ("end", "end", "edge", "cloud")
    made = [
        Device(
            id=f"{sites[i % 4]}-{i // 4}", tier=tiers[i % 4], site=sites[i % 4],
            speed=0.1 * (1 + i % 4) ** 1.5, memory_bytes=2**28 * (1 + i % 4),
        )
        for i in range(devices)
    ]  # fmt: skip
    links = [
        Link(source=a, target=b, bandwidth_bytes_per_s=2e6 * (1 + sites.index(a)), latency_s=0.004)
        for a in sites
        for b in sites
    ]
    links.append(Link(source="field-1", target="office-1", bandwidth_bytes_per_s=5e7, latency_s=0.0005))
    return Cluster(name="farm", devices=tuple(made), links=tuple(links))


def wide_plan(graph: ModelGraph, cluster: Cluster) -> Plan:
    """Five stages on all devices of ``wide_cluster``."""
    ids = [d.id for d in sorted(cluster.devices, key=lambda d: d.speed)]
    groups = (ids[0:8], ids[8:11], ids[11:13], ids[13:15], ids[15:])
    bounds = (0, 2, 5, 8, 12, 17)
    stages: list[Stage] = []
    for index, group in enumerate(groups):
        rows = [24 // len(group) + (1 if r < 24 % len(group) else 0) for r in range(len(group))]
        replicas = tuple(Replica(device=d, rows=n) for d, n in zip(group, rows, strict=True))
        stages.append(
            Stage(start=bounds[index], stop=bounds[index + 1], replicas=replicas, warmup=9 - 2 * index)
        )
    return Plan(
        strategy="hpp", graph_digest=graph.digest, micro_batches=24, micro_batch_rows=24,
        sources=stages[0].replicas, stages=tuple(stages), syncs=natural_syncs(tuple(stages), graph),
    )  # fmt: skip


def profile_for(graph: ModelGraph, cluster: Cluster) -> Profile:
    """Times in proportion to FLOPs at 6 GFLOP/s."""
    rows = (1, 8, 16)
    table = TimeTable(
        rows=rows,
        layers=tuple(
            LayerTimes(
                forward_s=tuple(r * layer.forward_flops / 6e9 for r in rows),
                backward_s=tuple(r * layer.backward_flops / 6e9 for r in rows),
            )
            for layer in graph.layers
        ),
        update_s_per_byte=2e-9,
    )
    devices = tuple(DeviceTimes(device=d.id, factor=1 / d.speed) for d in cluster.devices)
    return Profile(graph_digest=graph.digest, tables=(table,), devices=devices)


class _Play:
    """Plays a Program: devices in order, links first come first served."""

    def __init__(
        self, program: Program, plan: Plan, cluster: Cluster, profile: Profile, noise: float
    ) -> None:
        self.program, self.plan, self.cluster, self.profile = program, plan, cluster, profile
        self.noise, self.random = noise, random.Random(7)
        self.free = dict.fromkeys(program.devices, 0.0)
        self.lane_free: dict[str, float] = {}
        self.arrived: dict[tuple[int, int], float] = {}
        self.sums: dict[tuple[int, int, int], dict[str, float]] = {}
        self.spans: list[Span] = []
        self.sent = dict.fromkeys(program.devices, 0)

    def run(self, steps: int) -> None:
        queues = {
            d: [(s, a) for s in range(steps) for a in actions] for d, actions in self.program.devices.items()
        }
        moved = True
        while moved:
            moved = False
            for device, queue in queues.items():
                while queue and self._take(device, *queue[0]):
                    queue.pop(0)
                    moved = True
        assert not any(queues.values())

    def _take(self, device: str, step: int, action: Action) -> bool:
        now = self.free[device]
        if action.kind == "recv":
            if (step, action.transfer) not in self.arrived:
                return False
            self._wait(device, step, action, self.arrived[step, action.transfer])
        elif action.kind == "send":
            lane = f"{device}>{action.peer}"
            route = self.cluster.route(device, action.peer)
            start = max(now, self.lane_free.get(lane, 0.0))
            end = start + action.nbytes / route.bandwidth_bytes_per_s * self._factor()
            self.lane_free[lane] = end
            self.arrived[step, action.transfer] = end + route.latency_s
            self._span(lane, "send", action, start, end, step)
            self.sent[device] += action.nbytes
        elif action.kind == "reduce":
            self.sums.setdefault((step, action.sync, action.segment), {})[device] = now
        elif action.kind == "step":
            own = [a for a in self.program.devices[device] if a.kind == "reduce"]
            ready = now
            for a in own:
                times = self.sums.get((step, a.sync, a.segment), {})
                if set(times) != set(a.members):
                    return False
                begin = max(times.values())
                end = begin + a.nbytes / 25e6 + 0.004
                peer = a.members[(a.members.index(device) + 1) % len(a.members)]
                self._span(f"{device}>{peer}", "reduce", a, begin, end, step)
                ready = max(ready, end)
            self._wait(device, step, action, ready)
            self._compute(device, step, action, 0.004 * self._factor())
        elif action.kind in ("forward", "backward"):
            stage = self.plan.stages[action.stage]
            rows = action.rows[1] - action.rows[0]
            time_of = self.profile.forward_s if action.kind == "forward" else self.profile.backward_s
            self._compute(
                device, step, action, time_of(device, stage.start, stage.stop, rows) * self._factor()
            )
        return True

    def _factor(self) -> float:
        return 1.0 + self.noise * self.random.random()

    def _wait(self, device: str, step: int, action: Action, until: float) -> None:
        if until > self.free[device]:
            self._span(device, "wait", action, self.free[device], until, step)
            self.free[device] = until

    def _compute(self, device: str, step: int, action: Action, seconds: float) -> None:
        start = self.free[device]
        self.free[device] = start + seconds
        self._span(device, action.kind, action, start, start + seconds, step)

    def _span(self, lane: str, kind: str, action: Action, start: float, end: float, step: int) -> None:
        self.spans.append(Span(lane=lane, kind=kind, action=str(action), start_s=start, end_s=end, step=step))


def play(plan: Plan, graph: ModelGraph, cluster: Cluster, *, noise: float = 0.0, steps: int = 3) -> Timeline:
    """A timeline of a plan; with noise it passes for a measured one."""
    program = lower(plan, graph)
    player = _Play(program, plan, cluster, profile_for(graph, cluster), noise)
    player.run(steps)
    ends = [max(s.end_s for s in player.spans if s.step == k and s.kind == "step") for k in range(steps)]
    step_time = ends[-1] - ends[-2] if steps > 1 else ends[0]
    uses: list[DeviceUse] = []
    memory: list[MemoryPoint] = []
    for device in program.devices:
        kinds = ("forward", "backward", "step")
        busy = sum(s.seconds for s in player.spans if s.lane == device and s.kind in kinds) / steps
        peak = int(cluster.device(device).memory_bytes * (0.2 + 0.5 * player.random.random() + noise / 3))
        sent = player.sent[device] // steps
        share = busy / step_time
        uses.append(
            DeviceUse(device=device, busy_s=busy, utilization=share, peak_memory_bytes=peak, sent_bytes=sent)
        )
        memory += [MemoryPoint(device=device, at_s=k * step_time, bytes=peak - k) for k in range(steps)]
    return Timeline(
        origin="measured" if noise else "simulated",
        step_time_s=step_time,
        spans=tuple(player.spans),
        memory=tuple(memory),
        devices=tuple(uses),
    )


def write_run(
    path: Path,
    *,
    graph: ModelGraph | None = None,
    cluster: Cluster | None = None,
    plan: Plan | None = None,
    steps: int = 120,
    epochs: int = 6,
    name: str = "digits",
) -> RunFolder:
    """A complete run folder."""
    graph = graph or small_graph()
    cluster = cluster or default_cluster()
    plan = plan or hybrid_plan(graph)
    folder = RunFolder.create(path)
    job = Job(
        name=name, model=Recipe(name="spanwise.zoo:mobilenet_v2", args={"classes": 10}),
        data=Recipe(name="spanwise.zoo:digits"), batch=plan.batch, epochs=epochs, clip_norm=1.0,
    )  # fmt: skip
    job.save(folder.job)
    cluster.save(folder.cluster)
    graph.save(folder.graph)
    plan.save(folder.plan)
    profile_for(graph, cluster).save(folder.profile)
    simulated = play(plan, graph, cluster)
    measured = play(plan, graph, cluster, noise=0.12)
    simulated.save(folder.simulated)
    measured.save(folder.measured)
    _write_metrics(folder, steps, epochs, measured.step_time_s)
    use = {u.device: u.model_dump(exclude={"device", "busy_s"}) for u in measured.devices}
    folder.write_json(
        folder.summary,
        {
            "strategy": plan.strategy,
            "step_time_s": measured.step_time_s,
            "throughput_samples_per_s": plan.batch / measured.step_time_s,
            "predicted": {"step_time_s": simulated.step_time_s},
            "measured": {"step_time_s": measured.step_time_s},
            "devices": use,
            "loss": 0.137,
            "accuracy": 0.957,
        },
    )
    versions = {"python": "3.11.2", "torch": "2.13.0", "spanwise": "0.1.0"}
    folder.write_json(folder.env, {"versions": versions, "cores": 2, "memory_bytes": 8 * 2**30,
                                   "command": ["spanwise", "train", "job.toml"]})  # fmt: skip
    return folder


def _write_metrics(folder: RunFolder, steps: int, epochs: int, step_time_s: float) -> None:
    rng = random.Random(3)
    lines: list[str] = []
    per_epoch = max(1, steps // max(epochs, 1))
    for step in range(1, steps + 1):
        loss = 0.1 + 2.2 * math.exp(-3.0 * step / steps) + 0.12 * rng.random()
        time = step_time_s * (1 + 0.1 * rng.random())
        lines.append(json.dumps({"event": "step", "step": step, "loss": loss, "step_time_s": time,
                                 "samples_per_s": 96 / time}))  # fmt: skip
        if step % per_epoch == 0:
            epoch = step // per_epoch
            accuracy = 0.972 - 0.8 * math.exp(-4.0 * step / steps)
            lines.append(json.dumps({"event": "epoch", "epoch": epoch, "step": step, "accuracy": accuracy,
                                     "loss": loss, "test_loss": loss + 0.05}))  # fmt: skip
    folder.metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
