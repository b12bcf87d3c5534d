from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_cases import chain
from spanwise.core.job import Recipe
from spanwise.core.model import Parameter
from spanwise.cost import halves
from spanwise.cost import training as cost


@pytest.mark.parametrize(
    ("name", "args", "copies"),
    [
        ("SGD", {"lr": 0.1}, 0), ("SGD", {"momentum": 0.9}, 1), ("SGD", {"momentum": 0}, 0),
        ("Adam", {}, 2), ("AdamW", {"amsgrad": True}, 3), ("AdamW", {"amsgrad": False}, 2),
        ("RMSprop", {}, 1), ("RMSprop", {"momentum": 0.9}, 2), ("Adagrad", {}, 1), ("Unheard", {}, 2),
    ],
)  # fmt: skip
def test_copies_that_an_optimizer_keeps(name: str, args: dict[str, object], copies: int) -> None:
    assert cost.optimizer_copies(Recipe(name=name, args=args)) == copies


def test_a_message_takes_latency_and_bytes_over_rate() -> None:
    assert cost.transfer_s(1e6, 4e6, 0.01) == pytest.approx(0.26)


def test_a_ring_by_counting_its_messages() -> None:
    """n - 1 rounds of reduce-scatter and n - 1 of all-gather, a piece of 1/n each, one after the other."""
    for devices in range(2, 7):
        rounds = [1200 / devices] * (devices - 1) * 2
        assert cost.ring_rounds(devices) == len(rounds)
        assert cost.ring_edge_bytes(devices, 1200) == pytest.approx(sum(rounds))
        one_by_one = sum(cost.transfer_s(piece, 50, 0.5) for piece in rounds)
        assert cost.ring_s(devices, 1200, 50, 0.5) == pytest.approx(one_by_one)


def test_one_device_needs_no_ring() -> None:
    assert cost.ring_s(1, 1200, 50, 0.5) == 0.0
    assert cost.ring_edge_bytes(1, 1200) == 0.0
    assert cost.ring_rounds(1) == 0


def test_state_is_weights_gradients_copies_and_the_buffer_that_travels() -> None:
    assert cost.state_bytes(100, 7, 0, synced=False) == 207
    assert cost.state_bytes(100, 7, 2, synced=False) == 407
    assert cost.state_bytes(100, 7, 2, synced=True) == 507


def test_saved_activations_grow_with_rows_but_for_the_fixed_part() -> None:
    data = chain(3).to_data()
    data["layers"][1]["saved_fixed_bytes"] = 1000
    graph = type(chain(3)).parse(data)
    assert cost.saved_bytes(graph, 0, 3, 5) == 3 * 16 * 5 + 1000
    assert cost.saved_bytes(graph, 2, 3, 5) == 16 * 5
    assert cost.saved_bytes(graph, 1, 1, 5) == 0


def test_between_the_halves_a_micro_batch_keeps_what_its_weight_gradients_need() -> None:
    layers = tuple(layer.model_copy(update={"deferred_bytes": 7}) for layer in chain(3).layers)
    graph = chain(3).model_copy(update={"layers": layers})
    assert cost.deferred_bytes(graph, 0, 3, 5) == 3 * 7 * 5
    whole, more = (
        cost.stage_bytes(graph, 0, 3, rows=5, in_flight=2, halved=halved, copies=1, synced=False)
        for halved in (0, 4)
    )
    assert more - whole == 4 * 3 * 7 * 5


def test_messages_are_both_cuts_both_ways() -> None:
    graph = chain(3)  # 12 bytes a row in, 8 behind layer 0, 16 behind layer 1
    assert cost.message_bytes(graph, 0, 1, 5) == 2 * 5 * (12 + 8)
    assert cost.message_bytes(graph, 1, 2, 5) == 2 * 5 * (8 + 16)
    assert cost.message_bytes(graph, 2, 3, 5) == 2 * 5 * 16


def test_a_stage_adds_up_and_counts_tied_weights_once() -> None:
    graph = chain(3, tied=(0, 2))
    parameters = 4 + 8 + 12 + 40
    expected = 3 * parameters + 2 * (3 * 16 * 5) + 2 * 5 * 12
    assert cost.stage_bytes(graph, 0, 3, rows=5, in_flight=2, copies=1, synced=False) == expected
    synced = cost.stage_bytes(graph, 0, 3, rows=5, in_flight=2, copies=1, synced=True)
    assert synced == expected + parameters


def test_what_layers_keep_that_run_again() -> None:
    """By hand: layers save 16 bytes a row and the middle one 1000 more; see ``chain`` for the cuts."""
    layers = tuple(layer.model_copy(update={"deferred_bytes": 7}) for layer in chain(4).layers)
    graph = chain(4).model_copy(update={"layers": layers})
    into = [sum(spec.row_bytes for spec in graph.cut_before(i)) for i in range(4)]
    save = [cost.saved_bytes(graph, i, i + 1, 5) for i in range(4)]
    out = [5 * layer.cut_bytes for layer in graph.layers]
    label = 5 * graph.label_row_bytes
    assert cost.kept_bytes(graph, 0, 4, 5) == sum(save)
    assert cost.again_bytes(graph, 4, 5) == 0
    assert cost.kept_bytes(graph, 0, 4, 5, ((0, 2),)) == 5 * into[0] + save[2] + save[3]
    assert cost.kept_bytes(graph, 0, 4, 5, ((0, 2), (2, 4))) == 5 * (into[0] + into[2]) + label
    every = max(sum(save[:2]) + out[1], sum(save[2:]) + out[3])
    assert cost.again_bytes(graph, 4, 5, ((0, 2), (2, 4))) == every
    # The last two layers are free by the time that the first two run again.
    assert cost.again_bytes(graph, 4, 5, ((0, 2),)) == max(0, sum(save[:2]) + out[1] - sum(save[2:]))
    halves = cost.again_bytes(graph, 4, 5, ((0, 2), (2, 4)), in_halves=True)
    assert halves == max(sum(save[2:]) + out[3], 2 * 7 * 5 + sum(save[:2]) + out[1])
    # Skip connections that enter two ranges are kept once.
    outputs = (*layers[0].outputs, *layers[1].outputs)
    skipping = graph.model_copy(
        update={"layers": (layers[0], layers[1].model_copy(update={"outputs": outputs}), *layers[2:])}
    )
    once = cost.kept_bytes(skipping, 0, 4, 5, ((1, 2), (2, 4)))
    assert once == save[0] + 5 * sum(spec.row_bytes for spec in outputs) + label


@given(
    weights=st.integers(0, 10_000),
    kept=st.integers(0, 500),
    rows=st.integers(1, 40),
    count=st.integers(1, 40),
)
def test_weight_halves_at_once_in_even_portions_that_copy_no_more_than_the_weights(
    weights: int, kept: int, rows: int, count: int
) -> None:
    (layer,) = chain(1).layers
    parameters = (Parameter(name="w", shape=(1,), bytes=weights),)
    layer = layer.model_copy(update={"parameters": parameters, "deferred_bytes": kept})
    found = halves.portions(layer, rows, count)
    assert sum(found) == count
    assert max(found) - min(found) <= 1
    copied = max(found) * rows * kept if max(found) > 1 else 0
    graph = chain(1).model_copy(update={"layers": (layer,)})
    assert copied <= halves.copied_bytes(graph, 0, 1, rows=rows, count=count) <= weights
    most = halves.most_at_once(layer, rows)
    assert most == 1 or most * rows * kept <= weights < (most + 1) * rows * kept
    assert len(found) == -(-count // most)
