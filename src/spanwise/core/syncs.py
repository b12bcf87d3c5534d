"""Sums of gradients over devices, as a plan has them: by a ring, over a server, or by groups of trainers."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, cast

from pydantic import Discriminator, Field, Tag, model_validator

from spanwise.core.cluster import Id
from spanwise.core.errors import PlanError
from spanwise.core.noun import Noun
from spanwise.core.trained import GroupSync


class Sync(Noun):
    """Gradients of some layers summed over some devices, once a step, by a ring.

    Meant are the parameters in these half-open layer ranges that exactly these devices hold: a tied weight
    whose layers lie in two stages has a Sync of its own, over the devices of both. ``devices`` is the order
    of the ring.

    The sum may be cut into segments, each a ring, one after the other from the last layers to the first, each
    as soon as the last micro-batch has left its gradients behind: at layers, by ``ends``, of every segment
    the layer after its last, rising, the last that of the sync (a parameter belongs to the first layer that
    uses it); or into so many ``segments`` of about equal bytes.
    """

    layers: tuple[tuple[int, int], ...] = Field(min_length=1)
    devices: tuple[Id, ...] = Field(min_length=2)
    segments: int = Field(default=1, ge=1)
    ends: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _cut_once(self) -> Sync:
        if self.ends is None:
            return self
        first, stop = self.layers[0][0], self.layers[-1][1]
        if not self.ends or self.ends[-1] != stop or any(a >= b for a, b in pairwise((first, *self.ends))):
            raise PlanError(
                f"plan: sum over {', '.join(self.devices)}: segments of layers [{first}:{stop}) end at "
                f"{', '.join(map(str, self.ends)) or 'none'}; ends must rise and the last must be {stop}"
            )
        if self.segments > 1:
            raise PlanError(
                f"plan: sum over {', '.join(self.devices)} has both {self.segments} segments and ends of "
                "segments; give one of them"
            )
        return self

    @property
    def most_segments(self) -> int:
        """In how many segments it is cut, those without a parameter counted in."""
        return self.segments if self.ends is None else len(self.ends)


class ServerSync(Noun):
    """Gradients of layers ``[start, stop)`` pushed to a server, their parameters pulled from it, once a step.

    The server (a parameter server: Li et al., "Scaling Distributed Machine Learning with the Parameter
    Server", OSDI 2014) sums in the order of ``devices``, updates, and keeps the state of the optimizer, which
    the devices do without. Meant are the parameters that exactly these devices hold, as in a Sync. The server
    may be one of them: what is its own does not travel.

    ``pushes`` and ``pulls`` cut the layers into segments, each a message: of every segment the layer after
    its last, rising; the last is ``stop``. A parameter travels with the first layer that uses it. ``order``
    has every pull once, as the server sends them. With ``as_aggregated`` it updates a segment as soon as all
    gradients of it are in and sends what it may; else it updates nothing before all gradients are in, so that
    a step that fails in between has changed nothing.
    """

    server: Id
    devices: tuple[Id, ...] = Field(min_length=1)
    start: int = Field(default=0, ge=0)
    pushes: tuple[int, ...] = Field(min_length=1)
    pulls: tuple[int, ...] = Field(min_length=1)
    order: tuple[int, ...]
    as_aggregated: bool = False

    @model_validator(mode="after")
    def _whole(self) -> ServerSync:
        where = f"plan: server '{self.server}'"
        for what, ends in (("push", self.pushes), ("pull", self.pulls)):
            if any(a >= b for a, b in pairwise((self.start, *ends))):
                raise PlanError(
                    f"{where}: {what} segments of layers from {self.start} on end at "
                    f"{', '.join(map(str, ends))}; ends must rise, each segment holds a layer"
                )
        if self.pushes[-1] != self.pulls[-1]:
            raise PlanError(
                f"{where}: pushes end at layer {self.pushes[-1]}, pulls at {self.pulls[-1]}; "
                "all layers travel both ways"
            )
        if sorted(self.order) != list(range(len(self.pulls))):
            raise PlanError(
                f"{where}: order {', '.join(map(str, self.order)) or 'missing'} of {len(self.pulls)} pulls; "
                "it must have each of them once"
            )
        if len(set(self.devices)) != len(self.devices):
            raise PlanError(f"{where} lists a device twice: {', '.join(self.devices)}")
        if self.devices == (self.server,):
            raise PlanError(f"{where} serves nobody but itself; remove it, a device updates what it holds")
        return self

    @property
    def stop(self) -> int:
        """The layer after the last."""
        return self.pushes[-1]

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """As half-open ranges, like those of a Sync."""
        return ((self.start, self.stop),)

    @property
    def clients(self) -> tuple[str, ...]:
        """The devices that push and pull: all but the server itself."""
        return tuple(device for device in self.devices if device != self.server)


def _form_of_sync(data: object) -> str:
    for key, noun, form in (("server", ServerSync, "server"), ("trainers", GroupSync, "group")):
        if isinstance(data, noun) or (isinstance(data, dict) and key in cast("Any", data)):
            return form
    return "ring"


AnySync = Annotated[  # told apart by form, so that an error speaks of the form that was written
    Annotated[Sync, Tag("ring")] | Annotated[ServerSync, Tag("server")] | Annotated[GroupSync, Tag("group")],
    Discriminator(_form_of_sync),
]
