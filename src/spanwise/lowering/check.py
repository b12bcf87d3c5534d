"""What every Program must satisfy: pairing, coverage, termination."""

from __future__ import annotations

from spanwise.core.errors import PlanError
from spanwise.core.plan import Plan
from spanwise.core.program import Action, Program


def check(program: Program, plan: Plan) -> None:
    """Raises ``PlanError`` unless the Program is sound.

    Pairing: every send has exactly one receive of the same rows and bytes, and every member of a
    reduction takes part in it. Coverage: every stage computes every row of every micro-batch forward
    and backward exactly once. Termination: run in any timing, every action is reached.
    """
    _check_pairs(program)
    _check_coverage(program, plan)
    _check_end(program)


def _check_pairs(program: Program) -> None:
    sends: dict[int, tuple[str, Action]] = {}
    recvs: dict[int, tuple[str, Action]] = {}
    groups: dict[tuple[int, int], list[tuple[str, Action]]] = {}
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
            elif action.kind == "reduce":
                groups.setdefault((action.sync, action.segment), []).append((device, action))
    for number in sends.keys() | recvs.keys():
        if number not in sends or number not in recvs:
            device, action = sends.get(number) or recvs[number]
            other = "receive" if action.kind == "send" else "send"
            raise PlanError(f"program: '{action}' on {device} has no {other} on {action.peer}")
        (a, send), (b, recv) = sends[number], recvs[number]
        same = (send.payload, send.stage, send.micro_batch, send.rows, send.nbytes) == (
            recv.payload, recv.stage, recv.micro_batch, recv.rows, recv.nbytes)  # fmt: skip
        if not same or send.peer != b or recv.peer != a:
            raise PlanError(f"program: '{send}' on {a} and '{recv}' on {b} do not match")
    for (sync, segment), members in groups.items():
        devices = sorted(device for device, _ in members)
        for device, action in members:
            if sorted(action.members) != devices or action.nbytes != members[0][1].nbytes:
                raise PlanError(
                    f"program: reduction y{sync}.{segment} on {device} is over {', '.join(action.members)}, "
                    f"but {', '.join(devices)} take part"
                )


def _check_coverage(program: Program, plan: Plan) -> None:
    computed: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for actions in program.devices.values():
        for action in actions:
            if action.kind in ("forward", "backward"):
                key = (action.kind, action.stage, action.micro_batch)
                computed.setdefault(key, []).append(action.rows)
    for kind in ("forward", "backward"):
        for stage in range(len(plan.stages)):
            for micro_batch in range(plan.micro_batches):
                end = 0
                for a, b in sorted(computed.pop((kind, stage, micro_batch), [])):
                    if a != end:
                        break
                    end = b
                if end != plan.micro_batch_rows:
                    raise PlanError(
                        f"program: {kind} of stage {stage}, micro-batch {micro_batch} covers rows up to "
                        f"{end} of {plan.micro_batch_rows}, each must be computed once"
                    )
    if computed:
        kind, stage, micro_batch = next(iter(computed))
        raise PlanError(f"program: {kind} s{stage} m{micro_batch} belongs to no stage of the plan")


def _check_end(program: Program) -> None:
    """Runs all devices round robin without time: receives wait for sends, norms and steps for all."""
    at = dict.fromkeys(program.devices, 0)
    sent: set[int] = set()
    reduced: dict[tuple[int, int], set[str]] = {}
    normed: dict[tuple[str, ...], set[str]] = {}

    def blocked(device: str, action: Action) -> bool:
        match action.kind:
            case "recv":
                return action.transfer not in sent
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
