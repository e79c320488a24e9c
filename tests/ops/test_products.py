"""Linear products, rotation and experts against their plain definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deepseek.ops import linear as linear_room
from deepseek.ops.experts import experts_swiglu
from deepseek.ops.linear import Linear, choose, linear
from deepseek.ops.linear import api as linear_api
from deepseek.ops.rope import deinterleave, rotate, rotate_both
from tests.tolerances import assert_close


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 5, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_choice_is_the_same_product(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, has_bf16: bool
) -> None:
    monkeypatch.setattr(linear_api, "computes_bf16", lambda device: has_bf16)
    inputs, weight, bias = torch.randn(rows, 33), torch.randn(17, 33), torch.randn(17)
    expected = F.linear(inputs, weight, bias)
    leaves = [t.clone().to(dtype).requires_grad_() for t in (inputs, weight, bias)]
    out = linear(*leaves)
    assert out.dtype == dtype
    limit = 1e-4 if dtype == torch.float32 else 0.15
    assert float((out.detach().float() - expected).abs().max()) < limit
    out.float().sum().backward()
    error = leaves[1].grad.float() - inputs.sum(0).expand(17, -1)
    assert float(error.abs().max()) < limit


def test_the_choice_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(linear_api, "computes_bf16", lambda device: True)
    assert choose(cpu, torch.bfloat16, 1) == "unpacked"
    assert choose(cpu, torch.bfloat16, 64) == "native"
    monkeypatch.setattr(linear_api, "computes_bf16", lambda device: False)
    assert choose(cpu, torch.bfloat16, 1) == "native"
    assert choose(cpu, torch.bfloat16, 64) == "widened"
    assert choose(cpu, torch.float32, 64) == "native"
    assert linear_room.Linear is Linear


def test_rotation_equals_complex_multiplication() -> None:
    angles = torch.rand(7, 4, dtype=torch.float64)
    states = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    out = rotate(states, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    turned = torch.complex(states[..., :4], states[..., 4:]) * torch.polar(
        torch.ones_like(angles), angles
    )
    assert_close(out, torch.cat((turned.real, turned.imag), -1))
    keys = torch.randn(2, 1, 7, 8, dtype=torch.float64)
    both = rotate_both(states, keys, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    assert_close(both[0], out)
    assert_close(both[1], rotate(keys, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
    pairs = torch.arange(6.0)
    assert deinterleave(pairs).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_experts_equal_a_loop_over_tokens(tokens: int) -> None:
    states = torch.randn(tokens, 5)
    gate_up, down = torch.randn(6, 8, 5), torch.randn(6, 5, 4)
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(tokens)]) if tokens else None
    chosen = torch.zeros(0, 2, dtype=torch.long) if chosen is None else chosen
    weights = torch.rand(tokens, 2)
    expected = torch.zeros(tokens, 5)
    for token in range(tokens):
        for place in range(2):
            expert = int(chosen[token, place])
            gate, up = (gate_up[expert] @ states[token]).chunk(2)
            expected[token] += weights[token, place] * (down[expert] @ (F.silu(gate) * up))
    assert_close(experts_swiglu(states, gate_up, down, chosen, weights), expected)
