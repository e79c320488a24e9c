"""A weight kept in four bits: the grid of the engine, and gradients to the inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deepseek.ops.linear import FrozenLinear, Linear
from deepseek.ops.linear.reference import round_int4
from tests.tolerances import assert_close


@pytest.mark.parametrize("shape", [(8, 64), (7, 96), (5, 40), (3, 34)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_product_with_the_rounded_weight(shape: tuple[int, int], bias: bool) -> None:
    rows, width = shape
    layer = Linear(width, rows, bias=bias)
    frozen = FrozenLinear(layer)
    padded = F.pad(layer.weight.detach(), (0, -width % 32))
    assert_close(frozen.weight, round_int4(padded, 32)[:, :width])
    inputs = torch.randn(2, 3, width)
    ours, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    found = frozen(ours)
    expected = F.linear(theirs, frozen.weight, layer.bias)
    assert_close(found, expected)
    slope = torch.randn_like(found)
    found.backward(slope)
    expected.backward(slope)
    assert_close(ours.grad, theirs.grad)


def test_it_is_small_and_not_trained() -> None:
    frozen = FrozenLinear(Linear(576, 64, bias=False))
    assert frozen.num_bytes == 64 * 576 * (4 + 32 / 32) / 8
    assert not [each for each in frozen.parameters() if each.requires_grad]


def test_products_follow_autocast() -> None:
    frozen = FrozenLinear(Linear(64, 8))
    inputs = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = frozen(inputs)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert_close(inputs.grad, frozen.weight.sum(0).expand(4, -1), torch.bfloat16)


def test_it_holds_codes_and_not_weights_until_the_backward_pass() -> None:
    frozen = FrozenLinear(Linear(64, 8))
    held: list[torch.Tensor] = []

    def note(value: torch.Tensor) -> torch.Tensor:
        held.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        frozen(torch.randn(4, 64, requires_grad=True))
    assert sum(value.nbytes for value in held) <= frozen.num_bytes
