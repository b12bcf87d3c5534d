"""A Program: for each device the ordered list of actions of one training step."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from spanwise.core.errors import PlanError
from spanwise.core.noun import Noun
from spanwise.core.precision import Precision
from spanwise.core.trained import parse_unit

Kind = Literal[
    "load",
    "forward",
    "backward",
    "backward_input",
    "backward_weight",
    "send",
    "recv",
    "reduce",
    "update",
    "norm",
    "step",
    "average",
    "broadcast",
]
RowPayload = Literal["input", "label", "activation", "gradient"]
SegmentPayload = Literal["push", "pull"]
Payload = RowPayload | SegmentPayload
SEGMENTS: tuple[str, ...] = get_args(SegmentPayload)
COLLECTIVES = ("reduce", "average", "broadcast")


class Action(NamedTuple):
    """One thing that a device does. ``str(action)`` prints it, ``Action.parse`` reads it back.

    A tuple, as planners make millions: a frozen dataclass of so many fields takes four times as long.

    Attributes:
        kind: ``load`` reads own data rows; ``forward``/``backward`` compute a stage on own rows, and
            ``backward_input`` what the stage before waits for, ``backward_weight`` the rest of a backward;
            ``send``/``recv`` move rows, or parameters and gradients of a segment to and from a server;
            ``reduce`` sums gradients over devices (in the background, until the step); ``update`` is a
            server's of one segment; ``norm`` sums the squared gradient norm; ``step`` waits for the
            reductions and updates what no server does. After it, in the background until all of the step has
            ended: ``average`` gives all members the mean of its trainers' values, ``broadcast`` those of the
            first of a chain.
        stage: of compute; for activations and gradients the stage *before* the cut. -1 = none.
        micro_batch: index, -1 = none.
        at_once: micro-batches, from ``micro_batch`` on, that a ``backward_weight`` is done for.
        rows: half-open range inside the micro-batch.
        layers: half-open range of a ``backward_weight`` that is done in parts; None = the whole stage.
        payload, peer, transfer, nbytes: of ``send`` and ``recv``; both ends carry the same transfer number.
        precision: of ``send`` and ``recv``; how values travel.
        sync, segment, nbytes: of ``reduce``, ``update``, ``average``, ``broadcast``, pushes and pulls.
        members: of ``reduce``, ``average``, ``broadcast`` and ``norm``, in their order.
        every: of ``broadcast``; it is done in every so many steps, the first time in step ``every - 1``.
    """

    kind: Kind
    stage: int = -1
    micro_batch: int = -1
    rows: tuple[int, int] = (0, 0)
    layers: tuple[int, int] | None = None
    payload: Payload | None = None
    peer: str = ""
    transfer: int = -1
    nbytes: int = 0
    sync: int = -1
    segment: int = 0
    members: tuple[str, ...] = ()
    precision: Precision = "full"
    every: int = 1
    at_once: int = 1

    def due(self, step: int) -> bool:
        """Whether it is done in a step."""
        return (step + 1) % self.every == 0

    @property
    def work(self) -> str:
        """The kind of compute, with its layers if it is only a part, and the number of micro-batches if there
        are several: what takes the same time every time.
        """
        several = "" if self.at_once == 1 else f" of {self.at_once}"
        part = "" if self.layers is None else f" [{self.layers[0]}:{self.layers[1]})"
        return f"{self.kind}{several}{part}"

    @property
    def micro_batches(self) -> range:
        """Of compute: those that it is done for."""
        return range(self.micro_batch, self.micro_batch + self.at_once)

    @property
    def crosses(self) -> bool:
        """Whether it is sent in one step and received in the next: a pull, which ends a step and begins one.

        A first step has nothing to receive, as every device holds the parameters.
        """
        return self.payload == "pull"

    def __str__(self) -> str:
        a, b = self.rows
        match self.kind:
            case "load":
                return f"load m{self.micro_batch} [{a}:{b})"
            case "forward" | "backward" | "backward_input" | "backward_weight":
                part = "" if self.layers is None else f" layers [{self.layers[0]}:{self.layers[1]})"
                m = f"m{self.micro_batch}"
                if self.at_once != 1:
                    m = f"m[{self.micro_batch}:{self.micro_batch + self.at_once})"
                return f"{self.kind} s{self.stage} {m} [{a}:{b}){part}"
            case "send" | "recv":
                way = "to" if self.kind == "send" else "from"
                stage = f"s{self.stage} " if self.stage >= 0 else ""
                what = f"{stage}m{self.micro_batch} [{a}:{b})"
                if self.payload in SEGMENTS:
                    what = f"y{self.sync}.{self.segment}"
                return (
                    f"{self.kind} {self.payload} {what} "
                    f"{way} {self.peer} #{self.transfer} {self.nbytes}B"
                    f"{'' if self.precision == 'full' else ' ' + self.precision}"
                )
            case "reduce" | "average":
                return f"{self.kind} y{self.sync}.{self.segment} {self.nbytes}B over {','.join(self.members)}"
            case "broadcast":
                period = "" if self.every == 1 else f" every {self.every} steps"
                what = f"y{self.sync}.{self.segment} {self.nbytes}B"
                return f"broadcast {what} along {','.join(self.members)}{period}"
            case "update":
                return f"update y{self.sync}.{self.segment} {self.nbytes}B"
            case "norm":
                return f"norm over {','.join(self.members)}"
            case "step":
                return "step"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Reads what ``str(action)`` printed; ``PlanError`` on anything else."""
        for pattern, build in _FORMS:
            match = pattern.fullmatch(text)
            if match is not None:
                return build(match)
        raise PlanError(f"action '{text}': not an action; write it like 'forward s0 m1 [0:8)'")


_ROWS = r"\[(?P<a>\d+):(?P<b>\d+)\)"
_SEGMENT = r"y(?P<y>\d+)\.(?P<g>\d+)"
_NAMES = r"(?P<members>[A-Za-z0-9_.,-]+)"


def _rows(m: re.Match[str]) -> tuple[int, int]:
    return int(m["a"]), int(m["b"])


def _members(m: re.Match[str]) -> tuple[str, ...]:
    return tuple(m["members"].split(","))


def _compute(m: re.Match[str]) -> Action:
    kind: Any = m["kind"]
    return Action(kind, stage=int(m["s"]), micro_batch=int(m["m"]), rows=_rows(m))


def _weight(m: re.Match[str]) -> Action:
    layers = None if m["c"] is None else (int(m["c"]), int(m["d"]))
    if m["first"] is None:
        return Action("backward_weight", int(m["s"]), int(m["m"]), _rows(m), layers)
    first, stop = int(m["first"]), int(m["stop"])
    if stop < first + 2:
        raise PlanError(
            f"action '{m.string}': micro-batches [{first}:{stop}) are not several; write one like m{first}"
        )
    return Action("backward_weight", int(m["s"]), first, _rows(m), layers, at_once=stop - first)


def _move(m: re.Match[str]) -> Action:
    payload: Any = m["payload"]
    precision: Any = m["precision"] or "full"
    return Action(
        "recv" if m["send"] is None else "send",
        payload=payload,
        stage=-1 if m["s"] is None else int(m["s"]),
        micro_batch=int(m["m"]),
        rows=_rows(m),
        peer=m["peer"],
        transfer=int(m["t"]),
        nbytes=int(m["n"]),
        precision=precision,
    )


def _exchange(m: re.Match[str]) -> Action:
    payload: Any = m["payload"]
    kind = "recv" if m["send"] is None else "send"
    return _segment(m, kind)._replace(payload=payload, peer=m["peer"], transfer=int(m["t"]))


def _segment(m: re.Match[str], kind: Kind) -> Action:
    return Action(kind, sync=int(m["y"]), segment=int(m["g"]), nbytes=int(m["n"]))


def _reduce(m: re.Match[str]) -> Action:
    kind: Any = m["kind"]
    return _segment(m, kind)._replace(members=_members(m))


def _broadcast(m: re.Match[str]) -> Action:
    return _segment(m, "broadcast")._replace(members=_members(m), every=int(m["every"] or 1))


_FORMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Action]], ...] = (
    (re.compile(rf"(?P<kind>forward|backward(?:_input)?) s(?P<s>\d+) m(?P<m>\d+) {_ROWS}"), _compute),
    (
        re.compile(
            rf"backward_weight s(?P<s>\d+) m(?:(?P<m>\d+)|\[(?P<first>\d+):(?P<stop>\d+)\)) {_ROWS}"
            r"(?: layers \[(?P<c>\d+):(?P<d>\d+)\))?"
        ),
        _weight,
    ),
    (
        re.compile(
            rf"(?:(?P<send>send)|recv) (?P<payload>{'|'.join(get_args(RowPayload))}) "
            rf"(?:s(?P<s>\d+) )?m(?P<m>\d+) {_ROWS} (?(send)to|from) "
            rf"(?P<peer>[A-Za-z0-9_.-]+) #(?P<t>\d+) (?P<n>\d+)B(?: (?P<precision>half|int8))?"
        ),
        _move,
    ),
    (
        re.compile(
            rf"(?:(?P<send>send)|recv) (?P<payload>{'|'.join(SEGMENTS)}) {_SEGMENT} (?(send)to|from) "
            rf"(?P<peer>[A-Za-z0-9_.-]+) #(?P<t>\d+) (?P<n>\d+)B"
        ),
        _exchange,
    ),
    (
        re.compile(rf"load m(?P<m>\d+) {_ROWS}"),
        lambda m: Action("load", micro_batch=int(m["m"]), rows=_rows(m)),
    ),
    (re.compile(rf"(?P<kind>reduce|average) {_SEGMENT} (?P<n>\d+)B over {_NAMES}"), _reduce),
    (
        re.compile(rf"broadcast {_SEGMENT} (?P<n>\d+)B along {_NAMES}(?: every (?P<every>\d+) steps)?"),
        _broadcast,
    ),
    (re.compile(rf"update {_SEGMENT} (?P<n>\d+)B"), lambda m: _segment(m, "update")),
    (re.compile(rf"norm over {_NAMES}"), lambda m: Action("norm", members=_members(m))),
    (re.compile(r"step"), lambda _: Action("step")),
)


Buckets = tuple[tuple[tuple[str, ...], ...], ...]


@dataclass(frozen=True)
class Program:
    """Actions per device, in the order in which each device takes them.

    ``held`` names, per device, the parameters that it owns a copy of. ``buckets[sync][segment]`` names the
    parameters whose gradients are summed together, ``pulled[sync][segment]`` those that a server sends
    together. ``trained`` names, of a plan whose devices train some parameters only, the units of every
    device; of stages that train everything these are parameters.
    """

    devices: dict[str, tuple[Action, ...]]
    held: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    buckets: Buckets = ()
    pulled: Buckets = ()
    trained: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    @cached_property
    def served(self) -> dict[str, str]:
        """The server of each parameter that has one."""
        return {
            name: device
            for device, actions in self.devices.items()
            for action in actions
            if action.kind == "update"
            for name in self.buckets[action.sync][action.segment]
        }

    @cached_property
    def updated(self) -> dict[str, tuple[str, ...]]:
        """Per device those of the held parameters that its own optimizer updates, as no other server does."""
        if self.trained:
            return {
                device: tuple(dict.fromkeys(parse_unit(unit)[0] for unit in self.trained.get(device, ())))
                for device in self.held
            }
        return {
            device: tuple(name for name in names if self.served.get(name, device) == device)
            for device, names in self.held.items()
        }

    @cached_property
    def owned(self) -> dict[str, tuple[str, ...]]:
        """Each held parameter, or unit, once, under the first device that updates it."""
        seen: set[str] = set()
        out: dict[str, tuple[str, ...]] = {}
        for device, names in (self.trained or self.updated).items():
            out[device] = tuple(name for name in names if name not in seen)
            seen.update(names)
        return out

    @cached_property
    def reported(self) -> dict[str, tuple[str, ...]]:
        """Parameters by device whose values together are all there is: those that it owns something of.

        A parameter that nobody trains is reported by its first holder.
        """
        if not self.trained:
            return self.owned
        seen = {parse_unit(unit)[0] for units in self.trained.values() for unit in units}
        out: dict[str, tuple[str, ...]] = {}
        for device, names in self.held.items():
            own = {parse_unit(unit)[0] for unit in self.owned.get(device, ())}
            out[device] = tuple(name for name in names if name in own or name not in seen)
            seen.update(names)
        return out

    def __len__(self) -> int:
        return sum(len(actions) for actions in self.devices.values())

    def __str__(self) -> str:
        """Text form, one block a device, as in ``program.txt`` of a run folder."""
        blocks = (
            "\n".join([f"{device}:"] + [f"  {action}" for action in actions])
            for device, actions in self.devices.items()
        )
        return "\n\n".join(blocks) + "\n"


def parse_actions(text: str) -> dict[str, tuple[Action, ...]]:
    """Reads the text form of a Program back into actions per device."""
    found: dict[str, list[Action]] = {}
    current: list[Action] | None = None
    for line in text.splitlines():
        if not line.strip():
            continue
        if not line.startswith(" "):
            device = line.rstrip().rstrip(":")
            if device in found:
                raise PlanError(f"program: device '{device}' is listed twice; join its actions")
            current = found[device] = []
        elif current is None:
            raise PlanError(f"program: action '{line.strip()}' stands before any device")
        else:
            current.append(Action.parse(line.strip()))
    return {device: tuple(actions) for device, actions in found.items()}


class ProgramFile(Noun):
    """A Program as it travels to a worker."""

    devices: dict[str, tuple[str, ...]]
    held: dict[str, tuple[str, ...]]
    buckets: Buckets = ()
    pulled: Buckets = ()
    trained: dict[str, tuple[str, ...]] | None = None

    @classmethod
    def of(cls, program: Program) -> ProgramFile:
        """The file form of a Program."""
        actions = {d: tuple(map(str, a)) for d, a in program.devices.items()}
        return cls(
            devices=actions, held=program.held, buckets=program.buckets, pulled=program.pulled,
            trained=program.trained or None,
        )  # fmt: skip

    def program(self) -> Program:
        """The Program that it describes."""
        actions = {d: tuple(map(Action.parse, a)) for d, a in self.devices.items()}
        return Program(actions, self.held, self.buckets, self.pulled, self.trained or {})
