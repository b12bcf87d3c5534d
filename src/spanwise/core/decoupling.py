"""A Decoupling: one classifier divided by its classes into narrow sub-models that train apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Literal

from pydantic import Field, model_validator

from spanwise.core.cluster import Id
from spanwise.core.errors import InputError
from spanwise.core.noun import Noun

LayerKind = Literal["conv", "depthwise", "linear", "norm", "head"]
Source = Literal["sample", "whole", "divided"]
Policy = Literal["none", "pool", "all", "public"]
Loss = Literal["softmax", "sigmoid"]
ReadOut = Literal["probability", "margin", "plain"]
Sharing = Literal["frozen", "averaged"]

# What leaves a device so that another one has negatives; read it before choosing a policy.
PRIVACY: dict[Policy, str] = {
    "none": "no sample leaves its device",
    "pool": "a few samples of every class go to every device that does not own the class, once",
    "all": "every sample goes to every device",
    "public": "no private sample leaves its device; a data set that everybody may see goes to all",
}


class Axis(Noun):
    """The features of a tensor behind its rows: ``channels``, each with ``repeat`` features in a row.

    ``repeat`` is 1 until a flattening (then height x width) or a depthwise convolution with a multiplier.
    """

    channels: int = Field(ge=1)
    repeat: int = Field(default=1, ge=1)

    @property
    def size(self) -> int:
        """Features in all."""
        return self.channels * self.repeat


class LayerShape(Noun):
    """A layer with weights, as far as its division and its arithmetic need it.

    Attributes:
        name: the module's path in the target.
        kind: ``head`` is the last linear layer, one output a class.
        reads, gives: features of its input and of its result, in the target.
        source: whether it reads the sample, channels that every sub-model has whole, or divided ones.
        whole: whether every sub-model has all of its channels: one of the shared first layers.
        kernel: weights of one input channel for one result (9 for 3 x 3; 1 for linear; 0 for a norm).
        positions: results of one output channel (height x width; 1 for linear).
        bias: whether it has one.
    """

    name: str
    kind: LayerKind
    reads: Axis
    gives: Axis
    source: Source
    whole: bool = False
    kernel: int = Field(default=1, ge=0)
    positions: int = Field(default=1, ge=1)
    bias: bool = True


class TargetNet(Noun):
    """The network that is divided: its layers with weights, in order, the head last."""

    name: str
    layers: tuple[LayerShape, ...] = Field(min_length=2)

    @property
    def head(self) -> LayerShape:
        """The last layer."""
        return self.layers[-1]

    @property
    def classes(self) -> int:
        """K."""
        return self.head.gives.size

    @property
    def shared(self) -> bool:
        """Whether some first layers stay whole."""
        return any(layer.whole for layer in self.layers)

    @cached_property
    def divided(self) -> tuple[LayerShape, ...]:
        """Layers whose result is divided; the head is apart, it is divided by classes."""
        return tuple(layer for layer in self.layers[:-1] if not layer.whole)


class Negatives(Noun):
    """Samples of foreign classes that a sub-model sees, all as one class "other".

    ``per_class``: of a ``pool``, samples of each foreign class. ``privacy`` says what each policy costs.
    """

    policy: Policy = "all"
    per_class: int = Field(default=20, ge=1)

    @property
    def privacy(self) -> str:
        """What leaves the devices."""
        return PRIVACY[self.policy]

    def repeats(self, own_rows: int, own_classes: int, negative_rows: int) -> int:
        """How often negatives are repeated in an epoch: a pool, to about the rows of one own class."""
        if self.policy != "pool" or not negative_rows:
            return 1
        return max(1, round(own_rows / own_classes / negative_rows))


class SubModel(Noun):
    """One sub-model: its classes in the order of its outputs, its share of every width, who trains it."""

    classes: tuple[int, ...] = Field(min_length=1)
    share: float = Field(gt=0, le=1)
    device: Id | None = None


class Division(Noun):
    """How every axis of this many channels is divided: channels of each sub-model, in order.

    Axes of equal length are divided alike, so tensors of two layers can be added.
    """

    channels: int
    parts: tuple[int, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> Division:
        if min(self.parts) < 1 or sum(self.parts) != self.channels:
            raise InputError(
                f"decoupling: {self.channels} channels divided into {', '.join(map(str, self.parts))}; "
                "parts must be 1 or more and add up"
            )
        return self


class Decoupling(Noun):
    """Which sub-model has which classes and channels, what it learns from, how scores are compared.

    Attributes:
        net: the target.
        groups: the sub-models. Their class lists hold every class once.
        divisions: of every number of channels that is divided.
        negatives: what sub-models see of foreign classes.
        loss: ``softmax`` over the own classes and, with negatives, "other" as output 0; ``sigmoid``: binary
            cross-entropy of every own class.
        read_out: how the merged network's scores follow from the sub-models' outputs: ``probability``, the
            log-probability of the class in its sub-model; ``margin``, its logit less that of "other";
            ``plain``, the logit.
        sharing: of the first layers that every sub-model has whole: ``frozen`` as they are in the target, or
            ``averaged`` over the sub-models in rounds.
    """

    net: TargetNet
    groups: tuple[SubModel, ...] = Field(min_length=1)
    divisions: tuple[Division, ...]
    negatives: Negatives = Negatives()
    loss: Loss = "softmax"
    read_out: ReadOut = "margin"
    sharing: Sharing = "frozen"

    @model_validator(mode="after")
    def _whole(self) -> Decoupling:
        check_classes([group.classes for group in self.groups], self.net.classes)
        for division in self.divisions:
            if len(division.parts) != len(self.groups):
                raise InputError(
                    f"decoupling: {division.channels} channels in {len(division.parts)} parts, but "
                    f"{len(self.groups)} sub-models; give each a part"
                )
        for layer in self.net.divided:
            self.parts(layer)
        if self.read_out != "plain" and not self.other:
            raise InputError(
                f"decoupling: read-out '{self.read_out}' compares with an output \"other\", which "
                f"{'sigmoid' if self.loss == 'sigmoid' else 'a sub-model without negatives'} has not; "
                "use 'plain'"
            )
        if self.negatives.policy == "none":
            self._refuse_single_classes()
        return self

    def _refuse_single_classes(self) -> None:
        for index, group in enumerate(self.groups):
            if len(group.classes) == 1:
                raise InputError(
                    f"decoupling: sub-model {index} has one class ({group.classes[0]}) and no negatives, so "
                    "there is nothing to tell apart; give it more classes or a negatives policy"
                )

    @property
    def other(self) -> bool:
        """Whether sub-models have an output "other", as output 0."""
        return self.loss == "softmax" and self.negatives.policy != "none"

    def outputs(self, group: int) -> int:
        """Outputs of a sub-model."""
        return len(self.groups[group].classes) + self.other

    def parts(self, layer: LayerShape) -> tuple[int, ...]:
        """Channels of a divided layer's result in every sub-model."""
        return self._parts_of(layer.gives.channels, layer.name)

    def _parts_of(self, channels: int, where: str) -> tuple[int, ...]:
        found = self._divisions.get(channels)
        if found is None:
            raise InputError(f"decoupling: layer '{where}': nothing says how its {channels} channels divide")
        return found

    @cached_property
    def _divisions(self) -> dict[int, tuple[int, ...]]:
        return {division.channels: division.parts for division in self.divisions}

    def gives(self, layer: LayerShape, group: int) -> tuple[int, int]:
        """Half-open range of the features of a layer's result that a sub-model has.

        Of the head: of its rows, where the outputs of all sub-models follow each other.
        """
        if layer.kind == "head":
            sizes = [self.outputs(g) for g in range(len(self.groups))]
            return _range(sizes, group, 1)
        if layer.whole:
            return 0, layer.gives.size
        return _range(self.parts(layer), group, layer.gives.repeat)

    def reads(self, layer: LayerShape, group: int) -> tuple[int, int]:
        """Half-open range of the features of a layer's input that a sub-model has."""
        if layer.source != "divided":
            return 0, layer.reads.size
        parts = self._parts_of(layer.reads.channels, layer.name)
        return _range(parts, group, layer.reads.repeat)

    @property
    def order(self) -> tuple[int, ...]:
        """Classes as the sub-models list them, one after the other."""
        return tuple(k for group in self.groups for k in group.classes)


def check_classes(groups: Sequence[Sequence[int]], classes: int) -> None:
    """``InputError`` unless the lists hold each of the classes ``0`` to ``classes - 1`` once."""
    seen: dict[int, int] = {}
    for index, group in enumerate(groups):
        for k in group:
            if not 0 <= k < classes:
                raise InputError(
                    f"decoupling: sub-model {index} has class {k}, the model knows 0 to {classes - 1}; "
                    "remove it"
                )
            if k in seen:
                raise InputError(
                    f"decoupling: class {k} is in sub-models {seen[k]} and {index}; each class has one, "
                    "remove it from the other"
                )
            seen[k] = index
    missing = [str(k) for k in range(classes) if k not in seen]
    if missing:
        raise InputError(
            f"decoupling: no sub-model has class {', '.join(missing)} of {classes}; put each into a group"
        )


def _range(parts: Sequence[int], group: int, repeat: int) -> tuple[int, int]:
    ends = [0, *accumulate(parts)]
    return ends[group] * repeat, ends[group + 1] * repeat
