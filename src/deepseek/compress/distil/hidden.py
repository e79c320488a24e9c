"""Hidden states of a model held against those of a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def even_pairs(num_layers: int, num_taught: int) -> tuple[tuple[int, int], ...]:
    """Return for each state of a model, the embedding's output and each layer's, the number of the
    teacher's state that is as far on the way.

    Source: Jiao et al., "TinyBERT" (1909.10351), section 3.1, the uniform mapping.
    """
    return tuple((layer, round(layer * num_taught / num_layers)) for layer in range(num_layers + 1))


def insert_maps(count: int, width: int, taught: int, *, seed: int) -> nn.ModuleList:
    """Return linear maps from a model's width to its teacher's, drawn anew.

    Args:
        count: how many.
        width, taught: channels of the states.
        seed: of their weights.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = nn.ModuleList(nn.Linear(width, taught, bias=False) for _ in range(count))
    for each in maps.parameters():
        nn.init.normal_(each, std=width**-0.5, generator=generator)
    return maps


def hidden_error(states: Tensor, taught: Tensor, counts: Tensor) -> Tensor:
    """Return the sum over the counted tokens of the squared distance of their states, as a share of
    the squared length of the teacher's, float32 scalar.

    Source: Jiao et al., "TinyBERT" (1909.10351), section 3.1. Deviation: it is relative, token by
    token, because single tokens of a decoder have states thousands of times as long as others.

    Args:
        states: of the model, in the teacher's width [B, T, G].
        taught: of the teacher [B, T, G].
        counts: bool [B, T].
    """
    ours, theirs = states[counts].float(), taught[counts].float()
    squares = theirs.square().sum(-1).clamp(min=1e-12)
    return ((ours - theirs).square().sum(-1) / squares).sum()
