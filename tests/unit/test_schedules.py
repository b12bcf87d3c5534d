from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanwise.schedules import Op, gpipe, one_f_one_b, stage_order

MICRO_BATCHES, WARMUP = st.integers(1, 40), st.integers(1, 50)


def live(order: tuple[Op, ...]) -> int:
    """Most micro-batches that are between forward and backward at once."""
    now = most = 0
    for op in order:
        now += 1 if op.kind == "forward" else -1
        most = max(most, now)
    return most


def assert_each_once(order: tuple[Op, ...], micro_batches: int) -> None:
    for kind in ("forward", "backward"):
        assert [op.micro_batch for op in order if op.kind == kind] == list(range(micro_batches))
    at = {op: position for position, op in enumerate(order)}
    assert all(at[Op("forward", m)] < at[Op("backward", m)] for m in range(micro_batches))


@given(MICRO_BATCHES, WARMUP)
def test_1f1b_computes_each_once_and_keeps_to_its_depth(micro_batches: int, warmup: int) -> None:
    order = one_f_one_b(micro_batches, warmup)
    assert_each_once(order, micro_batches)
    assert live(order) == min(warmup, micro_batches)


@given(MICRO_BATCHES)
def test_gpipe_computes_each_once_and_keeps_all(micro_batches: int) -> None:
    order = gpipe(micro_batches)
    assert_each_once(order, micro_batches)
    assert live(order) == micro_batches
    assert order == one_f_one_b(micro_batches, micro_batches)


@given(MICRO_BATCHES, WARMUP)
def test_schedules_by_name(micro_batches: int, warmup: int) -> None:
    assert stage_order("gpipe", micro_batches, warmup) == gpipe(micro_batches)
    assert stage_order("1f1b", micro_batches, warmup) == one_f_one_b(micro_batches, warmup)


def test_as_drawn_in_the_paper() -> None:
    """Narayanan et al., SC 2021, figure 4 without interleaving: the second of four stages, M = 8."""
    order = " ".join(map(str, one_f_one_b(8, 3)))
    assert order == "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7"


class _Recorder:
    """Stands for a stage of PyTorch's pipeline: notes what is computed, sends nothing."""

    def __init__(self, index: int) -> None:
        self.stage_index = index
        self.order: list[Op] = []
        self.is_last = False

    def forward_one_chunk(self, micro_batch: int, *_: object, **__: object) -> None:
        self.order.append(Op("forward", micro_batch))

    def backward_one_chunk(self, micro_batch: int, *_: object, **__: object) -> None:
        self.order.append(Op("backward", micro_batch))

    def __getattr__(self, name: str) -> object:
        if name.startswith("get_"):
            return lambda *_: []
        return lambda *_, **__: None


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (2, 4), (3, 2), (4, 4), (4, 9)])
def test_like_pytorch_where_every_stage_is_alike(
    stages: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own 1F1B runs on recorders; stage p of P has the depth P - p."""
    pipelining = pytest.importorskip("torch.distributed.pipelining.schedules")
    for index in range(stages):
        recorder = _Recorder(index)
        schedule = object.__new__(pipelining.Schedule1F1B)
        schedule._stage, schedule._num_stages, schedule._n_microbatches = recorder, stages, micro_batches
        monkeypatch.setattr(
            schedule, "_check_inputs", lambda *_: ([()] * micro_batches, [{}] * micro_batches)
        )
        for name in ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses"):
            monkeypatch.setattr(schedule, name, lambda *_: None)
        schedule.scale_grads = False
        schedule._step_microbatches()
        assert tuple(recorder.order) == one_f_one_b(micro_batches, stages - index)
