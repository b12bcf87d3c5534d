"""OpGraph: plain data, one text for one graph, and nothing but ATen can be named."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spanwise.core.errors import InputError
from spanwise.ops.arguments import Ref, TorchName, decode, encode
from spanwise.ops.opgraph import Op, OpGraph, Slot
from spanwise.ops.resolve import pack_constant, resolve, torch_value, unpack_constant

CPU = torch.device("cpu")

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5),
    st.builds(Ref, st.sampled_from(["node", "input", "parameter"]), st.text(max_size=5)),
    st.sampled_from([TorchName("dtype", "float32"), TorchName("device", ""), Ref("batch", "")]),
)  # fmt: skip
arguments = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


def linear(**changes: Any) -> OpGraph:
    x, w, y = Ref("input", "input_0"), Ref("parameter", "a.weight"), Ref("label", "label_0")
    fields: dict[str, Any] = {
        "nodes": (
            Op("linear_0", "aten.linear.default", (x, w)),
            Op("mse_loss_1", "aten.mse_loss.default", (Ref("node", "linear_0"), y)),
        ),
        "parameters": (Slot("a.weight", (2, 3), "float32"),),
        "buffers": (),
        "constants": (pack_constant("constant_0", torch.arange(3)),),
        "inputs": (Slot("input_0", (3,), "float32"),),
        "labels": (Slot("label_0", (2,), "float32"),),
        "loss": Ref("node", "mse_loss_1"),
        "outputs": (Ref("node", "linear_0"),),
    }
    return OpGraph(**{**fields, **changes})


@given(arguments)
def test_arguments_round_trip(argument: Any) -> None:
    back = decode(json.loads(json.dumps(encode(argument), allow_nan=False)))
    assert back == argument
    assert type(back) is type(argument)


def test_not_a_number_round_trips() -> None:
    assert math.isnan(decode(encode(float("nan"))))  # type: ignore[arg-type]
    assert encode(float("-inf")) == {"float": "-inf"}


def test_graph_round_trips_with_its_digest() -> None:
    graph = linear()
    back = OpGraph.from_json(graph.to_json())
    assert back == graph
    assert back.digest == graph.digest
    assert len(graph.digest) == 64
    assert linear(outputs=()).digest != graph.digest


@pytest.mark.parametrize(
    "value",
    [torch.tensor(2.5), torch.arange(6).reshape(2, 3), torch.tensor([True, False]), torch.empty(0, 3),
     torch.randn(2, 2, dtype=torch.bfloat16), torch.tensor([1.0, float("inf")], dtype=torch.float64)],
)  # fmt: skip
def test_constants_round_trip(value: torch.Tensor) -> None:
    back = unpack_constant(pack_constant("c", value), CPU)
    assert back.dtype == value.dtype
    assert torch.equal(back, value)


@pytest.mark.parametrize(
    "op",
    ["os.system", "aten.no_such.default", "aten.linear", "aten.linear.default.x", "operator.truediv", "aten",
     "aten.__class__.default", "prims.add.default", "aten.linear._schema", "aten.from_file.default",
     "aten.linear.__call__", "builtins.eval", ""],
)  # fmt: skip
def test_only_aten_can_be_named(op: str) -> None:
    with pytest.raises(InputError, match="is not one of torch"):
        resolve(op)


def test_known_names_resolve() -> None:
    assert resolve("aten.linear.default") is torch.ops.aten.linear.default
    assert resolve("operator.mul")(3, 4) == 12
    assert torch_value(TorchName("dtype", "float32"), CPU) is torch.float32
    assert torch_value(TorchName("memory_format", "channels_last"), CPU) is torch.channels_last
    assert torch_value(TorchName("device", ""), CPU) == CPU
    for bad in (TorchName("dtype", "nn"), TorchName("layout", "float32"), TorchName("dtype", "x.y")):
        with pytest.raises(InputError):
            torch_value(bad, CPU)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", "{\"format\": 99}", "nonsense", "[1, 2", "{\"format\": 1, \"nodes\": 3}"],
)  # fmt: skip
def test_foreign_text_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        OpGraph.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"nodes": (Op("a b", "aten.relu.default", (Ref("input", "input_0"),)),)}, "is not a name"),
        ({"nodes": (Op("a", "aten.relu.default", (Ref("node", "later"),)),)}, "not defined before"),
        ({"nodes": (Op("a", "aten.relu.default", (Ref("buffer", "b"),)),)}, "not defined before"),
        ({"loss": Ref("node", "gone")}, "the result reads node 'gone'"),
        ({"inputs": (Slot("i", (), "float32"), Slot("i", (), "float32"))}, "defined twice"),
    ],
)
def test_loose_references_are_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        linear(**changes)


def test_foreign_arguments_are_refused() -> None:
    for bad in ({"pickle": "x"}, {"ref": "x", "node": "y"}, {"node": 3}, {"float": "1.0"}):
        with pytest.raises(InputError, match="no argument of an operation"):
            decode(bad)
