"""What a worker can do besides running plans: time the layers of a model that arrives as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spanwise.core.errors import InputError
from spanwise.core.model import ModelGraph
from spanwise.core.profile import TimeTable
from spanwise.profiler import known

if TYPE_CHECKING:
    from spanwise.api.prepare import Prepared
    from spanwise.profiler.compute import SustainedPasses
    from spanwise.profiler.trace import Traced
    from spanwise.runtime.worker import Service


def profile_request(prepared: Prepared) -> tuple[dict[str, Any], bytes]:
    """Head and payload of a request to time a model's layers: operations, weights, no data rows."""
    import safetensors.torch

    traced = prepared.traced
    state = {f"parameter/{k}": v.detach().clone() for k, v in traced.parameters.items()}
    state |= {f"buffer/{k}": v.detach().clone() for k, v in traced.buffers.items()}
    head = {
        "graph": traced.graph.to_data(),
        "ops": traced.ops.to_json(),
        "rows": known.profile_rows(prepared.job.batch),
    }
    return head, safetensors.torch.save(state)


def table_of(head: dict[str, Any]) -> TimeTable:
    """The answer."""
    return TimeTable.parse(head["table"])


def _profile(head: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    import torch

    from spanwise.profiler.compute import measure_layers

    rows = tuple(int(r) for r in head["rows"])
    traced, sample = _arrived(head, payload, rows[-1])
    threads = torch.get_num_threads()
    table = measure_layers(
        traced, rows=rows, device=str(head["torch_device"]), threads=threads, sample=sample
    )
    return {"table": table.to_data()}, b""


class _Pace:
    """What the whole model takes here while others are at work too, or alone: set up, then timed."""

    def __init__(self) -> None:
        self._passes: SustainedPasses | None = None

    def set_up(self, head: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        """Builds the model and runs it once; takes as long as it takes."""
        import torch

        from spanwise.profiler.compute import SustainedPasses

        rows = [int(r) for r in head["pace_rows"]]
        traced, sample = _arrived(head, payload, max(rows))
        self._passes = SustainedPasses(traced, rows=rows, sample=sample, threads=torch.get_num_threads())
        return {}, b""

    def timed(self, head: dict[str, Any], _: bytes) -> tuple[dict[str, Any], bytes]:
        """From a moment on that is the same for all devices. The model goes, if it is not to be kept."""
        passes = self._passes
        if passes is None:
            raise InputError("service 'pace': nothing is set up; ask for 'pace_set_up' first")
        rows = [int(r) for r in head["pace_rows"]]
        found = passes.seconds(rows, float(head["begin_s"]), float(head["last_s"]))
        if not head["keep"]:
            self._passes = None
        return {"passes_s": found}, b""


def _arrived(head: dict[str, Any], payload: bytes, rows: int) -> tuple[Traced, Any]:
    """The model of a request, and generated rows: times do not depend on values, and raw data stays away."""
    import safetensors.torch
    import torch

    from spanwise.ops.opgraph import OpGraph
    from spanwise.profiler.trace import Traced

    graph = ModelGraph.parse(head["graph"])
    state = safetensors.torch.load(payload)
    traced = Traced(
        graph=graph,
        ops=OpGraph.from_json(head["ops"]),
        parameters={
            k.partition("/")[2]: torch.nn.Parameter(v) for k, v in state.items() if k.startswith("parameter/")
        },
        buffers={k.partition("/")[2]: v for k, v in state.items() if k.startswith("buffer/")},
    )
    inputs = tuple(_generated(spec.shape, spec.dtype, rows) for spec in graph.inputs)
    labels = tuple(_generated(spec.shape, spec.dtype, rows) for spec in graph.labels)
    return traced, (inputs, labels)


def _generated(shape: tuple[int, ...], dtype: str, rows: int) -> Any:
    import torch

    kind = getattr(torch, dtype)
    whole = (rows, *shape)
    return torch.randn(whole).to(kind) if kind.is_floating_point else torch.zeros(whole, dtype=kind)


def services() -> dict[str, Service]:
    """By name, for ``runtime.worker.join``."""
    pace = _Pace()
    return {"profile": _profile, "pace_set_up": pace.set_up, "pace": pace.timed}
