"""``pipedream``: baseline. Balanced stages with equal replicas by the recurrence of PipeDream's planner.

Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP 2019, section 3.1 (flat
topology), with the factors of its published code as secondary sources give them (activations and gradients
2 B a / (m' rate), weights 4 (m'-1) w / (m' rate); unverified):

    A(j, m) = min over k < j, m' < m of max( A(k, m - m'), 2 B a[k] / (m' rate), T(k+1..j, m') )
    T(k+1..j, m') = ( forward + backward of B rows + 4 (m' - 1) w(k+1..j) / (m' rate) ) / m'

Limits. Equal devices are assumed: times are those of the mean device, the rate is that of the mean link,
devices are taken in file order, all of them, and replicas get equal rows. The asynchronous weight versions of
the paper are left out: it runs as 1F1B with a flush and warm-up depth P-p, so that gradients stay exact, and
replicas share the rows of a micro-batch where the paper gives each whole mini-batches in turn. The recurrence
sees neither memory nor latency, raw data nor privacy: a plan that does not fit is infeasible. Its levels of
bandwidth inside and between servers are not modelled.
"""

from __future__ import annotations

import numpy as np

from spanwise.core.plan import Plan, Replica, Stage
from spanwise.planner.plans.build import warmup
from spanwise.planner.problem import Problem, largest_remainder
from spanwise.planner.published.decided import Decision, fastest_decision
from spanwise.planner.published.known import mean_rate, mean_times

Cut = tuple[int, int, int]  # start, stop, replicas


def pipedream(problem: Problem) -> Plan:
    """The plan of the recurrence at the micro-batch count that suits it best.

    Raises:
        InfeasibleError: memory, links or privacy do not allow its plans; says why.
    """
    found = [(m, balanced(problem, m)) for m in problem.micro_batch_choices()]
    return fastest_decision(
        problem, "pipedream", [Decision(m, _stages(problem, cuts, m)) for m, cuts in found if cuts]
    )


def balanced(problem: Problem, micro_batches: int) -> tuple[Cut, ...]:
    """The stages of A(L, N), empty if the micro-batch has too few rows for the replicas of any division."""
    tables, count = problem.tables, len(problem.cluster.devices)
    rows = problem.job.batch // micro_batches
    forward, backward = mean_times(problem)
    both, rate = forward[:, rows] + backward[:, rows], mean_rate(problem)
    at = np.arange(tables.layers + 1)
    best = np.full((tables.layers + 1, count + 1), np.inf)
    chosen: dict[tuple[int, int], tuple[int, int]] = {}
    for j in range(1, tables.layers + 1):
        for m in range(1, count + 1):
            for each in range(1, min(m, rows) + 1):
                k = at[:1] if each == m else at[1:j]  # all devices: one stage from the first layer on
                if not len(k):
                    continue
                sums = 4 * (each - 1) * tables.parameters[k, j] / (each * rate)
                stage = (both[j] - both[k] + sums) / each
                link = np.where(k > 0, 2 * rows * tables.into[k] / (each * rate), 0.0)
                total = np.maximum(stage, link if each == m else np.maximum(best[k, m - each], link))
                least = int(np.argmin(total))
                if total[least] < best[j, m]:
                    best[j, m], chosen[j, m] = total[least], (int(k[least]), each)
    cuts: list[Cut] = []
    j, m = tables.layers, count
    while m and (j, m) in chosen:
        k, each = chosen[j, m]
        cuts.insert(0, (k, j, each))
        j, m = k, m - each
    return tuple(cuts) if m == 0 else ()


def _stages(problem: Problem, cuts: tuple[Cut, ...], micro_batches: int) -> tuple[Stage, ...]:
    ids, rows = iter(problem.cluster.ids), problem.job.batch // micro_batches
    out: list[Stage] = []
    for number, (start, stop, each) in enumerate(cuts):
        equal = largest_remainder(rows, (1.0,) * each)
        replicas = tuple(Replica(device=next(ids), rows=y) for y in equal)
        depth = warmup("shallow", number, len(cuts), micro_batches)
        out.append(Stage(start=start, stop=stop, replicas=replicas, warmup=depth))
    return tuple(out)
