"""The divergence of two heads by chunks of rows: logits of all rows are never there together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS = 1 << 25
"""Logits of a chunk, of each head: 128 MiB in float32."""


def linear_divergence(
    states: Tensor, weight: Tensor, taught: Tensor, teacher: Tensor, counts: Tensor
) -> Tensor:
    """Return the sum over rows of KL(teacher || student) in nats, float32 scalar.

    The student's gradient towards a logit is its chance less the teacher's, formed on the way while
    a chunk's logits are there, as in `ops.cross_entropy`. No gradient reaches the teacher, and it
    cannot be differentiated again. Products of the student run in the dtype of autocast, where it
    is on, those of the teacher in its own.

    Source: Hinton et al., "Distilling the knowledge in a neural network" (1503.02531), at
    temperature 1.

    Args:
        states: of the student [N, H].
        weight: of its head [V, H].
        taught: states of the teacher [N, G].
        teacher: weight of its head [V, G].
        counts: bool [N], which rows count.
    """
    loss: Tensor = _ChunkedDivergence.apply(states, weight, taught, teacher, counts)  # type: ignore[assignment]
    return loss


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, taught: Tensor, teacher: Tensor, counts: Tensor
    ) -> Tensor:
        device, dtype = states.device.type, states.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        inputs, head = states.to(dtype), weight.to(dtype)
        total = states.new_zeros((), dtype=torch.float32)
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        to_states = torch.empty_like(states) if needs_states else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        rows = max(1, _CHUNK_LOGITS // weight.shape[0])
        with torch.autocast(device, enabled=False):
            for start in range(0, len(states), rows):
                part = slice(start, start + rows)
                theirs = taught[part].to(teacher.dtype) @ teacher.T
                loss, slope = _divergence_and_slope(inputs[part] @ head.T, theirs, counts[part])
                total += loss
                slope = slope.to(dtype)
                if to_states is not None:
                    to_states[part] = slope @ head
                if to_weight is not None:
                    to_weight += slope.T @ inputs[part]
        ctx.save_for_backward(to_states, to_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        to_states, to_weight = ctx.saved_tensors
        return (
            None if to_states is None else to_states * gradient.to(to_states.dtype),
            None if to_weight is None else (to_weight * gradient).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _divergence_and_slope(ours: Tensor, theirs: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the rows' divergences, and its gradient towards our logits in float32."""
    ours = torch.log_softmax(ours, -1, dtype=torch.float32)
    theirs = torch.log_softmax(theirs, -1, dtype=torch.float32)
    chances = theirs.exp()
    # a chance of zero has no part in the sum: zero times infinity would be no number
    each = (chances * (theirs - ours)).masked_fill_(chances == 0, 0.0).sum(-1)
    slope = ours.exp_().sub_(chances).masked_fill_(~counts[:, None], 0.0)
    return each.masked_fill(~counts, 0.0).sum(), slope
