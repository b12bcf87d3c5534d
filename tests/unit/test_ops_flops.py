"""FLOPs against numbers worked out by hand, and against torch's counter where that is right."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spanwise.ops.flops import Flops, Operand, count
from spanwise.profiler.trace import trace


def grad(*shape: int) -> Operand:
    return Operand(shape, needs_gradient=True)


def test_depthwise_convolution() -> None:
    # 8 rows, 32 channels in 32 groups, 3 x 3, 16 x 16 positions: 9 multiply-adds per output element.
    found = count("aten.conv2d.default", (grad(8, 32, 16, 16), grad(32, 1, 3, 3)), (8, 32, 16, 16))
    forward = 2 * 9 * 8 * 32 * 16 * 16
    assert found == Flops(forward, 2 * forward, product=True)


def test_grouped_and_strided_convolution() -> None:
    args = (grad(1, 8, 10, 10), grad(6, 4, 3, 3))  # 2 groups
    assert count("aten.conv2d.default", args, (1, 6, 4, 4)).forward == 2 * 6 * 4 * 4 * 4 * 3 * 3
    first = (Operand((1, 8, 10, 10)), grad(6, 4, 3, 3))  # the input of a model needs no gradient
    found = count("aten.conv2d.default", first, (1, 6, 4, 4))
    assert found.backward == found.forward
    frozen = (grad(1, 8, 10, 10), Operand((6, 4, 3, 3)))
    assert count("aten.conv2d.default", frozen, (1, 6, 4, 4)).backward == found.forward
    neither = (Operand((1, 8, 10, 10)), Operand((6, 4, 3, 3)))
    assert count("aten.conv2d.default", neither, (1, 6, 4, 4)).backward == 0


def test_transposed_convolution() -> None:
    # 4 -> 6 channels, 2 x 2 kernel, stride 2: every input element meets 6 * 4 weights.
    found = count("aten.conv_transpose2d.input", (grad(3, 4, 5, 5), grad(4, 6, 2, 2)), (3, 6, 10, 10))
    assert found.forward == 2 * 3 * 4 * 25 * 6 * 4


@pytest.mark.parametrize(
    ("op", "args", "result", "forward"),
    [
        ("aten.linear.default", (grad(7, 5), grad(3, 5)), (7, 3), 2 * 7 * 5 * 3),
        ("aten.linear.default", (grad(2, 7, 5), grad(3, 5), grad(3)), (2, 7, 3), 2 * 2 * 7 * 5 * 3),
        ("aten.mm.default", (grad(7, 5), grad(5, 3)), (7, 3), 2 * 7 * 5 * 3),
        ("aten.bmm.default", (grad(2, 7, 5), grad(2, 5, 3)), (2, 7, 3), 2 * 2 * 7 * 5 * 3),
        ("aten.matmul.default", (grad(2, 4, 7, 5), grad(5, 3)), (2, 4, 7, 3), 2 * 2 * 4 * 7 * 5 * 3),
        ("aten.addmm.default", (grad(3), grad(7, 5), grad(5, 3)), (7, 3), 2 * 7 * 5 * 3),
        ("aten.einsum.default", ("bij,bjk->bik", (grad(2, 7, 5), grad(2, 5, 3))), (2, 7, 3), 420),
        ("aten.einsum.default", ("...ij,jk->...ik", (grad(2, 7, 5), grad(5, 3))), (2, 7, 3), 420),
    ],
)
def test_products(op: str, args: tuple[object, ...], result: tuple[int, ...], forward: int) -> None:
    found = count(op, args, result)
    assert found == Flops(forward, 2 * forward, product=True)


def test_attention() -> None:
    # 2 rows, 3 heads, 5 queries, 7 keys, widths 4 and 6: scores 2*3*5*7*2*4, values 2*3*5*7*2*6.
    args = (grad(2, 3, 5, 4), grad(2, 3, 7, 4), grad(2, 3, 7, 6))
    found = count("aten.scaled_dot_product_attention.default", args, (2, 3, 5, 6))
    forward = 2 * 3 * 5 * 7 * 2 * (4 + 6)
    assert found == Flops(forward, 2 * forward, product=True)


def test_elementwise_views_and_reductions() -> None:
    assert count("aten.relu_.default", (grad(4, 10),), (4, 10)) == Flops(40, 40)
    assert count("aten.add.Tensor", (grad(4, 10), grad(4, 10)), (4, 10)) == Flops(40, 80)
    assert count("aten.add.Tensor", (grad(4, 10), Operand((10,))), (4, 10)) == Flops(40, 40)
    assert count("aten.view.default", (grad(4, 10), (-1,)), (40,)) == Flops(0, 0)
    assert count("operator.getitem", (grad(4, 10), 0), (4,)) == Flops(0, 0)
    assert count("aten.mean.dim", (grad(4, 10), (1,)), (4,)) == Flops(40, 40)
    assert count("aten.max_pool2d.default", (grad(1, 2, 8, 8), (2, 2)), (1, 2, 4, 4)).forward == 2 * 16 * 4
    assert count("aten.avg_pool2d.default", (grad(1, 2, 8, 8), (2,)), (1, 2, 4, 4)).forward == 2 * 16 * 4
    assert count("aten.embedding.default", (grad(9, 6), Operand((4,))), (4, 6)) == Flops(0, 24)


def test_whole_model_without_groups_is_torch_counter() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.Flatten(),
        nn.Linear(16 * 9, 10, bias=False),
    )  # fmt: skip
    x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x), y).backward()
    graph = trace(model, F.cross_entropy, (x,), (y,), name="plain").graph
    mine = sum(layer.forward_flops + layer.backward_flops for layer in graph.layers)
    loss = 2 * 10  # elementwise, forward and backward, which torch's counter leaves out
    assert mine == pytest.approx(counter.get_total_flops() / 4 + loss)


def test_depthwise_layer_of_a_model() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Flatten(),
        nn.Linear(8 * 36, 10, bias=False),
    )  # fmt: skip
    sample = (torch.randn(4, 3, 6, 6),), (torch.randint(10, (4,)),)
    layers = trace(model, F.cross_entropy, *sample, name="depthwise").graph.layers
    forward = 2 * prod((8, 36, 9))
    assert (layers[1].name, layers[1].forward_flops, layers[1].backward_flops) == ("1", forward, 2 * forward)
    assert layers[0].backward_flops == layers[0].forward_flops == 2 * 3 * 8 * 36
