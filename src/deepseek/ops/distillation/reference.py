"""The specification of the divergence of two heads, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_divergence_reference(
    states: Tensor, weight: Tensor, taught: Tensor, teacher: Tensor, counts: Tensor
) -> Tensor:
    """Return the sum over rows of KL(teacher || student) in nats, float32 scalar.

    Args:
        states: of the student [N, H].
        weight: of its head [V, H].
        taught: states of the teacher [N, G].
        teacher: weight of its head [V, G].
        counts: bool [N], which rows count.
    """
    ours = F.log_softmax(F.linear(states, weight).float(), -1)
    theirs = F.log_softmax(F.linear(taught, teacher).float(), -1).detach()
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)[counts].sum()
