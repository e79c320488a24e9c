"""Cross-entropy of a head by chunks of rows: logits of all rows are never there together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.ops.cross_entropy.reference import IGNORED
from deepseek.ops.cross_entropy.split import is_split, linear_cross_entropy_split

_CHUNK_LOGITS = 1 << 26
"""Logits of a chunk: 256 MiB in float32."""


def linear_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the labels' cross-entropies in nats, float32 scalar.

    Products run in the dtype of autocast, where it is on, the softmax in float32. Gradients are
    formed on the way, while a chunk's logits are there (Hsu et al., "Liger Kernel", 2410.10989,
    section 3.2); deviation: they are held until the backward pass, which scales them: those of the
    weight in float32. They cannot be differentiated again.

    Args:
        states: [N, H].
        weight: of the head [V, H]; its rows may be divided over processes, as a DTensor.
        labels: int64 [N], -100 where none counts.
    """
    if is_split(weight):
        return linear_cross_entropy_split(states, weight, labels)  # type: ignore[arg-type]
    loss: Tensor = _ChunkedLoss.apply(states, weight, labels)  # type: ignore[assignment]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        device = states.device.type
        dtype = states.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        inputs, head = states.to(dtype), weight.to(dtype)
        total = states.new_zeros((), dtype=torch.float32)
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        to_states = torch.empty_like(states) if needs_states else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        rows = max(1, _CHUNK_LOGITS // weight.shape[0])
        with torch.autocast(device, enabled=False):
            for start in range(0, len(labels), rows):
                part = slice(start, start + rows)
                loss, slope = _loss_and_slope(inputs[part] @ head.T, labels[part])
                total += loss
                if to_states is not None:
                    to_states[part] = slope @ head
                if to_weight is not None:
                    to_weight += slope.T @ inputs[part]
        ctx.save_for_backward(to_states, to_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        to_states, to_weight = ctx.saved_tensors
        return (
            None if to_states is None else to_states * gradient.to(to_states.dtype),
            None if to_weight is None else (to_weight * gradient).to(ctx.weight_dtype),
            None,
        )


def _loss_and_slope(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses, and its gradient towards the logits, in their dtype."""
    counts = labels != IGNORED
    places = labels.clamp(min=0)[:, None]
    chances = torch.softmax(logits, -1, dtype=torch.float32)
    top, where = logits.max(-1, keepdim=True)
    # the likeliest token's chance is at least 1 / V, so its logarithm is safe where others' are not
    logsumexp = top.float() - chances.gather(1, where).log()
    losses = (logsumexp - logits.gather(1, places).float())[:, 0]
    slope = chances.to(logits.dtype)
    slope.scatter_add_(1, places, slope.new_full((1, 1), -1.0).expand_as(places))
    slope.masked_fill_(~counts[:, None], 0.0)
    return losses.masked_fill(~counts, 0.0).sum(), slope
