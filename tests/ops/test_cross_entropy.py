"""The chunked loss of a head against the plain one, with gradients."""

from __future__ import annotations

import pytest
import torch

from deepseek.ops.cross_entropy import (
    IGNORED,
    chunked,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from tests.tolerances import assert_close


def results(function, inputs, labels, bf16: bool) -> list[torch.Tensor]:
    states, weight = (each.clone().requires_grad_() for each in inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = function(states, weight, labels)
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
    inputs = torch.randn(count, 16), torch.randn(33, 16)
    labels = torch.randint(0, 33, (count,))
    labels[::5] = IGNORED
    expected = results(linear_cross_entropy_reference, inputs, labels, bf16)
    found = results(linear_cross_entropy, inputs, labels, bf16)
    for ours, theirs in zip(found, expected, strict=True):
        if bf16:
            error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-6)
            assert float(error) < 0.02
        else:
            assert_close(ours, theirs)


def test_an_impossible_label_has_a_finite_loss() -> None:
    """A chance below what float32 holds: the loss comes from the logits, not from its logarithm."""
    states, weight = torch.tensor([[1.0]]), torch.tensor([[500.0], [-500.0]])
    labels = torch.tensor([1])
    assert float(linear_cross_entropy(states, weight, labels)) == pytest.approx(1000.0)


def test_frozen_parts_get_no_gradient() -> None:
    states, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)
    linear_cross_entropy(states, weight, torch.arange(4)).backward()
    assert states.grad is not None and weight.grad is None


def test_nothing_counts() -> None:
    states = torch.randn(3, 8, requires_grad=True)
    loss = linear_cross_entropy(states, torch.randn(9, 8), torch.full((3,), IGNORED))
    loss.backward()
    assert loss.item() == 0.0 and states.grad is not None and not states.grad.any()
