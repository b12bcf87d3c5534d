"""What a replica trains, if that is not all: parameters, channels of them, and how values are passed on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from spanwise.core.cluster import Id
from spanwise.core.errors import PlanError
from spanwise.core.noun import Noun

Way = Literal["grouped", "masked"]


class Trained(Noun):
    """A parameter that a replica trains: all of it, or the first ``channels`` of its ranking.

    Channels are those of a weight's input, of a depthwise weight those of its filters: a device that trains
    some of them keeps no others for backward.
    """

    parameter: str
    channels: int | None = Field(default=None, ge=1)


class Ranking(Noun):
    """The channels of a weight from the most important on, as text: ``"3 0 2 1"``."""

    parameter: str
    order: str

    @model_validator(mode="after")
    def _permutation(self) -> Ranking:
        words = self.order.split()
        if not words or sorted(words) != sorted(map(str, range(len(words)))):
            raise PlanError(
                f"plan: ranking of '{self.parameter}' must have each of its channels once, from 0 on"
            )
        return self

    @property
    def channels(self) -> tuple[int, ...]:
        """Indices of channels, the most important first."""
        return tuple(map(int, self.order.split()))


class GroupSync(Noun):
    """Units that exactly ``trainers`` train, in these layers, given to all devices that hold them.

    A unit is a parameter or some channels of it. Its gradient is the mean over its trainers' rows only.
    ``grouped``: the trainers sum gradients by a ring and update; then the first of them sends the new values
    to the ``receivers`` along a chain, every ``refresh_every`` steps; in between these compute with old ones.
    ``masked``: every trainer updates by its own gradient; then one ring over trainers and receivers gives all
    of them the mean of the trainers' values by rows. The same values, where an update is linear in the
    gradient, as that of SGD with momentum is. ``segments`` cuts the units into so many messages.
    """

    layers: tuple[tuple[int, int], ...] = Field(min_length=1)
    trainers: tuple[Id, ...] = Field(min_length=1)
    receivers: tuple[Id, ...] = ()
    way: Way = "grouped"
    segments: int = Field(default=1, ge=1)
    refresh_every: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _a_group(self) -> GroupSync:
        if len(self.devices) < 2 or len(set(self.devices)) != len(self.devices):
            raise PlanError(
                f"plan: a group of trainers {', '.join(self.trainers)} and receivers "
                f"{', '.join(self.receivers) or 'none'} must have two devices at least, each once"
            )
        if self.way == "masked" and self.refresh_every > 1:
            raise PlanError(
                f"plan: group {', '.join(self.trainers)} is masked and refreshed every {self.refresh_every} "
                "steps; a masked sum gives values to all in every step, use 'grouped'"
            )
        return self

    @property
    def devices(self) -> tuple[str, ...]:
        """All that take part, trainers first."""
        return self.trainers + self.receivers

    @property
    def chain(self) -> tuple[str, ...]:
        """Along which new values go, where the way is ``grouped``: from the first trainer on."""
        return (self.trainers[0], *self.receivers)


def unit_text(parameter: str, first: int, last: int, channels: int) -> str:
    """Name of a unit: a parameter, or a half-open range of the ranking of its ``channels``."""
    return parameter if (first, last) == (0, channels) else f"{parameter}[{first}:{last})"


def parse_unit(text: str) -> tuple[str, tuple[int, int] | None]:
    """The parameter of a unit, and its range of the ranking; None if the unit is all of the parameter."""
    name, bracket, rest = text.partition("[")
    if not bracket:
        return name, None
    first, _, last = rest.rstrip(")").partition(":")
    return name, (int(first), int(last))
