"""How much the loss gains from training each parameter and each channel of it, as a probe found."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from spanwise.core.noun import Noun

Method = Literal["first_order", "magnitude", "contribution"]


class ParameterScore(Noun):
    """The gain of one parameter, and of its channels where these can be trained one by one.

    Gains are of one optimizer step, in units of the loss, or in any unit that is the same for all: only their
    ratios count. ``channels`` add up to ``score`` or are in proportion to it.
    """

    parameter: str
    score: float
    channels: tuple[float, ...] | None = None


class Importance(Noun):
    """Scores of all parameters of a model.

    ``method``: ``first_order`` by one step of the optimizer, ``magnitude`` by the size of the weights,
    ``contribution`` by training each alone. ``stored_statistics``: whether BatchNorm used its stored
    statistics, and will. ``from_scratch``: whether the model was never trained before.
    """

    graph_digest: str
    method: Method = "first_order"
    stored_statistics: bool = True
    from_scratch: bool = False
    scores: tuple[ParameterScore, ...]

    @cached_property
    def by_parameter(self) -> dict[str, ParameterScore]:
        """Scores by name."""
        return {one.parameter: one for one in self.scores}

    def ranking(self, parameter: str) -> tuple[int, ...]:
        """Channels of a parameter, the most important first; of equals the first."""
        channels = self.by_parameter[parameter].channels or ()
        return tuple(sorted(range(len(channels)), key=lambda c: (-channels[c], c)))
