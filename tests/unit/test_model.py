from __future__ import annotations

from typing import Any

import pytest

from plan_cases import chain, spec
from spanwise.core.errors import InputError
from spanwise.core.model import Layer, ModelGraph


def test_a_row_of_a_tensor() -> None:
    assert spec("x", 3, 32, 32).row_bytes == 3 * 32 * 32 * 4
    assert spec("label", dtype="int64", item_bytes=8).row_bytes == 8
    assert spec("empty", 0).row_bytes == 0


def test_ties_name_the_layers_that_share_a_weight() -> None:
    assert chain(4).ties == ()
    assert chain(4, tied=(0, 3)).ties == (("w-tied", (0, 3)),)


def test_a_tied_weight_counts_once() -> None:
    graph = chain(4, tied=(0, 3))
    assert [p.name for p in graph.parameters] == ["w0", "w-tied", "w1", "w2", "w3"]
    assert graph.parameter_bytes == 4 + 8 + 12 + 16 + 40
    assert sum(layer.parameter_bytes for layer in graph.layers) == graph.parameter_bytes + 40
    assert [p.name for p in graph.parameters_of(2, 4)] == ["w2", "w3", "w-tied"]
    assert graph.parameters_of(1, 1) == ()


def test_what_enters_a_layer() -> None:
    graph = chain(3)
    assert graph.cut_before(0) == graph.inputs
    assert [s.name for s in graph.cut_before(2)] == ["x1"]
    assert len(graph) == 3


def test_bytes_of_a_cut() -> None:
    outputs = (spec("h", 5), spec("mask", 7, dtype="bool", item_bytes=1))
    layer = Layer(name="l", ops=(0, 1), forward_flops=0, backward_flops=0, outputs=outputs)
    assert layer.cut_bytes == 27
    assert layer.gradient_cut_bytes == 20  # a mask gets no gradient back


def test_bytes_of_a_row_of_data() -> None:
    assert (chain(2).input_row_bytes, chain(2).label_row_bytes) == (12, 8)


def changed(index: int, **changes: Any) -> ModelGraph:
    data = chain(3).to_data()
    data["layers"][index].update(changes)
    return ModelGraph.parse(data)


def test_a_model_has_a_layer() -> None:
    with pytest.raises(InputError, match="layers: Tuple should have at least 1 item"):
        ModelGraph.parse(chain(3).to_data() | {"layers": []})


@pytest.mark.parametrize("flops", [-1.0, float("nan"), float("inf")])
def test_work_of_a_layer_is_a_number(flops: float) -> None:
    for key in ("forward_flops", "backward_flops", "weight_flops"):
        with pytest.raises(InputError, match=rf"layers\.1\.{key}"):
            changed(1, **{key: flops})


def test_layers_follow_each_other() -> None:
    with pytest.raises(InputError, match="'l2' starts at operation 5, but 'l1' ends at 2"):
        changed(2, ops=[5, 6])


def test_something_crosses_every_cut_but_the_last() -> None:
    with pytest.raises(InputError, match="nothing crosses the cut behind layer 'l1'"):
        changed(1, outputs=[])
    with pytest.raises(InputError, match="last layer must end in the loss"):
        changed(2, outputs=[spec("y", 1).to_data()])


def test_equal_models_have_equal_digests() -> None:
    assert chain(3).digest == chain(3).digest
    assert chain(3).digest != chain(4).digest
    assert changed(0, saved_bytes=17).digest != chain(3).digest
