"""A loss of a vocabulary's logits by chunks of rows: those of all rows are never there together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LossAndSlope = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Of a chunk's logits [n, V] and its rows: the sum of their losses, float32, and the gradient
towards the logits."""


def head_loss(states: Tensor, weight: Tensor, loss_and_slope: LossAndSlope, *, rows: int) -> Tensor:
    """Return the sum over rows of a loss of `states @ weight.T`, float32 scalar.

    Products run in the dtype of autocast, where it is on; `loss_and_slope` runs without. Gradients
    are formed on the way, while a chunk's logits are there (Hsu et al., "Liger Kernel",
    2410.10989, section 3.2); deviation: they are held until the backward pass, which scales them,
    those of the weight in float32. They cannot be differentiated again.

    Args:
        states: [N, H].
        weight: of the head [V, H].
        loss_and_slope: called for each chunk, in order.
        rows: of a chunk.
    """
    loss: Tensor = _HeadLoss.apply(states, weight, loss_and_slope, rows)  # type: ignore[assignment]
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, loss_and_slope: LossAndSlope, rows: int
    ) -> Tensor:
        device, dtype = states.device.type, states.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        inputs, head = states.to(dtype), weight.to(dtype)
        total = states.new_zeros((), dtype=torch.float32)
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        to_states = torch.empty_like(states) if needs_states else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(states), rows):
                part = slice(start, start + rows)
                loss, slope = loss_and_slope(inputs[part] @ head.T, part)
                slope = slope.to(dtype)
                total += loss
                if to_states is not None:
                    to_states[part] = slope @ head
                if to_weight is not None:
                    to_weight += slope.T @ inputs[part]
        ctx.save_for_backward(to_states, to_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        to_states, to_weight = ctx.saved_tensors
        return (
            None if to_states is None else to_states * gradient.to(to_states.dtype),
            None if to_weight is None else (to_weight * gradient).to(ctx.weight_dtype),
            None,
            None,
        )
