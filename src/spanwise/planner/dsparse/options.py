"""What can be trained of each part of a model, how many bytes it takes and what it gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from spanwise.core.importance import Importance
from spanwise.core.model import ModelGraph, Site
from spanwise.cost.sparse import Trains, sparse_saved_bytes, sparse_state_bytes, transient_bytes, unit_bytes

RATIOS = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Option:
    """Some of a part's parameters: channels, or None for all, by name.

    ``gain`` is its score. ``own_bytes``: kept for backward, gradient, state and copy, for nothing but itself.
    ``behind_bytes``: kept by what follows in the part itself if nothing before it trains.
    """

    trains: tuple[tuple[str, int | None], ...]
    gain: float = 0.0
    own_bytes: int = 0
    behind_bytes: int = 0
    parameter_bytes: int = 0


@dataclass(frozen=True)
class Part:
    """A product with what follows it up to the next one, or another operation with parameters.

    ``options`` rise: each trains all that the one before trains, the first nothing. ``fixed_bytes``: kept by
    its operations whatever of it trains, once something before it does.
    """

    sites: tuple[int, ...]
    options: tuple[Option, ...]
    fixed_bytes: int


@dataclass(frozen=True)
class Selectable:
    """A whole model on a device's rows of a micro-batch, and what its optimizer and BatchNorm need."""

    graph: ModelGraph
    importance: Importance
    rows: int
    copies: int
    stored: bool = True
    ratios: tuple[float, ...] = RATIOS

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """In order."""
        return tuple(site for sites in self.graph.sites for site in sites)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """From the first to the last."""
        return _Parts(self).found()

    @cached_property
    def constant_bytes(self) -> int:
        """Held whatever trains: weights, buffers, and what the largest operation works with."""
        layers = len(self.graph)
        held = sparse_state_bytes(self.graph, 0, layers, {}, self.copies)
        return held + transient_bytes(self.graph, 0, layers, self.rows)

    @cached_property
    def after_bytes(self) -> tuple[int, ...]:
        """By part: kept by the parts behind it when it is the first of which something trains."""
        out: list[int] = []
        total = 0
        for part in reversed(self.parts):
            out.append(total)
            total += part.fixed_bytes
        return tuple(reversed(out))

    def trains(self, choice: Sequence[int]) -> dict[str, int | None]:
        """What trains, by the number of the option of each part."""
        return {
            name: count
            for part, number in zip(self.parts, choice, strict=True)
            for name, count in part.options[number].trains
        }

    def peak_bytes(self, trains: Trains) -> int:
        """Most bytes of a forward and backward when this trains, gradients and optimizer state included.

        An upper bound: gradients are all there, and the largest operation works, while everything is kept.
        """
        layers = len(self.graph)
        saved = sparse_saved_bytes(self.graph, 0, layers, self.rows, trains, stored=self.stored)
        held = sparse_state_bytes(self.graph, 0, layers, trains, self.copies)
        return held + sum(saved) + transient_bytes(self.graph, 0, layers, self.rows)

    def gain(self, choice: Sequence[int]) -> float:
        """Sum of scores."""
        return sum(part.options[n].gain for part, n in zip(self.parts, choice, strict=True))


class _Parts:
    """Groups sites into parts: each product opens one, norms and activations behind it belong to it."""

    def __init__(self, model: Selectable) -> None:
        self.model = model

    def found(self) -> tuple[Part, ...]:
        groups: list[list[int]] = []
        for number, site in enumerate(self.model.sites):
            opens = site.kind in ("conv", "depthwise", "linear") or bool(site.others)
            if opens or not groups:
                groups.append([])
            groups[-1].append(number)
        return tuple(self._part(tuple(group)) for group in groups)

    def _part(self, numbers: tuple[int, ...]) -> Part:
        sites = [self.model.sites[n] for n in numbers]
        fixed = sum(self._frozen(site) for site in sites)
        shifts = tuple((site.shift, None) for site in sites if site.shift)
        shifts += tuple((name, None) for site in sites for name in site.others)
        chosen: list[tuple[tuple[str, int | None], ...]] = [()]
        if shifts:
            chosen.append(shifts)
        weight = sites[0].weight if sites[0].kind in ("conv", "depthwise", "linear") else ""
        if weight:
            chosen += [(*shifts, (weight, count)) for count in self._counts(sites[0])]
        return Part(numbers, tuple(self._option(one, sites) for one in chosen), fixed)

    def _counts(self, site: Site) -> list[int | None]:
        """Numbers of channels by ratio, rising; None for all."""
        if not site.channels:
            return [None]
        counts = {ceil(ratio * site.channels) for ratio in self.model.ratios}
        return [None if count >= site.channels else count for count in sorted(counts)]

    def _frozen(self, site: Site) -> int:
        """Kept by an operation behind one that trains, whatever of it trains."""
        model, rows = self.model, self.model.rows
        match site.kind:
            case "conv" | "depthwise" | "linear":
                return 0
            case "relu":
                return rows * site.elements
            case "norm" | "fixed_norm" if model.stored or site.kind == "fixed_norm":
                return site.item_bytes * site.channels
            case _:
                return sum(one.row_bytes * rows + one.fixed_bytes for one in site.kept)

    def _option(self, trains: tuple[tuple[str, int | None], ...], sites: Sequence[Site]) -> Option:
        if not trains:
            return Option(())
        model, by_name = self.model, dict(trains)
        nbytes = unit_bytes(model.graph, by_name)
        own = sum(nbytes.values()) * (1 + model.copies)
        own += sum(nbytes[name] for name, count in trains if count is not None)
        first = sites[0]
        if first.weight in by_name and first.kind in ("conv", "depthwise", "linear"):
            count = by_name[first.weight]
            if count is None:
                own += sum(k.row_bytes * model.rows + k.fixed_bytes for k in first.kept[:1])
            else:
                own += model.rows * first.input_bytes // first.channels * count
        return Option(trains, self._gain(trains), own, self._behind(by_name, sites), sum(nbytes.values()))

    def _behind(self, trains: Trains, sites: Sequence[Site]) -> int:
        """What operations of the part keep behind its first that trains, if nothing before the part does."""
        first = next(i for i, site in enumerate(sites) if any(name in trains for name in site.parameters))
        batch = sites[first].kind == "norm" and not self.model.stored
        if batch or sites[first].kind == "other":  # stock ones keep the same as the first that trains
            first -= 1
        return sum(self._frozen(site) for site in sites[first + 1 :])

    def _gain(self, trains: tuple[tuple[str, int | None], ...]) -> float:
        total = 0.0
        for name, count in trains:
            score = self.model.importance.by_parameter[name]
            if count is None or score.channels is None:
                total += score.score
            else:
                order = self.model.importance.ranking(name)
                total += sum(score.channels[c] for c in order[:count])
        return total
