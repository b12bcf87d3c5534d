"""The cheapest paths of rows through layers and blocks of devices at the best prices: the bound by links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spanwise.planner.bounds.crossing import Borders
from spanwise.planner.facts.tables import Floats, Ints

ASCENTS = 100
BORDERS_FIRST = 0.2  # weight of all borders together at the start; the ascent moves it where it pays
BLOCKED = 1e300  # a path that may not be

Bools = NDArray[np.bool_]


def cheapest_paths(seconds: Floats, borders: Borders, open_: Bools, weights: Floats) -> tuple[float, str]:
    """Seconds that no plan can beat in which rows are whole in blocks of ``open_`` and one more, whichever.

    For every such block the prices have their own ascent, all side by side.

    Args:
        seconds: ``[device, layer]`` of the whole batch.
        borders: of the blocks.
        open_: ``[block]``, where rows may be whole.
        weights: ``[device]`` to start from.

    Returns:
        The bound, and the block on whose border the greatest price lies.
    """
    devices, count = len(seconds), len(borders.groups)
    first = np.concatenate([weights * (1 - BORDERS_FIRST), np.full(2 * count, BORDERS_FIRST / (2 * count))])
    prices = np.repeat(first[None], count, axis=0)
    whole = open_[None] | np.eye(count, dtype=bool)
    best = np.zeros(count)
    dearest: Ints = np.zeros(count, dtype=np.int64)
    for n in range(ASCENTS):
        value, loads = _Round(seconds, borders, whole, prices).solved()
        better = value > best
        best = np.where(better, value, best)
        border = prices[:, devices : devices + count] + prices[:, devices + count :]
        dearest = np.where(better, border.argmax(axis=1), dearest)
        step = loads / np.maximum(loads.max(axis=1, keepdims=True), 1e-300)
        prices = prices * np.exp(1.0 / np.sqrt(n + 1.0) * step)
        prices /= prices.sum(axis=1, keepdims=True)
    least = int(best.argmin())
    return float(best[least]), borders.names[int(dearest[least])]


@dataclass(slots=True)
class _Round:
    """One solution at given prices; axes: variant (one more whole block), source, crossed or not, block."""

    seconds: Floats
    borders: Borders
    whole: Bools
    prices: Floats

    def solved(self) -> tuple[Floats, Floats]:
        """``[variant]`` cheapest sum over all rows, ``[variant, resource]`` seconds that it loads."""
        who, cost = self._computing()
        dist, froms = self._forward(cost)
        variants, count = self.whole.shape
        dist[:, :, 0][~np.repeat(self.whole[:, None], count, axis=1)] = BLOCKED
        flat = np.reshape(dist, (variants, count, 2 * count))
        end = flat.argmin(axis=2)
        each = np.take_along_axis(flat, end[..., None], axis=2)[..., 0]
        part = np.repeat(self.borders.starts[None], variants, axis=0)
        part[np.arange(variants), each.argmin(axis=1)] += 1 - self.borders.starts.sum()
        return (part * each).sum(axis=1), self._loads(who, froms, end, part)

    def _computing(self) -> tuple[Ints, Floats]:
        """``[variant, block, layer]`` the device of a block where a layer costs least, and the cost."""
        priced = self.prices[:, : len(self.seconds), None] * self.seconds[None]
        who = np.stack(
            [np.array(group)[priced[:, list(group)].argmin(axis=1)] for group in self.borders.groups], axis=1
        )
        return who, np.take_along_axis(priced, who, axis=1)

    def _border_prices(self) -> tuple[Floats, Floats]:
        """``[variant, block]`` price of a byte outwards and inwards."""
        devices, count = len(self.seconds), len(self.borders.groups)
        out = self.prices[:, devices : devices + count] * self.borders.out_s
        into = self.prices[:, devices + count :] * self.borders.in_s
        return out, into

    def _forward(self, cost: Floats) -> tuple[Floats, list[Ints]]:
        """``[variant, source, crossed, block]`` cheapest way through all layers, and where it came from."""
        out, into = self._border_prices()
        variants, count = self.whole.shape
        block = np.arange(count, dtype=np.int64)
        apart = ~np.eye(count, dtype=bool)
        fetched = np.where(apart, out[:, :, None] + into[:, None, :], 0.0)  # [variant, from, to] a byte
        dist = np.full((variants, count, 2, count), BLOCKED)
        dist[:, :, 0] = self.borders.raw * fetched + cost[:, None, :, 0]
        froms: list[Ints] = []
        for cut in range(cost.shape[2] - 1):
            forth, back = self.borders.forth[cut], self.borders.back[cut]
            leave, enter = forth * out + back * into, forth * into + back * out
            ways = (dist + leave[:, None, None])[..., None] + enter[:, None, None, None]
            ways = np.reshape(np.where(apart, ways, BLOCKED), (variants, count, 2 * count, count))
            source: Ints = ways.argmin(axis=2)
            crossed = np.take_along_axis(ways, source[:, :, None], axis=2)[:, :, 0]
            stays = dist[:, :, 1] <= crossed
            froms.append(np.where(stays, block + count, source))
            dist[:, :, 1] = np.where(stays, dist[:, :, 1], crossed)
            dist = dist + cost[:, None, None, :, cut + 1]
        return dist + self.borders.labels * fetched[:, :, None], froms

    def _loads(self, who: Ints, froms: Sequence[Ints], end: Ints, part: Floats) -> Floats:
        """Follows every cheapest path back and adds up what it loads."""
        variants, count = self.whole.shape
        devices = len(self.seconds)
        variant, source = np.indices((variants, count))
        loads = np.zeros_like(self.prices)
        state = end

        def move(a: Ints, b: Ints, nbytes: float) -> None:
            amount = np.where(a != b, part * nbytes, 0.0)
            np.add.at(loads, (variant, devices + a), amount * self.borders.out_s[a])
            np.add.at(loads, (variant, devices + count + b), amount * self.borders.in_s[b])

        move(source, state % count, self.borders.labels)
        for layer in range(self.seconds.shape[1] - 1, -1, -1):
            block = state % count
            device = who[variant, block, layer]
            np.add.at(loads, (variant, device), part * self.seconds[device, layer])
            if layer:
                before = np.where(state < count, state, froms[layer - 1][variant, source, block])
                move(before % count, block, self.borders.forth[layer - 1])
                move(block, before % count, self.borders.back[layer - 1])
                state = before
        move(source, state % count, self.borders.raw)
        return loads
