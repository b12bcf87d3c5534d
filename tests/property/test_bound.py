"""No plan, however odd, is faster than the lower bound."""

from __future__ import annotations

from hypothesis import Phase, find, given, settings
from strategies import Case, cases

from planner_cases import make_job
from spanwise.lowering import lower
from spanwise.planner import Problem, lower_bound
from spanwise.simulator import simulate


def bound_and_steps(case: Case) -> tuple[float, float, float]:
    """The bound, the simulated step time, and the mean of three steps from the start on.

    Plans of these cases take their rows from anywhere, so the data is everywhere.
    """
    cluster = case.cluster.model_copy(update={"data": "everywhere"})
    job = make_job(case.plan.batch, clip_norm=1.0 if case.clip else None)
    problem = Problem(case.graph, case.profile, cluster, job)
    program = lower(case.plan, case.graph, clip=case.clip)
    found = simulate(program, case.plan, case.graph, case.profile, cluster, steps=3)
    return lower_bound(problem).step_time_s, found.step_time_s, max(s.end_s for s in found.spans) / 3


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases())
def test_random_plans_are_never_faster(case: Case) -> None:
    bound, step_s, mean_s = bound_and_steps(case)
    assert mean_s >= bound * (1 - 1e-9)
    assert step_s >= bound * (1 - 1e-9)


def test_a_bound_a_fifth_higher_is_broken() -> None:
    """Negative control: some case is faster than that."""

    def broken(case: Case) -> bool:
        bound, step_s, _ = bound_and_steps(case)
        return step_s < 1.2 * bound

    options = settings(max_examples=100, deadline=None, derandomize=True, phases=(Phase.generate,))
    assert broken(find(cases(), broken, settings=options))
