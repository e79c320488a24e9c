"""The chunked divergence of two heads against the plain one, with gradients."""

from __future__ import annotations

import pytest
import torch

from deepseek.ops.distillation import (
    chunked,
    linear_divergence,
    linear_divergence_reference,
)
from tests.tolerances import assert_close


def results(function, inputs, counts, bf16: bool, temperature: float = 1.0) -> list[torch.Tensor]:
    states, weight = (each.clone().requires_grad_() for each in inputs[:2])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = function(states, weight, *inputs[2:], counts, temperature)
    (3.0 * loss).backward()
    assert loss.dtype == torch.float32
    return [loss.detach(), states.grad, weight.grad]


@pytest.mark.parametrize("count", [1, 7, 64])
@pytest.mark.parametrize("chunk", [1, 100, 10**9])
@pytest.mark.parametrize("bf16", [False, True])
def test_chunks_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, count: int, chunk: int, bf16: bool
) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", chunk)
    inputs = [torch.randn(shape) for shape in ((count, 16), (33, 16), (count, 24), (33, 24))]
    counts = torch.arange(count) % 5 != 2
    expected = results(linear_divergence_reference, inputs, counts, bf16)
    found = results(linear_divergence, inputs, counts, bf16)
    for ours, theirs in zip(found, expected, strict=True):
        if bf16:
            error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-6)
            assert float(error) < 0.03
        else:
            assert_close(ours, theirs)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_temperature_softens_both(bf16: bool) -> None:
    inputs = [torch.randn(shape) for shape in ((7, 16), (33, 16), (7, 24), (33, 24))]
    counts = torch.arange(7) != 2
    expected = results(linear_divergence_reference, inputs, counts, bf16, 3.0)
    found = results(linear_divergence, inputs, counts, bf16, 3.0)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < (0.03 if bf16 else 1e-5)
    assert float(found[0]) < float(results(linear_divergence, inputs, counts, bf16)[0]) * 9


def test_a_head_is_no_way_from_itself() -> None:
    states, weight = torch.randn(5, 8, requires_grad=True), torch.randn(9, 8)
    loss = linear_divergence(states, weight, states.detach(), weight, torch.ones(5).bool())
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert_close(states.grad, torch.zeros(5, 8))


def test_certain_heads_have_a_finite_divergence() -> None:
    states, weight = torch.tensor([[1.0]]), torch.tensor([[500.0], [-500.0]])
    loss = linear_divergence(states, weight, states, -weight, torch.tensor([True]))
    assert float(loss) == pytest.approx(1000.0)


def test_nothing_counts_and_the_frozen_get_no_gradient() -> None:
    states, weight = torch.randn(3, 8, requires_grad=True), torch.randn(9, 8)
    loss = linear_divergence(states, weight, states.detach(), -weight, torch.zeros(3).bool())
    loss.backward()
    assert loss.item() == 0.0 and not states.grad.any() and weight.grad is None
