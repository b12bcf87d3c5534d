"""The model as planners see it: a chain of layers and what crosses the cut behind each."""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property

from pydantic import Field, model_validator

from spanwise.core.errors import InputError
from spanwise.core.noun import Noun


class TensorSpec(Noun):
    """One tensor of one row (sample): ``shape`` is without the batch dimension, which is first."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    item_bytes: int = Field(gt=0)
    differentiable: bool = True

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        count = self.item_bytes
        for size in self.shape:
            count *= size
        return count


class Parameter(Noun):
    """A trained tensor under the model's own name. Tied parameters have one name in several layers."""

    name: str
    shape: tuple[int, ...]
    bytes: int = Field(ge=0)


class Layer(Noun):
    """The part of the model between two neighbouring cuts.

    Attributes:
        name: the module path most of its operations come from.
        ops: half-open range of operations in the traced graph.
        forward_flops, backward_flops: per row; a multiply-add counts as two. ``weight_flops``: the part of
            backward that gives the gradients of the products' weights and can wait.
        parameters: what it trains. ``buffers``: names of its persistent, untrained state.
        outputs: every tensor that crosses the cut behind it, skip connections included; empty
            for the last layer, whose result is the loss.
        saved_bytes: kept between forward and backward, per row, measured by saved-tensor hooks.
        saved_fixed_bytes: the same, once per micro-batch whatever its rows.
        deferred_bytes: kept between the two halves of a backward, per row: inputs and result gradients of the
            products whose weight gradients wait.
        batch_statistics: whether it mixes rows (BatchNorm in training), so that a replica's result
            depends on which rows it holds.
    """

    name: str
    ops: tuple[int, int]
    forward_flops: float = Field(ge=0)
    backward_flops: float = Field(ge=0)
    weight_flops: float = Field(default=0.0, ge=0)
    parameters: tuple[Parameter, ...] = ()
    buffers: tuple[str, ...] = ()
    buffer_bytes: int = Field(default=0, ge=0)
    outputs: tuple[TensorSpec, ...] = ()
    saved_bytes: int = Field(default=0, ge=0)
    saved_fixed_bytes: int = Field(default=0, ge=0)
    deferred_bytes: int = Field(default=0, ge=0)
    batch_statistics: bool = False

    @property
    def parameter_bytes(self) -> int:
        """Bytes of its parameters, tied ones included."""
        return sum(parameter.bytes for parameter in self.parameters)

    @property
    def cut_bytes(self) -> int:
        """Bytes per row that cross the cut behind it, forward."""
        return sum(spec.row_bytes for spec in self.outputs)

    @property
    def gradient_cut_bytes(self) -> int:
        """Bytes per row that come back over the cut behind it."""
        return sum(spec.row_bytes for spec in self.outputs if spec.differentiable)


class ModelGraph(Noun):
    """A model and its loss as a chain of layers. The last layer computes the loss.

    ``inputs`` and ``labels`` are what one row of the data holds. ``source_digest`` is that of the traced
    operations: equal digests run the same arithmetic.
    """

    name: str
    source_digest: str
    layers: tuple[Layer, ...] = Field(min_length=1)
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    labels: tuple[TensorSpec, ...] = ()

    @model_validator(mode="after")
    def _is_chain(self) -> ModelGraph:
        for before, after in zip(self.layers, self.layers[1:], strict=False):
            if before.ops[1] != after.ops[0]:
                raise InputError(
                    f"model '{self.name}': layer '{after.name}' starts at operation {after.ops[0]}, "
                    f"but '{before.name}' ends at {before.ops[1]}; layers must follow each other"
                )
            if not before.outputs:
                raise InputError(f"model '{self.name}': nothing crosses the cut behind layer '{before.name}'")
        if self.layers[-1].outputs:
            raise InputError(f"model '{self.name}': the last layer must end in the loss")
        return self

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def ties(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Parameters used by more than one layer: (name, layer indices)."""
        return tuple((name, where) for name, where in self.users.items() if len(where) > 1)

    @cached_property
    def users(self) -> dict[str, tuple[int, ...]]:
        """Indices of the layers that use each parameter."""
        found: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            for parameter in layer.parameters:
                found.setdefault(parameter.name, []).append(index)
        return {name: tuple(where) for name, where in found.items()}

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter once, in order of first use."""
        return self.parameters_of(0, len(self.layers))

    def parameters_of(self, start: int, stop: int) -> tuple[Parameter, ...]:
        """Parameters of layers ``[start, stop)``, each once, in order of first use."""
        known = self._parameters_of
        if (start, stop) not in known:
            found = {p.name: p for layer in self.layers[start:stop] for p in layer.parameters}
            known[start, stop] = tuple(found.values())
        return known[start, stop]

    @cached_property
    def _parameters_of(self) -> dict[tuple[int, int], tuple[Parameter, ...]]:
        return {}

    def layer_of(self, op: int) -> int:
        """Index of the layer that has an operation of the traced graph in its range."""
        return bisect_right([layer.ops[1] for layer in self.layers], op)

    def cut_before(self, layer: int) -> tuple[TensorSpec, ...]:
        """What enters layer ``layer``: the inputs of the model, or what the layer before lets through."""
        return self.inputs if layer == 0 else self.layers[layer - 1].outputs

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters, tied ones once."""
        return sum(parameter.bytes for parameter in self.parameters)

    @property
    def input_row_bytes(self) -> int:
        """Bytes of one raw sample."""
        return sum(spec.row_bytes for spec in self.inputs)

    @property
    def label_row_bytes(self) -> int:
        """Bytes of one label."""
        return sum(spec.row_bytes for spec in self.labels)
