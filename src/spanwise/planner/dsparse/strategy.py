"""DSparse: every device trains what its own memory allows, and groups that train pass values on.

After Peng, Sun, Zhang, Wang, "DSparse", JCST 40(3), 2025, of which only the abstract was available: idea and
result are theirs; scores, choice under a budget, nesting and the ways to aggregate are ours. All devices hold
all weights and compute their own rows. It is not exact training of the whole model: what nobody trains does
not change, and a unit learns from the rows of its trainers only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from spanwise.core.errors import InfeasibleError
from spanwise.core.plan import Plan, Ranking, Replica, Stage, Trained
from spanwise.core.trained import GroupSync
from spanwise.core.units import format_bytes
from spanwise.cost.sparse import chain_s
from spanwise.cost.training import ring_s
from spanwise.lowering import group_syncs, natural_syncs, units_of
from spanwise.planner.dsparse.options import RATIOS, Selectable
from spanwise.planner.dsparse.select import Choice, in_order, last_k, select, shifts_only, within_bytes
from spanwise.planner.plans.feasible import broken_rule
from spanwise.planner.plans.trial import timeline, unbounded_timeline
from spanwise.planner.problem import Problem, largest_remainder

MOST_TRIES = 6  # of a smaller budget for the choice, where simulation needs more than its formula
_SLACK = 1 << 16

Rule = Callable[[Selectable, int], Choice]  # model, budget in bytes


@dataclass(frozen=True, slots=True)
class Sparsity:
    """How to choose.

    Attributes:
        micro_batches: that a device's rows of a step are cut into.
        nested: a device may only train what those with larger budgets train, which keeps groups few.
        most_union: greatest share of the model's bytes that anyone trains; None: the job's
            ``trained_share``. Rules do not look at it.
        refresh_every: devices that do not train a unit get its values every so many steps.
        ways: how values may be passed on.
        ratios: shares of a weight's channels that may train.
        rule: chooses in place of the greatest gain; baselines.
    """

    micro_batches: int = 1
    nested: bool = True
    most_union: float | None = None
    refresh_every: int = 1
    ways: tuple[str, ...] = ("grouped", "masked")
    ratios: tuple[float, ...] = RATIOS
    rule: Rule | None = None


def dsparse(problem: Problem) -> Plan:
    """The greatest importance under every device's memory, nested, the fastest way for each group.

    Raises:
        InfeasibleError: nothing is known of what is important, or a budget is below what a device needs that
            trains nothing; says by how many bytes.
    """
    return sparse_plan(problem, "dsparse", Sparsity())


def dsparse_last_k(problem: Problem) -> Plan:
    """Baseline: each device trains as many of the last layers as fit."""
    return sparse_plan(problem, "dsparse_last_k", Sparsity(rule=last_k))


def dsparse_shifts(problem: Problem) -> Plan:
    """Baseline: each device trains biases and shifts of norms only, from the last on, as far as they fit."""
    return sparse_plan(problem, "dsparse_shifts", Sparsity(rule=shifts_only))


def dsparse_random(problem: Problem) -> Plan:
    """Baseline: layers in random order (by the job's seed), each that fits."""

    def rule(model: Selectable, budget: int) -> Choice:
        order = list(range(len(model.parts)))
        Random(problem.job.seed).shuffle(order)
        return in_order(model, budget, order)

    return sparse_plan(problem, "dsparse_random", Sparsity(rule=rule))


def dsparse_magnitude(problem: Problem) -> Plan:
    """Baseline: layers by their score, the greatest first, each that fits; with scores by magnitude."""

    def rule(model: Selectable, budget: int) -> Choice:
        gains = [part.options[-1].gain for part in model.parts]
        return in_order(model, budget, sorted(range(len(gains)), key=lambda at: (-gains[at], at)))

    return sparse_plan(problem, "dsparse_magnitude", Sparsity(rule=rule))


SPARSE_STRATEGIES: dict[str, Callable[[Problem], Plan]] = {
    "dsparse": dsparse,
    "dsparse_last_k": dsparse_last_k,
    "dsparse_shifts": dsparse_shifts,
    "dsparse_random": dsparse_random,
    "dsparse_magnitude": dsparse_magnitude,
}


def sparse_plan(problem: Problem, strategy: str, how: Sparsity) -> Plan:
    """A plan of one stage on all devices, each training what its memory allows.

    Raises:
        InfeasibleError: as ``dsparse``.
    """
    if problem.importance is None:
        raise InfeasibleError(
            "it is not known which parameters are important; measure it with profiler.importance, or let "
            "train and plan do so"
        )
    planner = _Planner(problem, strategy, how)
    plan = planner.plan()
    lacking = never_trained(problem, plan)
    if lacking and problem.importance.from_scratch:
        warnings.warn(
            f"{strategy}: from scratch, nobody trains {len(lacking)} parameters ({lacking[0]} first): they "
            "stay as they were initialised; raise the memory of a device, or start from a trained model",
            stacklevel=2,
        )
    return plan


def never_trained(problem: Problem, plan: Plan) -> tuple[str, ...]:
    """Parameters of which no device trains any part."""
    trained = {unit.parameter for unit in units_of(plan, problem.graph) if unit.trainers}
    return tuple(p.name for p in problem.graph.parameters if p.name not in trained) if plan.sparse else ()


class _Planner:
    def __init__(self, problem: Problem, strategy: str, how: Sparsity) -> None:
        assert problem.importance is not None
        self.problem, self.strategy, self.how = problem, strategy, how
        self.importance = problem.importance
        self.stored = self.importance.stored_statistics
        self.rows = self._rows()
        self.budgets = {d.id: d.memory_bytes for d in problem.cluster.devices}

    def plan(self) -> Plan:
        """Chooses, then chooses again with less wherever the simulation needs more than the budget."""
        less, over = dict.fromkeys(self.rows, 0), dict[str, int]()
        for _ in range(MOST_TRIES):
            plan = self._fastest(self._built(self._choices(less)))
            over = self._over(plan)
            if not over:
                return plan
            for device, nbytes in over.items():
                less[device] += nbytes + _SLACK
        raise InfeasibleError(
            "no choice keeps to the budgets when simulated; "
            + ", ".join(f"{device} is {format_bytes(nbytes)} short" for device, nbytes in over.items())
        )

    def _rows(self) -> dict[str, int]:
        """Rows of a micro-batch of each device: its data share where data is private, else equal ones."""
        problem, count = self.problem, self.how.micro_batches
        if problem.job.batch % count:
            raise InfeasibleError(f"a batch of {problem.job.batch} cannot be cut into {count} micro-batches")
        rows = problem.job.batch // count
        ids = problem.cluster.ids
        least = problem.least_rows(0, len(problem.graph))
        if problem.shares:
            found = {replica.device: replica.rows for replica in problem.source_rows(rows)}
        elif rows < least * len(ids):
            raise InfeasibleError(
                f"{rows} rows of a micro-batch are too few for {len(ids)} devices, each needs {least}; "
                "raise the batch or use fewer devices"
            )
        else:
            found = dict(zip(ids, largest_remainder(rows, (1.0,) * len(ids), least), strict=True))
        return found

    def _model(self, device: str) -> Selectable:
        problem = self.problem
        return Selectable(
            problem.graph, self.importance, self.rows[device], problem.copies, self.stored, self.how.ratios
        )

    def _choices(self, less: dict[str, int]) -> dict[str, dict[str, int | None]]:
        """What each device trains, the one with the largest budget first."""
        out: dict[str, dict[str, int | None]] = {}
        most: Choice | None = None
        for device in sorted(self.rows, key=lambda d: (-self.budgets[d], self.problem.index[d])):
            model, budget = self._model(device), self.budgets[device] - less[device]
            try:
                choice = self._choice(model, budget, most)
            except InfeasibleError as error:
                raise InfeasibleError(f"{device}: {error}") from None
            if self.how.nested and self.how.rule is None:
                most = choice if most is None else tuple(map(min, most, choice))
            out[device] = model.trains(choice)
        return out

    def _choice(self, model: Selectable, budget: int, most: Choice | None) -> Choice:
        if self.how.rule is not None:
            select(model, budget, most=[0] * len(model.parts))  # below the floor this says so
            return self.how.rule(model, budget)
        share = self.how.most_union or self.problem.job.trained_share
        if most is None and share < 1:
            return within_bytes(model, budget, round(share * model.graph.parameter_bytes))
        return select(model, budget, most=most)

    def _built(self, choices: dict[str, dict[str, int | None]]) -> Plan:
        problem, graph = self.problem, self.problem.graph
        replicas = tuple(
            Replica(
                device=device, rows=rows,
                trains=tuple(Trained(parameter=n, channels=c) for n, c in choices[device].items()),
            )
            for device, rows in self.rows.items()
        )  # fmt: skip
        sliced = dict.fromkeys(n for trains in choices.values() for n, count in trains.items() if count)
        stage = Stage(start=0, stop=len(graph), replicas=replicas)
        plan = Plan(
            strategy=self.strategy,
            graph_digest=graph.digest,
            micro_batches=self.how.micro_batches,
            micro_batch_rows=sum(self.rows.values()),
            sources=tuple(Replica(device=r.device, rows=r.rows) for r in replicas),
            stages=(stage,),
            syncs=natural_syncs((stage,), graph),
            rankings=tuple(
                Ranking(parameter=name, order=" ".join(map(str, self.importance.ranking(name))))
                for name in sliced
            ),
            stored_statistics=self.stored or None,
        )
        plan = plan.model_copy(update={"syncs": plan.syncs + group_syncs(plan, graph)})
        broken = broken_rule(problem, plan)
        if broken:
            raise InfeasibleError(broken)
        return plan

    def _fastest(self, plan: Plan) -> Plan:
        """The way of each group by formula, against one way for all, decided by the simulator."""
        every = self.how.refresh_every
        variants = [self._with_ways(plan, lambda group: self._cheaper(plan, group))]
        variants += [self._with_ways(plan, lambda _, way=way: way) for way in self._allowed()]
        if every > 1:
            variants = [
                v.model_copy(update={"syncs": tuple(_refreshed(s, every) for s in v.syncs)}) for v in variants
            ]
        best, least = variants[0], float("inf")
        for variant in dict.fromkeys(variants):
            try:
                seconds = timeline(self.problem, variant).step_time_s
            except InfeasibleError:  # memory: told by the caller, for the first of them
                continue
            if seconds < least:
                best, least = variant, seconds
        return best

    def _allowed(self) -> tuple[str, ...]:
        """Ways that give the same parameters: values may be averaged where updates are linear."""
        job = self.problem.job
        linear = job.optimizer.name == "SGD" and job.clip_norm is None and self.how.refresh_every == 1
        return tuple(way for way in self.how.ways if way == "grouped" or linear) or ("grouped",)

    def _with_ways(self, plan: Plan, way: Callable[[GroupSync], str]) -> Plan:
        syncs = tuple(
            sync.model_copy(update={"way": way(sync)}) if isinstance(sync, GroupSync) else sync
            for sync in plan.syncs
        )
        return plan.model_copy(update={"syncs": syncs})

    def _cheaper(self, plan: Plan, group: GroupSync) -> str:
        """By the formulas of ring and chain on the slowest link of those who take part."""
        allowed = self._allowed()
        if len(allowed) == 1:
            return allowed[0]
        nbytes = sum(
            unit.nbytes for unit in units_of(plan, self.problem.graph) if unit.trainers == group.trainers
        )
        grouped = ring_s(len(group.trainers), nbytes, *self._slowest(group.trainers))
        if group.receivers:
            slowest = self._slowest(group.chain)
            grouped += chain_s(len(group.chain), nbytes, *slowest) / self.how.refresh_every
        masked = ring_s(len(group.devices), nbytes, *self._slowest(group.devices))
        return "grouped" if grouped <= masked else "masked"

    def _slowest(self, devices: Sequence[str]) -> tuple[float, float]:
        """Least rate and most latency between neighbours."""
        index, links = self.problem.index, self.problem.links
        found = [
            links.route(index[a], index[b])
            for a, b in zip(devices, (*devices[1:], devices[0]), strict=True)
            if a != b
        ]
        routes = [route for route in found if route is not None]
        rate = min((route.bandwidth_bytes_per_s for route in routes), default=float("inf"))
        return rate, max((route.latency_s for route in routes), default=0.0)

    def _over(self, plan: Plan) -> dict[str, int]:
        """Bytes above their budgets by device, as simulated."""
        found = unbounded_timeline(self.problem, plan)
        over = {use.device: use.peak_memory_bytes - self.budgets[use.device] for use in found.devices}
        return {device: nbytes for device, nbytes in over.items() if nbytes > 0}


def _refreshed(sync: object, every: int) -> object:
    if isinstance(sync, GroupSync) and sync.receivers:
        return sync.model_copy(update={"refresh_every": every})
    return sync
