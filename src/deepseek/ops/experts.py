"""The product of tokens with the feed-forward experts they were routed to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.linear import linear


def experts_swiglu(
    states: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Return the weighted sum of the chosen experts' SwiGLU feed-forwards.

    Args:
        states: [N, hidden].
        gate_up: [E, 2 * width, hidden]: gate rows, then up rows, of each expert.
        down: [E, hidden, width].
        chosen: int64 [N, k]: experts of each token.
        weights: [N, k]: their weights.

    Returns:
        [N, hidden]. Tokens are grouped by expert, so an expert that nobody chose costs nothing.
    """
    token_of = torch.arange(states.shape[0], device=states.device).repeat_interleave(
        chosen.shape[1]
    )
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=gate_up.shape[0]).tolist()
    tokens, scale = token_of[order], weights.flatten()[order]
    out = states.new_zeros(states.shape)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = tokens[start : start + count]
        gate, up = linear(states[rows], gate_up[expert]).chunk(2, dim=-1)
        result = linear(F.silu(gate) * up, down[expert]) * scale[start : start + count, None]
        out = out.index_add(0, rows, result.to(out.dtype))
        start += count
    return out
