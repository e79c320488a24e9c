"""Cross-entropy of a head by chunks of rows: logits of all rows are never there together."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops.cross_entropy.reference import IGNORED
from deepseek.ops.cross_entropy.split import is_split, linear_cross_entropy_split
from deepseek.ops.head_loss import head_loss

_CHUNK_LOGITS = 1 << 26
"""Logits of a chunk: 256 MiB in float32."""


def linear_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the labels' cross-entropies in nats, float32 scalar.

    Products run in the dtype of autocast, where it is on, the softmax in float32. It can be
    differentiated once (`ops.head_loss`).

    Args:
        states: [N, H].
        weight: of the head [V, H]; its rows may be divided over processes, as a DTensor.
        labels: int64 [N], -100 where none counts.
    """
    if is_split(weight):
        return linear_cross_entropy_split(states, weight, labels)  # type: ignore[arg-type]

    def of_chunk(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return _loss_and_slope(logits, labels[part])

    return head_loss(states, weight, of_chunk, rows=max(1, _CHUNK_LOGITS // weight.shape[0]))


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
