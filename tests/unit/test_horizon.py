"""How far ahead devices may go."""

from __future__ import annotations

from spanwise.runtime.session import Horizon, Probe, StepReport


class Guide:
    def __init__(self) -> None:
        self.halted = False
        self.hesitation_s = 0.0

    def wants_halt(self) -> bool:
        return self.halted

    def hesitates_s(self) -> float:
        return self.hesitation_s

    def wanted_probes(self) -> tuple[Probe, ...]:
        return ()

    def probed(self, probe: Probe, samples: tuple[tuple[int, float], ...]) -> None:
        raise AssertionError


def report(step: int, seconds: float) -> StepReport:
    return StepReport(step, 0.0, 10.0, 10.0 + seconds)


def test_without_a_guide_all_steps_are_known_at_once() -> None:
    assert Horizon(3, 40, None).step == 43


def test_two_steps_ahead_of_slow_ones_more_of_fast_ones() -> None:
    horizon = Horizon(0, 1000, Guide())
    assert horizon.step == 2
    assert horizon.heard(report(0, 5.0)) == 3
    assert horizon.heard(report(1, 0.03)) == 6
    assert horizon.heard(report(2, 5.0)) == 6  # what was told stays
    assert horizon.heard(report(3, 1e-9)) == 4 + Horizon.MOST


def test_a_halt_leaves_the_known_steps() -> None:
    guide = Guide()
    horizon = Horizon(0, 1000, guide)
    horizon.heard(report(0, 0.02))
    known = horizon.step
    guide.halted = True
    assert horizon.heard(report(1, 0.02)) == known
    guide.halted = False
    assert horizon.heard(report(2, 0.02)) == known


def test_the_end_of_the_run_is_the_last_step() -> None:
    horizon = Horizon(0, 3, Guide())
    for step in range(3):
        horizon.heard(report(step, 0.001))
    assert horizon.step == 3


def test_while_a_guide_hesitates_no_step_is_added() -> None:
    guide = Guide()
    horizon = Horizon(0, 4, guide)
    guide.hesitation_s = 0.4
    assert horizon.held_s(None) == 0.0
    for step in (0, 1):
        assert horizon.held_s(report(step, 1.0)) == 0.4
        assert horizon.heard(report(step, 1.0)) == 2
    guide.hesitation_s = 0.0
    assert horizon.heard(report(1, 1.0)) == 4
    guide.hesitation_s = 0.4
    assert horizon.held_s(report(2, 1.0)) == 0.0, "there is no step to hold back"
    assert Horizon(0, 4, None).held_s(report(0, 1.0)) == 0.0


def test_a_guide_that_wants_a_halt_holds_nothing_back() -> None:
    guide = Guide()
    horizon = Horizon(0, 10, guide)
    guide.hesitation_s, guide.halted = 0.4, True
    assert horizon.heard(report(1, 1.0)) == 2
    assert horizon.held_s(report(1, 1.0)) == 0.0
