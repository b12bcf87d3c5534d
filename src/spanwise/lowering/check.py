"""What every Program must satisfy: pairing, coverage, termination."""

from __future__ import annotations

from spanwise.core.errors import PlanError
from spanwise.core.model import ModelGraph
from spanwise.core.plan import Plan, row_ranges
from spanwise.core.program import COLLECTIVES, SEGMENTS, Action, Program
from spanwise.core.syncs import ServerSync
from spanwise.core.trained import GroupSync
from spanwise.lowering.syncs import layers_of, pulled, steppers, updaters

_Key = tuple[str, int, int]  # kind, stage, micro-batch; of reductions and updates kind, sync, segment


def check(program: Program, plan: Plan, graph: ModelGraph) -> None:
    """Raises ``PlanError`` unless the Program is sound.

    Pairing: every send has exactly one receive of the same rows and bytes, and every member of a
    reduction takes part in it. Coverage: every device loads, computes, reduces and updates exactly what
    the plan gives it, once; every parameter with a server goes once each way between it and each device.
    Order: on every device data arrives before its use and leaves after it is made, and a segment is summed
    after all of its gradients. Termination: run in any timing, every action is reached, as what is pulled was
    sent in the step before.
    """
    if len(program.buckets) != len(plan.syncs):
        raise PlanError(
            f"program: has buckets for {len(program.buckets)} of the plan's {len(plan.syncs)} syncs"
        )
    if program.pulled != pulled(plan, graph, program.buckets):
        raise PlanError("program: its pulls are not those of the plan; lower it again")
    _check_pairs(program)
    _check_exchanges(program, plan, graph)
    work = _work(program, plan, graph)
    for device in dict.fromkeys((*plan.devices, *program.devices)):
        actions = program.devices.get(device, ())
        _check_coverage(device, _joined(device, actions, plan), work.get(device, {}))
        _check_order(device, actions, plan, graph, program)
    _check_end(program)


def _check_pairs(program: Program) -> None:
    sends: dict[int, tuple[str, Action]] = {}
    recvs: dict[int, tuple[str, Action]] = {}
    groups: dict[_Key, list[tuple[str, Action]]] = {}
    for device, actions in program.devices.items():
        for action in actions:
            if action.kind in ("send", "recv"):
                side = sends if action.kind == "send" else recvs
                if action.transfer in side:
                    raise PlanError(
                        f"program: transfer #{action.transfer} has two {action.kind} actions, on "
                        f"{side[action.transfer][0]} and {device}"
                    )
                side[action.transfer] = (device, action)
            elif action.kind in COLLECTIVES:
                groups.setdefault(_key(action), []).append((device, action))
    for number in sends.keys() | recvs.keys():
        if number not in sends or number not in recvs:
            device, action = sends.get(number) or recvs[number]
            other = "receive" if action.kind == "send" else "send"
            raise PlanError(f"program: '{action}' on {device} has no {other} on {action.peer}")
        (a, send), (b, recv) = sends[number], recvs[number]
        if _content(send) != _content(recv) or send.peer != b or recv.peer != a:
            raise PlanError(f"program: '{send}' on {a} and '{recv}' on {b} do not match")
    for (kind, sync, segment), members in groups.items():
        devices = sorted(device for device, _ in members)
        for device, action in members:
            same = action.nbytes == members[0][1].nbytes and action.every == members[0][1].every
            if sorted(action.members) != devices or not same:
                what = "reduction" if kind == "reduce" else kind
                raise PlanError(
                    f"program: {what} y{sync}.{segment} on {device} is over {', '.join(action.members)}, "
                    f"but {', '.join(devices)} take part"
                )


def _content(action: Action) -> tuple[object, ...]:
    """What both ends of a transfer say of it."""
    where = (action.stage, action.micro_batch, action.rows, action.sync, action.segment)
    return action.payload, *where, action.nbytes, action.precision


def _check_exchanges(program: Program, plan: Plan, graph: ModelGraph) -> None:
    """Of every server: each segment once from and once to each of its devices, with the bytes it has."""
    sizes = {parameter.name: parameter.bytes for parameter in graph.parameters}
    wanted: dict[tuple[object, ...], int] = {}
    for y, sync in enumerate(plan.syncs):
        if isinstance(sync, ServerSync):
            for payload, segments in (("push", program.buckets[y]), ("pull", program.pulled[y])):
                for g, names in enumerate(segments):
                    for peer in sync.clients if names else ():
                        ends = (peer, sync.server) if payload == "push" else (sync.server, peer)
                        wanted[(payload, y, g, *ends)] = sum(sizes[name] for name in names)
    for device, actions in program.devices.items():
        for action in actions:
            if action.kind != "send" or action.payload not in SEGMENTS:
                continue
            nbytes = wanted.pop((action.payload, action.sync, action.segment, device, action.peer), None)
            if nbytes != action.nbytes:
                raise PlanError(
                    f"program: '{action}' on {device} is sent twice, is not in the plan or has "
                    f"{nbytes} bytes there"
                )
    for payload, y, g, source, target in wanted:
        raise PlanError(f"program: {payload} y{y}.{g} from {source} to {target} is missing")


def _key(action: Action) -> _Key:
    if action.kind in (*COLLECTIVES, "update"):
        return action.kind, action.sync, action.segment
    return action.kind, action.stage, action.micro_batch


def _work(program: Program, plan: Plan, graph: ModelGraph) -> dict[str, dict[_Key, Action]]:
    """What each device has to do besides moving rows."""
    work: dict[str, dict[_Key, Action]] = {device: {} for device in plan.devices}

    def give(device: str, action: Action) -> None:
        work[device][_key(action)] = action

    for m in range(plan.micro_batches):
        for device, a, b in row_ranges(plan.sources):
            give(device, Action("load", micro_batch=m, rows=(a, b)))
        for s, stage in enumerate(plan.stages):
            for device, a, b in stage.row_ranges():
                give(device, Action("forward", s, m, (a, b)))
                give(device, Action("backward", s, m, (a, b)))
    for y, (sync, segments) in enumerate(zip(plan.syncs, program.buckets, strict=True)):
        for g, names in enumerate(segments):
            if isinstance(sync, GroupSync):
                for action in _group_work(sync, y, g):
                    for device in action.members:
                        give(device, action)
            elif not isinstance(sync, ServerSync):
                for device in sync.devices:
                    give(device, Action("reduce", sync=y, segment=g, members=sync.devices))
            elif names:
                give(sync.server, Action("update", sync=y, segment=g))
    norming = updaters(plan, graph, program.buckets)
    clip = any(action.kind == "norm" for actions in program.devices.values() for action in actions)
    for device in norming if clip else ():
        give(device, Action("norm", members=norming))
    for device in steppers(plan, graph, program.buckets):
        give(device, Action("step"))
    return work


def _group_work(sync: GroupSync, y: int, g: int) -> list[Action]:
    """What a group does with a segment."""
    if sync.way == "masked":
        return [Action("average", sync=y, segment=g, members=sync.devices)]
    out: list[Action] = []
    if len(sync.trainers) > 1:
        out.append(Action("reduce", sync=y, segment=g, members=sync.trainers))
    if sync.receivers:
        out.append(Action("broadcast", sync=y, segment=g, members=sync.chain, every=sync.refresh_every))
    return out


def _joined(device: str, actions: tuple[Action, ...], plan: Plan) -> tuple[Action, ...]:
    """With the halves of a backward, and the parts of its weight half, as the whole backward."""
    out: list[Action] = []
    open_: dict[_Key, tuple[Action, int]] = {}  # input halves, and down to where their weight halves are done
    for action in actions:
        keys = [("backward", action.stage, m) for m in action.micro_batches]
        if action.kind == "backward_input" and keys[0] not in open_:
            open_[keys[0]] = (action, plan.stages[action.stage].stop)
        elif action.kind == "backward_weight":
            start, stop = action.layers or (plan.stages[action.stage].start, plan.stages[action.stage].stop)
            for key in keys:
                first, left = open_.pop(key, (None, 0))
                if first is None or stop != left or action.rows != first.rows:
                    raise PlanError(
                        f"program: '{action}' on {device} does not go on where its backward is, of "
                        f"micro-batch {key[2]}; one input half, then the weight half from the last "
                        "layer to the first"
                    )
                if start > plan.stages[action.stage].start:
                    open_[key] = (first, start)
                else:
                    out.append(first._replace(kind="backward"))
        else:
            out.append(action)
    if open_:
        unfinished = next(iter(open_.values()))[0]
        raise PlanError(f"program: '{unfinished}' on {device} has no weight half; add its rest")
    return tuple(out)


def _check_coverage(device: str, actions: tuple[Action, ...], work: dict[_Key, Action]) -> None:
    left = dict(work)
    for action in actions:
        if action.kind in ("send", "recv"):
            continue
        given = left.pop(_key(action), None)
        if given is None:
            raise PlanError(f"program: '{action}' on {device} is done twice or is not in the plan")
        said = (action.rows, action.members, action.every, action.at_once)
        if said != (given.rows, given.members, given.every, given.at_once):
            raise PlanError(f"program: '{action}' on {device} is '{given}' in the plan")
    if left:
        raise PlanError(
            f"program: {device} lacks '{next(iter(left.values()))}'; "
            "every row must be loaded and computed, every gradient summed, once"
        )


def _check_order(
    device: str, actions: tuple[Action, ...], plan: Plan, graph: ModelGraph, program: Program
) -> None:
    at = {key: position for position, action in enumerate(actions) for key in _gives(action, plan)}
    nowhere = len(actions)
    for position, action in enumerate(actions):
        match action.kind:
            case "recv":
                uses = _uses(action, device, plan, graph, program)
                right = bool(uses) and all(at.get(key, -1) > position for key in uses)
            case "norm":
                right = all(map(_follows_norm, actions[position + 1 :]))
                right = right and not any(before.kind == "update" for before in actions[:position])
            case "step":
                right = all(later.kind in ("average", "broadcast") for later in actions[position + 1 :])
            case "average" | "broadcast":
                right = at.get(("step", -1, -1), nowhere) < position
            case _:
                needs = _sources(action, device, plan, graph, program)
                right = all(at.get(key, nowhere) < position for key in needs)
        if not right:
            raise PlanError(f"program: '{action}' on {device} stands in the wrong place, or for nothing")


def _follows_norm(action: Action) -> bool:
    after = ("update", "step", "average", "broadcast")
    return action.kind in after or (action.kind == "send" and action.payload == "pull")


def _gives(action: Action, plan: Plan) -> list[_Key]:
    """What is there when an action is done; ``backward`` are the gradients that travel.

    ``weights`` are the gradients of a layer's parameters after the last micro-batch.
    """
    s, m = action.stage, action.micro_batch
    given: list[_Key] = []
    match action.kind:
        case "send" | "recv":
            return []
        case "backward" | "backward_input":
            given.append(("backward", s, m))
        case "backward_weight":
            pass
        case _:
            return [_key(action)]
    if action.kind != "backward_input" and plan.micro_batches - 1 in action.micro_batches:
        stage = plan.stages[s]
        given += [("weights", s, layer) for layer in range(*(action.layers or (stage.start, stage.stop)))]
    return given


def _gradients(names: tuple[str, ...], device: str, plan: Plan, graph: ModelGraph) -> list[_Key]:
    """Of the layers on a device that use these parameters."""
    return [
        ("weights", s, layer)
        for s, stage in enumerate(plan.stages)
        if device in stage.devices
        for name in names
        for layer in layers_of(name, graph)
        if stage.start <= layer < stage.stop
    ]


def _uses(recv: Action, device: str, plan: Plan, graph: ModelGraph, program: Program) -> list[_Key]:
    """The compute or update that needs what is received."""
    match recv.payload:
        case "input":
            return [("forward", 0, recv.micro_batch)]
        case "label":
            return [("forward", len(plan.stages) - 1, recv.micro_batch)]
        case "gradient":
            return [("backward", recv.stage, recv.micro_batch)]
        case "push":
            return [("update", recv.sync, recv.segment)]
        case "pull":
            names = program.pulled[recv.sync][recv.segment]
            stages = dict.fromkeys(s for _, s, _ in _gradients(names, device, plan, graph))
            return [("forward", s, m) for s in stages for m in range(plan.micro_batches)]
        case _:
            return [("forward", recv.stage + 1, recv.micro_batch)]


def _sources(action: Action, device: str, plan: Plan, graph: ModelGraph, program: Program) -> list[_Key]:
    """What must have been done on the device before it computes, sends, sums or updates."""
    s, m = action.stage, action.micro_batch
    match action.kind, action.payload:
        case ("reduce" | "update", _) | ("send", "push"):
            return _gradients(program.buckets[action.sync][action.segment], device, plan, graph)
        case "send", "pull":
            wanted = set(program.pulled[action.sync][action.segment])
            return [
                ("update", action.sync, g)
                for g, names in enumerate(program.buckets[action.sync])
                if wanted.intersection(names)
            ]
        case "backward" | "backward_input", _:
            return [("forward", s, m)]
        case "backward_weight", _:
            return [("backward", s, each) for each in action.micro_batches]
        case "send", "input" | "label":
            return [("load", -1, m)]
        case "send", "activation":
            return [("forward", s, m)]
        case "send", _:
            return [("backward", s + 1, m)]
        case _:
            return []


def _check_end(program: Program) -> None:
    """Runs all devices round robin without time: receives wait for sends, norms and steps for all.

    Pulls wait for nothing: every device ends a step before any takes from it what crosses into the next.
    """
    at = dict.fromkeys(program.devices, 0)
    sent: set[int] = set()
    reduced: dict[tuple[int, int], set[str]] = {}
    normed: dict[tuple[str, ...], set[str]] = {}

    def blocked(device: str, action: Action) -> bool:
        match action.kind:
            case "recv":
                return action.transfer not in sent and not action.crosses
            case "norm":
                arrived = normed.setdefault(action.members, set())
                arrived.add(device)
                return not arrived.issuperset(action.members)
            case "step":
                own = (a for a in program.devices[device] if a.kind == "reduce")
                return any(not reduced[a.sync, a.segment].issuperset(a.members) for a in own)
            case _:
                return False

    moved = True
    while moved:
        moved = False
        for device, actions in program.devices.items():
            while at[device] < len(actions) and not blocked(device, actions[at[device]]):
                action = actions[at[device]]
                if action.kind == "send":
                    sent.add(action.transfer)
                elif action.kind == "reduce":
                    reduced.setdefault((action.sync, action.segment), set()).add(device)
                at[device] += 1
                moved = True
    stuck = [
        f"{device} at '{actions[at[device]]}'"
        for device, actions in program.devices.items()
        if at[device] < len(actions)
    ]
    if stuck:
        raise PlanError(f"program: it never ends; waiting: {'; '.join(stuck)}")
