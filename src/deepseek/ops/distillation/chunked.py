"""The divergence of two heads by chunks of rows: logits of all rows are never there together."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops.head_loss import head_loss

_CHUNK_LOGITS = 1 << 25
"""Logits of a chunk, of each head: 128 MiB in float32."""


def linear_divergence(
    states: Tensor,
    weight: Tensor,
    taught: Tensor,
    teacher: Tensor,
    counts: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Return the sum over rows of KL(teacher || student) in nats, float32 scalar: of the chances at
    a temperature, times its square, so that gradients stay as large.

    The student's gradient towards a logit is its chance less the teacher's, times the temperature.
    No gradient reaches the teacher; it can be differentiated once (`ops.head_loss`). Products of
    the student run in the dtype of autocast, where it is on, those of the teacher in its own.

    Source: Hinton et al., "Distilling the knowledge in a neural network" (1503.02531), section 2.

    Args:
        states: of the student [N, H].
        weight: of its head [V, H].
        taught: states of the teacher [N, G].
        teacher: weight of its head [V, G].
        counts: bool [N], which rows count.
        temperature: by which logits of both are divided, above 0.
    """

    def of_chunk(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        theirs = taught[part].to(teacher.dtype) @ teacher.T
        return _divergence_and_slope(logits, theirs, counts[part], temperature)

    return head_loss(states, weight, of_chunk, rows=max(1, _CHUNK_LOGITS // weight.shape[0]))


def _divergence_and_slope(
    ours: Tensor, theirs: Tensor, counts: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the sum of the rows' divergences, and its gradient towards our logits in float32."""
    if temperature != 1:
        ours, theirs = ours.float() / temperature, theirs.float() / temperature
    ours = torch.log_softmax(ours, -1, dtype=torch.float32)
    theirs = torch.log_softmax(theirs, -1, dtype=torch.float32)
    chances = theirs.exp()
    # a chance of zero has no part in the sum: zero times infinity would be no number
    each = (chances * (theirs - ours)).masked_fill_(chances == 0, 0.0).sum(-1)
    slope = ours.exp_().sub_(chances).masked_fill_(~counts[:, None], 0.0)
    total = each.masked_fill(~counts, 0.0).sum()
    return total * temperature**2, slope if temperature == 1 else slope.mul_(temperature)
