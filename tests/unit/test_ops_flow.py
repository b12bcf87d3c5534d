"""Flow: what is recomputed anywhere, what overwrites what, what shares storage."""

from __future__ import annotations

from spanwise.ops.arguments import Argument, Ref, TorchName
from spanwise.ops.flow import is_random, is_view, shares_with, written
from spanwise.ops.opgraph import Op, OpGraph, Slot

X, W = Ref("input", "x"), Ref("parameter", "w")
BATCH = Ref("batch", "")
FLOAT = (("dtype", TorchName("dtype", "float32")),)


def n(name: str) -> Ref:
    return Ref("node", name)


def op(name: str, op: str, *args: Argument) -> Op:
    return Op(name, f"aten.{op}", args)


def graph(*nodes: Op) -> OpGraph:
    return OpGraph(
        nodes=nodes,
        parameters=(Slot("w", (4, 4), "float32"),),
        buffers=(Slot("b", (4,), "float32"), Slot("c", (4,), "float32")),
        constants=(),
        inputs=(Slot("x", (4,), "float32"),),
        labels=(),
        loss=n(nodes[-1].name),
    )


def free(*nodes: Op) -> list[str]:
    ops = graph(*nodes)
    return [node.name for node, is_free in zip(ops.nodes, ops.flow.free, strict=True) if is_free]


def test_sizes_constants_and_parameters_are_free() -> None:
    names = free(
        Op("zeros", "aten.zeros.default", ((BATCH, 4),), FLOAT),
        op("t", "t.default", W),
        op("mm", "mm.default", n("zeros"), n("t")),
        op("add", "add.Tensor", n("mm"), Ref("buffer", "b")),
        op("mul", "mul.Tensor", X, n("add")),
    )
    assert names == ["zeros", "t", "mm", "add"]


def test_random_numbers_are_not_free() -> None:
    assert free(Op("rand", "aten.rand.default", ((BATCH, 4),)), op("mul", "mul.Tensor", X, n("rand"))) == []
    assert is_random("aten.dropout.default")
    assert not is_random("aten.relu.default")


def test_a_buffer_that_is_overwritten_is_not_free() -> None:
    names = free(
        op("plus", "add.Tensor", Ref("buffer", "b"), 1),
        op("other", "add.Tensor", Ref("buffer", "c"), 1),
        op("write", "add_.Tensor", Ref("buffer", "b"), 1),
        op("sum", "add.Tensor", X, n("plus")),
    )
    assert names == ["other"]


def test_overwriting_by_data_taints_what_shares_the_storage() -> None:
    nodes = (
        Op("zeros", "aten.zeros.default", ((BATCH, 4),), FLOAT),
        op("part", "select.int", n("zeros"), 1, 0),
        op("row", "select.int", X, 1, 0),
        op("write", "copy_.default", n("part"), n("row")),
        op("use", "add.Tensor", n("zeros"), 1),
    )
    assert free(*nodes) == []
    flow = graph(*nodes).flow
    assert flow.groups[n("zeros")] == flow.groups[n("part")] == flow.groups[n("write")]
    assert flow.groups[n("use")] != flow.groups[n("zeros")]
    assert flow.needs[4] == (0, 3)  # reads zeros after it was overwritten through a view


def test_constants_that_are_overwritten_are_made_anew() -> None:
    nodes = (
        Op("zeros", "aten.zeros.default", ((4, 4),), FLOAT),
        op("part", "select.int", n("zeros"), 1, 0),
        op("write", "fill_.Scalar", n("part"), 1.0),
        op("mul", "mul.Tensor", X, 2.0),
        op("use", "mul.Tensor", n("mul"), n("zeros")),
    )
    ops = graph(*nodes)
    assert free(*nodes) == ["zeros", "part", "write"]
    assert ops.flow.stage(3, 4) == [3]
    assert ops.flow.stage(4, 5) == [0, 1, 2, 4]  # the stage that uses it repeats all three


def test_batch_norm_overwrites_its_statistics() -> None:
    b, c = Ref("buffer", "b"), Ref("buffer", "c")
    training = op("bn", "batch_norm.default", X, None, None, b, c, True, 0.1, 1e-5, False)
    frozen = op("bn", "batch_norm.default", X, None, None, b, c, False, 0.1, 1e-5, False)
    assert written(training) == (b, c)
    assert written(frozen) == ()


def test_composites_may_return_their_argument() -> None:
    assert shares_with(op("d", "dropout.default", X, 0.0, True)) == (X,)
    assert shares_with(op("l", "linear.default", X, W)) == ()
    assert shares_with(op("r", "reshape.default", X, (-1,))) == (X,)
    assert shares_with(op("a", "add.Tensor", X, X)) == ()
    assert is_view("aten.reshape.default")
    assert not is_view("aten.relu_.default")
