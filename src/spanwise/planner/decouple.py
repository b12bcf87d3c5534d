"""Classes to groups, widths to devices: from a target network to a Decoupling, by numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import floor, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spanwise.core.decoupling import Decoupling, Division, Negatives, SubModel, TargetNet, check_classes
from spanwise.core.errors import InfeasibleError, InputError
from spanwise.cost.sub_models import sub_model_bytes

Groups = tuple[tuple[int, ...], ...]

_GAIN = 1e-12  # by which a swap of two classes must be better, so that rounding cannot go on for ever


def owned_groups(owners: Mapping[str, Sequence[int]], classes: int) -> tuple[tuple[str, ...], Groups]:
    """(devices, their classes) by data ownership: who holds the samples of a class trains it.

    Raises:
        InputError: a class has no owner or several.
    """
    groups = tuple(tuple(own) for own in owners.values())
    for device, own in owners.items():
        if not own:
            raise InputError(f"decoupling: device '{device}' owns no class; leave it out or give it one")
    check_classes(groups, classes)
    return tuple(owners), groups


def equal_groups(classes: int, groups: int) -> Groups:
    """Neighbouring classes together, all groups equally large but for one class."""
    if not 1 <= groups <= classes:
        raise InputError(
            f"decoupling: {groups} groups of {classes} classes; there must be at least one group, and a "
            "class for each"
        )
    least, more = divmod(classes, groups)
    sizes = [least + (g < more) for g in range(groups)]
    ends = np.cumsum([0, *sizes])
    return tuple(tuple(range(int(a), int(b))) for a, b in pairwise(ends))


def clustered_groups(profiles: NDArray[np.float64], groups: int) -> Groups:
    """Classes whose activations are alike together, in groups as equal as :func:`equal_groups`.

    The sum of the cosine similarities inside groups is raised by swaps of two classes until none helps. What
    it does to accuracy is not known in advance.

    Args:
        profiles: ``[class, feature]`` mean activation of every class in a trained network.
        groups: how many.
    """
    found = [list(group) for group in equal_groups(len(profiles), groups)]
    centred = profiles - profiles.mean(axis=0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(length > 0, length, 1.0)
    alike = unit @ unit.T
    np.fill_diagonal(alike, 0.0)
    while _swap(found, alike):
        pass
    return tuple(tuple(sorted(group)) for group in found)


def _swap(groups: list[list[int]], alike: NDArray[np.float64]) -> bool:
    """Makes the first swap that helps."""
    for g, one in enumerate(groups):
        for other in groups[g + 1 :]:
            for i, a in enumerate(one):
                for j, b in enumerate(other):
                    now = alike[a, one].sum() + alike[b, other].sum()
                    then = alike[b, one].sum() + alike[a, other].sum() - 2 * alike[a, b]
                    if then > now + _GAIN:
                        one[i], other[j] = b, a
                        return True
    return False


def equal_shares(groups: int) -> tuple[float, ...]:
    """Every sub-model is equally wide."""
    return (1.0 / groups,) * groups


def shares_by_speed(
    speeds: Sequence[float], rows: Sequence[int], caps: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Width shares under which all devices need the same time, as far as memory lets them.

    Work grows with the square of the width, so share^2 x rows / speed is made equal.

    Args:
        speeds: FLOP/s of each device, or any multiple of it.
        rows: that each sees in an epoch.
        caps: the greatest share that each has memory for; what it cannot take goes to the others.

    Raises:
        InfeasibleError: all together have no memory for the whole width.
    """
    limits = list(caps) if caps is not None else [1.0] * len(speeds)
    if sum(limits) < 1.0:
        raise InfeasibleError(
            f"decoupling: the devices have memory for {sum(limits):.0%} of the widths; lower 'batch', add a "
            "device, or take a narrower model"
        )
    wanted = [sqrt(speed / max(n, 1)) for speed, n in zip(speeds, rows, strict=True)]
    shares = [0.0] * len(wanted)
    open_to: set[int] = set(range(len(wanted)))
    left = 1.0
    while open_to:
        total = sum(wanted[g] for g in open_to)
        due = {g: wanted[g] / total * left for g in open_to}
        full = [g for g in open_to if due[g] > limits[g]]
        for g in full:
            shares[g] = limits[g]
            left -= limits[g]
            open_to.discard(g)
        if not full:
            for g, share in due.items():
                shares[g] = share
            break
    return tuple(shares)


def most_share(net: TargetNet, memory_bytes: float, *, rows: int, copies: int) -> float:
    """The greatest width share whose training fits into so many bytes, by the formula of ``cost``."""
    if sub_model_bytes(net, 1.0, rows=rows, copies=copies) <= memory_bytes:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = sub_model_bytes(net, middle, rows=rows, copies=copies) <= memory_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low


def parts(channels: int, shares: Sequence[float], where: str = "an axis") -> tuple[int, ...]:
    """Channels of each sub-model: largest remainders, at least one each, the exact sum.

    Raises:
        InputError: there are fewer channels than sub-models.
    """
    if channels < len(shares):
        raise InputError(
            f"decoupling: layer '{where}' has {channels} channels for {len(shares)} sub-models; each needs "
            "one: make fewer groups, widen the layer, or keep it whole (shared)"
        )
    quotas = [share * channels for share in shares]
    found = [max(1, floor(quota + 1e-9)) for quota in quotas]
    while sum(found) > channels:  # those that were raised to 1 take it from who is furthest above its quota
        above = max((g for g in range(len(found)) if found[g] > 1), key=lambda g: found[g] - quotas[g])
        found[above] -= 1
    while sum(found) < channels:
        below = max(range(len(found)), key=lambda g: (quotas[g] - found[g], -g))
        found[below] += 1
    return tuple(found)


def decoupled(
    net: TargetNet,
    groups: Sequence[Sequence[int]],
    shares: Sequence[float] | None = None,
    *,
    devices: Sequence[str] = (),
    negatives: Negatives | None = None,
    **options: Any,
) -> Decoupling:
    """The Decoupling of a network for these class lists and shares.

    Args:
        net: the target, as the ``decoupler`` has walked it.
        groups: class lists, in the order of each sub-model's outputs.
        shares: of the width; equal without.
        devices: who trains which sub-model, in the order of ``groups``.
        negatives: what sub-models see of foreign classes; all by default.
        **options: ``loss``, ``read_out`` and ``sharing`` of Decoupling.

    Raises:
        InputError: classes are missing or doubled, or a layer has too few channels.
    """
    check_classes(groups, net.classes)
    given = equal_shares(len(groups)) if shares is None else tuple(shares)
    if len(given) != len(groups) or abs(sum(given) - 1.0) > 1e-6 or min(given) <= 0:
        raise InputError(
            f"decoupling: shares {', '.join(f'{q:g}' for q in given)} of {len(groups)} sub-models; there "
            "must be one for each, above 0, and their sum must be 1"
        )
    if devices and len(devices) != len(groups):
        raise InputError(
            f"decoupling: {len(devices)} devices for {len(groups)} sub-models; name one for each, or none"
        )
    channels = {layer.gives.channels: layer.name for layer in net.divided}
    policy = negatives or Negatives()
    if policy.policy == "none" or options.get("loss") == "sigmoid":
        options.setdefault("read_out", "plain")
    return Decoupling(
        net=net,
        groups=tuple(
            SubModel(classes=tuple(own), share=q, device=devices[g] if devices else None)
            for g, (own, q) in enumerate(zip(groups, given, strict=True))
        ),
        divisions=tuple(Division(channels=c, parts=parts(c, given, name)) for c, name in channels.items()),
        negatives=policy,
        **options,
    )


def rows_per_epoch(decoupling: Decoupling, counts: Sequence[int]) -> tuple[int, ...]:
    """Samples that each sub-model sees in an epoch: its own and its negatives.

    Args:
        decoupling: whose groups and negatives; of a ``public`` set the size is not known here and left out.
        counts: samples of every class.
    """
    found: list[int] = []
    policy = decoupling.negatives
    for group in decoupling.groups:
        own = sum(counts[k] for k in group.classes)
        foreign = [n for k, n in enumerate(counts) if k not in group.classes]
        negative = 0
        if policy.policy == "all":
            negative = sum(foreign)
        elif policy.policy == "pool":
            negative = sum(min(n, policy.per_class) for n in foreign)
        found.append(own + negative * policy.repeats(own, len(group.classes), negative))
    return tuple(found)
