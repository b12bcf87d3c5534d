from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from plan_cases import chain, plan, stage
from spanwise.core.cluster import DataShare
from spanwise.core.errors import InputError
from spanwise.core.model import TensorSpec
from spanwise.runtime.feed import Feed, Sampler, cast, held_rows, read_rows, shard


def shares(*values: float) -> tuple[DataShare, ...]:
    return tuple(DataShare(device=f"d{i}", share=value) for i, value in enumerate(values))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 200), st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_shards_deal_every_row_out_once_and_by_share(rows: int, values: list[float]) -> None:
    found = [shard(rows, shares(*values), f"d{i}").tolist() for i in range(len(values))]
    assert sorted(row for one in found for row in one) == list(range(rows))
    assert all(one == sorted(one) for one in found)
    for one, value in zip(found, values, strict=True):
        assert abs(len(one) - rows * value / sum(values)) <= max(1.0, len(values) - 1)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [0, 1, 10, 12])
def test_equal_shares_are_dealt_in_turn(count: int, rows: int) -> None:
    for i in range(count):
        assert shard(rows, shares(*[0.7] * count), f"d{i}").tolist() == list(range(i, rows, count))


def test_unequal_shares_are_interleaved() -> None:
    big, small = (shard(8, shares(3, 1), d).tolist() for d in ("d0", "d1"))
    assert [len(big), len(small)] == [6, 2]
    assert all(4 * i <= row < 4 * i + 4 for i, row in enumerate(small))


SAMPLER = Sampler(seed=3, counts=(25, 13), rows=(4, 2), micro_batches=2)


def test_an_epoch_repeats_no_row() -> None:
    assert SAMPLER.steps_per_epoch == 3
    for epoch in range(2):
        for source, (count, rows) in enumerate(zip(SAMPLER.counts, SAMPLER.rows, strict=True)):
            steps = range(epoch * 3, epoch * 3 + 3)
            found = [SAMPLER.indices(source, step) for step in steps]
            assert all(one.shape == (2, rows) for one in found)
            seen = torch.cat(found).flatten().tolist()
            assert len(set(seen)) == len(seen) == 3 * 2 * rows
            assert set(seen) <= set(range(count))


def test_an_epoch_that_fits_covers_the_shard() -> None:
    sampler = Sampler(seed=0, counts=(24,), rows=(4,), micro_batches=2)
    seen = torch.cat([sampler.indices(0, step) for step in range(3)]).flatten().tolist()
    assert sorted(seen) == list(range(24))


def test_the_order_depends_on_seed_epoch_and_source_alone() -> None:
    again = Sampler(seed=3, counts=(25, 13), rows=(4, 2), micro_batches=2)
    torch.manual_seed(99)  # the global generator has no part in it
    assert all(torch.equal(SAMPLER.indices(s, t), again.indices(s, t)) for s in (0, 1) for t in range(7))
    other = Sampler(seed=4, counts=(25, 13), rows=(4, 2), micro_batches=2)
    assert not torch.equal(SAMPLER.indices(0, 0), other.indices(0, 0))
    assert not torch.equal(SAMPLER.indices(0, 0), SAMPLER.indices(0, 3))
    twins = Sampler(seed=3, counts=(25, 25), rows=(4, 4), micro_batches=2)
    assert not torch.equal(twins.indices(0, 0), twins.indices(1, 0))


def test_more_micro_batches_of_fewer_rows_are_the_same_batch() -> None:
    finer = Sampler(seed=3, counts=(25, 13), rows=(2, 1), micro_batches=4)
    assert torch.equal(finer.indices(0, 1).flatten(), SAMPLER.indices(0, 1).flatten())


COMMON = Sampler(seed=3, counts=(25, 25), rows=(4, 2), micro_batches=2, common=True)


def batch(sampler: Sampler, step: int) -> list[list[int]]:
    """Rows of every micro-batch of a step, over all sources in order."""
    parts = [sampler.indices(source, step) for source in range(len(sampler.rows))]
    return torch.cat(parts, dim=1).tolist()


def test_sources_with_all_rows_read_no_row_twice() -> None:
    assert COMMON.steps_per_epoch == 2  # 25 rows, 12 a batch
    for epoch in range(2):
        steps = [batch(COMMON, step) for step in range(2 * epoch, 2 * epoch + 2)]
        seen = [row for step in steps for micro_batch in step for row in micro_batch]
        assert len(set(seen)) == len(seen) == 24
        assert set(seen) <= set(range(25))


def test_batches_of_rows_that_are_everywhere_depend_on_the_seed_alone() -> None:
    def order(sampler: Sampler, step: int) -> list[int]:
        return [row for micro_batch in batch(sampler, step) for row in micro_batch]

    others = [((12,), 1), ((6,), 2), ((1, 1, 1), 4), ((2, 4), 2)]
    for rows, micro_batches in others:
        other = Sampler(3, (25,) * len(rows), rows, micro_batches, common=True)
        assert all(order(other, step) == order(COMMON, step) for step in range(5))
    different = Sampler(4, (25,), (12,), 1, common=True)
    assert order(different, 0) != order(COMMON, 0)
    assert order(COMMON, 0) != order(COMMON, 2)
    shards = Sampler(3, (25, 25), (4, 2), 2)  # control: of shards it depends on the plan
    assert order(shards, 0) != order(Sampler(3, (25, 25), (2, 4), 2), 0)


GRAPH = chain(2)
PLAN = plan(GRAPH, stage(0, 2, "d0:3 d1:1"))


def test_the_sampler_of_a_plan() -> None:
    """The order of the shares in the cluster does not matter, that of the sources does."""
    sampler = Sampler.of(PLAN, shares(3, 1)[::-1], 40, seed=5)
    assert sampler == Sampler(seed=5, counts=(30, 10), rows=(3, 1), micro_batches=2)


def test_the_sampler_of_a_plan_whose_data_is_everywhere() -> None:
    sampler = Sampler.of(PLAN, (), 40, seed=5)
    assert sampler == Sampler(seed=5, counts=(40, 40), rows=(3, 1), micro_batches=2, common=True)
    assert sampler.steps_per_epoch == 5
    assert held_rows(40, (), "d1").tolist() == list(range(40))
    assert Sampler.of(PLAN, (), 8, seed=5).steps_per_epoch == 1
    with pytest.raises(InputError, match=r"data: 7 rows do not fill one batch of 8 rows; lower 'batch' or"):
        Sampler.of(PLAN, (), 7, seed=5)


def test_data_that_does_not_fill_a_batch() -> None:
    with pytest.raises(InputError, match=r"7 rows on 2 device\(s\) do not fill one batch of 8 rows.*6, 2"):
        Sampler.of(PLAN, shares(3, 1), 7, seed=0)


def test_rows_of_tensors() -> None:
    x, extra, y = torch.arange(20.0).view(10, 2), torch.arange(10), torch.arange(10, 20)
    inputs, labels = read_rows(TensorDataset(x, extra, y), torch.tensor([7, 2]))
    assert [t.tolist() for t in (*inputs, *labels)] == [[[14, 15], [4, 5]], [7, 2], [17, 12]]
    assert (len(inputs), len(labels)) == (2, 1)


def test_rows_of_any_list_of_pairs() -> None:
    pairs = [((torch.full((2,), float(i)), i * 10), i % 3) for i in range(5)]
    inputs, labels = read_rows(pairs, torch.tensor([4, 1]))
    assert [t.tolist() for t in (*inputs, *labels)] == [[[4, 4], [1, 1]], [40, 10], [1, 1]]
    single, _ = read_rows([(torch.zeros(3), 0), (torch.ones(3), 1)], torch.tensor([1]))
    assert [t.tolist() for t in single] == [[[1, 1, 1]]]


def spec(*shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name="x", shape=shape, dtype=dtype, item_bytes=4)


def test_casting_to_what_was_traced() -> None:
    (found,) = cast((torch.ones(4, 3, dtype=torch.float64),), (spec(3),))
    assert found.dtype == torch.float32
    (label,) = cast((torch.ones(4, dtype=torch.int32),), (spec(dtype="int64"),))
    assert label.dtype == torch.int64


def test_casting_refuses_other_shapes() -> None:
    with pytest.raises(InputError, match=r"rows of 'x' have shape \(2,\), the model was traced with \(3,\)"):
        cast((torch.ones(4, 2),), (spec(3),))


def test_casting_refuses_another_number_of_tensors() -> None:
    with pytest.raises(InputError, match="data: a row has 2 tensors where the model was traced with 1"):
        cast((torch.ones(4, 3), torch.ones(4, 3)), (spec(3),))


def test_a_feed_reads_the_rows_of_its_own_shard() -> None:
    held = shard(40, shares(3, 1), "d1")
    data = TensorDataset(torch.arange(120.0).view(40, 3), torch.arange(40))
    sampler = Sampler.of(PLAN, shares(3, 1), 40, seed=5)
    feed = Feed(data, held, sampler, 1, GRAPH)
    for step in (0, 1, 0, 6):  # back as well: a resumed run starts anywhere
        for m in range(2):
            (inputs,), (labels,) = feed.rows(step, m)
            assert labels.tolist() == held[sampler.indices(1, step)[m]].tolist()
            assert torch.equal(inputs[:, 0], labels * 3.0)
