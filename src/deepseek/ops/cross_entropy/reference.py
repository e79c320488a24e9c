"""The specification of the loss of a head, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label that does not count."""


def linear_cross_entropy_reference(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the labels' cross-entropies in nats, float32 scalar.

    Args:
        states: [N, H].
        weight: of the head [V, H].
        labels: int64 [N], -100 where none counts.
    """
    logits = F.linear(states, weight).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
