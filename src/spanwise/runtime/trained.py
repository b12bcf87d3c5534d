"""What a device trains: leaves for its optimizer, and the values and gradients of units inside of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spanwise.core.errors import InputError
from spanwise.core.job import Job
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan, Stage
from spanwise.core.program import Program
from spanwise.core.trained import parse_unit
from spanwise.lowering import units_of
from spanwise.ops.sparse import Slice, Sparse
from spanwise.runtime.exchange import gradient

Named = Mapping[str, nn.Parameter]


class TrainedPart:
    """One device's parameters, of which it trains some or some channels.

    Trained channels of a weight are a leaf of their own under the weight's name, so that gradient, optimizer
    state and weight decay know of them only; ``write_back`` puts them into the weight after a step. What the
    device does not train wants no gradient. A device that trains everything has its parameters as leaves.
    """

    def __init__(self, plan: Plan, graph: ModelGraph, device: str, parameters: Named) -> None:
        self._parameters = parameters
        self._ranking: dict[str, Tensor] = {}
        self._dimension: dict[str, int] = {}
        self.slices: dict[str, Slice] = {}
        for stage in plan.stages:
            for replica in stage.replicas:
                if replica.device == device and replica.trained is not None:
                    self._restrict(graph, stage, plan, replica.trained)
        if plan.sparse:
            self._rank(plan, graph)
        #: What an optimizer may update, by parameter.
        self.leaves: dict[str, nn.Parameter] = {
            name: self.slices[name].values if name in self.slices else parameter
            for name, parameter in parameters.items()
        }

    def _restrict(
        self, graph: ModelGraph, stage: Stage, plan: Plan, trained: Mapping[str, int | None]
    ) -> None:
        for parameter in graph.parameters_of(stage.start, stage.stop):
            name, whole = parameter.name, self._parameters[parameter.name]
            count = trained.get(name, 0)
            whole.requires_grad_(count is None)
            if count:
                dimension, _ = graph.sliceable[name]
                index = torch.tensor(plan.ranking[name][:count], device=whole.device)
                values = nn.Parameter(whole.detach().index_select(dimension, index))
                self.slices[name] = Slice(values, index)

    def _rank(self, plan: Plan, graph: ModelGraph) -> None:
        for name, order in plan.ranking.items():
            if name in self._parameters and name in graph.sliceable:
                self._dimension[name] = graph.sliceable[name][0]
                self._ranking[name] = torch.tensor(order, device=self._parameters[name].device)

    def sparse(self, plan: Plan, stage: Stage, device: str) -> Sparse | None:
        """How a stage runs here; None if it trains everything as traced."""
        replica = next(r for r in stage.replicas if r.device == device)
        if replica.trained is None and not plan.stored_statistics:
            return None
        return Sparse(self.slices, stored_statistics=bool(plan.stored_statistics))

    def gradient(self, unit: str) -> Tensor:
        """A copy of the gradient of a unit that this device trains; zeros where no row reached it."""
        name, part = parse_unit(unit)
        found = gradient(self.leaves[name])
        if part is None:
            return found.clone()
        dimension = self._dimension[name]
        if name in self.slices:
            return found.narrow(dimension, part[0], part[1] - part[0]).clone()
        return found.index_select(dimension, self._ranking[name][part[0] : part[1]])

    def set_gradient(self, unit: str, value: Tensor) -> None:
        """Puts a gradient in its place."""
        name, part = parse_unit(unit)
        self._put(gradient(self.leaves[name]), name, part, value, own=name in self.slices)

    def value(self, unit: str) -> Tensor:
        """A copy of the values of a unit, trained here or not."""
        name, part = parse_unit(unit)
        whole = self._parameters[name].detach()
        if part is None:
            return whole.clone()
        return whole.index_select(self._dimension[name], self._ranking[name][part[0] : part[1]])

    def set_value(self, unit: str, value: Tensor) -> None:
        """Overwrites the values of a unit, also those in a leaf."""
        name, part = parse_unit(unit)
        with torch.no_grad():
            self._put(self._parameters[name], name, part, value, own=False)
            own = self.slices.get(name)
            if own is not None and part is not None and part[1] <= len(own.index):
                self._put(own.values, name, part, value, own=True)

    def _put(
        self, target: Tensor, name: str, part: tuple[int, int] | None, value: Tensor, *, own: bool
    ) -> None:
        with torch.no_grad():
            if part is None:
                target.copy_(value.view_as(target))
                return
            dimension, index = self._dimension[name], self._ranking[name][part[0] : part[1]]
            shape = [*target.shape]
            shape[dimension] = len(index)
            if own:  # a leaf has its channels in the order of the ranking
                target.narrow(dimension, part[0], len(index)).copy_(value.view(shape))
            else:
                target.index_copy_(dimension, index, value.view(shape))

    def write_back(self) -> None:
        """Puts trained channels into the weights that the forward pass uses."""
        with torch.no_grad():
            for name, own in self.slices.items():
                self._parameters[name].index_copy_(self._dimension[name], own.index, own.values)

    def widened(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Optimizer state by parameter in the shape of the whole parameter; zeros for what is not trained."""
        out: dict[str, Tensor] = {}
        for entry, value in state.items():
            name = entry.partition("::")[0]
            own = self.slices.get(name)
            if own is None or value.shape != own.values.shape:
                out[entry] = value
                continue
            whole = torch.zeros(self._parameters[name].shape, dtype=value.dtype)
            out[entry] = whole.index_copy_(self._dimension[name], own.index.cpu(), value)
        return out

    def narrowed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The other way: of whole parameters what this device trains."""
        out: dict[str, Tensor] = {}
        for entry, value in state.items():
            name = entry.partition("::")[0]
            own, whole = self.slices.get(name), self._parameters.get(name)
            if own is None or whole is None or value.shape != whole.shape:
                out[entry] = value
            else:
                out[entry] = value.index_select(self._dimension[name], own.index.cpu())
        return out


def check_masked(plan: Plan, job: Job) -> None:
    """``InputError`` if values are to be averaged after updates that are not linear in the gradient."""
    if job.optimizer.name != "SGD" and any(group.way == "masked" for group in plan.groups):
        raise InputError(
            f"plan '{plan.strategy}': a masked sum averages values after the update, which is the update by "
            f"the mean gradient for SGD only, not for {job.optimizer.name}; choose grouped sums or SGD"
        )


class MergedUnits:
    """Values of whole parameters from the devices that train their units, as in a checkpoint."""

    def __init__(self, plan: Plan, graph: ModelGraph) -> None:
        self._plan, self._graph = plan, graph
        self._units = {unit.text: unit for unit in units_of(plan, graph)}

    def put(self, target: dict[str, Tensor], source: Mapping[str, Tensor], unit: str, key: str) -> None:
        """Copies a unit of ``source[key]`` into ``target[key]``; all of it if the unit is."""
        name, part = parse_unit(unit)
        value = source[key]
        if part is None or key not in target or value.shape != target[key].shape or not value.dim():
            target.setdefault(key, value.clone())
            if part is None:
                target[key] = value
            return
        index = torch.tensor(self._plan.ranking[name][part[0] : part[1]])
        dimension, _ = self._graph.sliceable[name]
        target[key].index_copy_(dimension, index, value.index_select(dimension, index))


def merged_parameters(
    plan: Plan, graph: ModelGraph, program: Program, states: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and optimizer state of a whole run, each unit from the first device that trains it.

    What nobody trains is the same everywhere. Devices that average values after the step may differ in their
    optimizer state: the first one's is taken.
    """
    units = MergedUnits(plan, graph)
    parameters: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    for device, names in program.reported.items():
        for name in names if device in states else ():
            parameters.setdefault(name, states[device].parameters[name].clone())
    for device, texts in program.owned.items():
        if device not in states:
            continue
        state = states[device]
        for text in texts:
            name = parse_unit(text)[0]
            units.put(parameters, state.parameters, text, name)
            for key in state.optimizer:
                if key.partition("::")[0] == name:
                    units.put(optimizer, state.optimizer, text, key)
    return parameters, optimizer
