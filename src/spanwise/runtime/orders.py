"""A run and its changes of plan as they travel from coordinator to worker, written and read in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import safetensors.torch
from torch import Tensor

from spanwise.core.cluster import Cluster
from spanwise.core.errors import PlanError
from spanwise.core.faults import Fault
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan
from spanwise.core.program import ProgramFile
from spanwise.lowering import Move
from spanwise.ops.opgraph import OpGraph
from spanwise.runtime.device_run import Assignment
from spanwise.runtime.feed import Rows


def whole(assignment: Assignment) -> dict[str, Any]:
    """All that a device needs to know."""
    return {
        **plan_only(assignment),
        "job": assignment.job.to_data(),
        "cluster": assignment.cluster.to_data(),
        "graph": assignment.graph.to_data(),
        "ops": assignment.ops.to_json(),
        "dataset_rows": assignment.dataset_rows,
        "emulate": assignment.emulate,
        "observe": assignment.observe,
        "faults": [fault.to_data() for fault in assignment.faults],
        "tight": list(assignment.tight),
    }


def plan_only(assignment: Assignment) -> dict[str, Any]:
    """What a change of plan changes, for a device that knows the rest."""
    return {
        "plan": assignment.plan.to_data(),
        "plan_digest": assignment.plan.digest,
        "program": ProgramFile.of(assignment.program).to_data(),
    }


def is_whole(head: dict[str, Any]) -> bool:
    """Whether it describes a run from the ground up."""
    return "graph" in head


def read_whole(head: dict[str, Any]) -> Assignment:
    """What ``whole`` wrote."""
    return Assignment(
        Job.parse(head["job"]),
        Cluster.parse(head["cluster"]),
        ModelGraph.parse(head["graph"]),
        OpGraph.from_json(head["ops"]),
        _plan(head),
        ProgramFile.parse(head["program"]).program(),
        int(head["dataset_rows"]),
        bool(head["emulate"]),
        bool(head["observe"]),
        tuple(Fault.parse(fault) for fault in head["faults"]),
        tuple(str(device) for device in head["tight"]),
    )


def read_plan(head: dict[str, Any], before: Assignment) -> Assignment:
    """The same run under the plan that ``plan_only`` wrote."""
    program = ProgramFile.parse(head["program"]).program()
    return replace(before, plan=_plan(head), program=program)


def _plan(head: dict[str, Any]) -> Plan:
    """The plan of an order; ``PlanError`` unless it is the one that all others run."""
    plan = Plan.parse(head["plan"])
    if plan.digest != head["plan_digest"]:
        raise PlanError(
            f"plan '{plan.strategy}' has digest {plan.digest} here, that of the run is "
            f"{head['plan_digest']}; start all devices with one version of spanwise and one plan"
        )
    return plan


def moves_data(moves: Sequence[Move]) -> list[list[Any]]:
    """Moves for the control channel."""
    return [[m.source, m.target, list(m.parameters), list(m.buffers), m.relayed] for m in moves]


def read_moves(data: Sequence[Sequence[Any]]) -> tuple[Move, ...]:
    """What ``moves_data`` wrote."""
    return tuple(Move(str(a), str(b), tuple(p), tuple(q), bool(late)) for a, b, p, q, late in data)


def parts(payload: bytes) -> dict[str, dict[str, Tensor]]:
    """Tensors of a payload by what stands before the first slash: ``data``, ``state`` or ``optimizer``."""
    out: dict[str, dict[str, Tensor]] = {"data": {}, "state": {}, "optimizer": {}}
    for name, tensor in (safetensors.torch.load(payload) if payload else {}).items():
        part, _, rest = name.partition("/")
        out[part][rest] = tensor
    return out


def sent_data(tensors: dict[str, Tensor]) -> Rows:
    """Live rows as a data set."""
    from torch.utils.data import TensorDataset

    return TensorDataset(*(tensors[name] for name in sorted(tensors)))
