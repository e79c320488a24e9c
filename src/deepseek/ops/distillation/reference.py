"""The specification of the divergence of two heads, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_divergence_reference(
    states: Tensor,
    weight: Tensor,
    taught: Tensor,
    teacher: Tensor,
    counts: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Return the sum over rows of KL(teacher || student) in nats at a temperature, times its
    square, float32 scalar.

    Args:
        states: of the student [N, H].
        weight: of its head [V, H].
        taught: states of the teacher [N, G].
        teacher: weight of its head [V, G].
        counts: bool [N], which rows count.
        temperature: by which logits of both are divided, above 0.
    """
    ours = F.log_softmax(F.linear(states, weight).float() / temperature, -1)
    theirs = F.log_softmax(F.linear(taught, teacher).float() / temperature, -1).detach()
    each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return each[counts].sum() * temperature**2
