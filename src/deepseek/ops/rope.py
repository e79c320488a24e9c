"""Rotary position embedding: the rotation of queries and keys by their positions."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the states with channel pairs (i, i + dim / 2) rotated by their angles.

    Args:
        states: [B, heads, T, dim].
        cos: [B or 1, 1, T, dim]: cosine of each channel's angle, the second half repeating the
            first.
        sin: [B or 1, 1, T, dim]: sine likewise, **negated in the first half**, so that the rotation
            is two products.

    Source: Su et al. 2021, "RoFormer", equation 34, in the half-split channel order of Llama.
    """
    half = states.shape[-1] // 2
    return torch.addcmul(states * cos, states.roll(half, -1), sin)


def rotate_both(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys rotated, as one product over the heads of both.

    Args:
        queries: [B, heads, T, dim].
        keys: [B, KV heads, T, dim].
        cos, sin: as in `rotate`.
    """
    both = rotate(torch.cat((queries, keys), dim=1), cos, sin)
    return both.split((queries.shape[1], keys.shape[1]), dim=1)  # type: ignore[return-value]


def deinterleave(states: Tensor) -> Tensor:
    """Return channel pairs (2i, 2i + 1) reordered to (i, i + dim / 2), the order `rotate` works
    in."""
    return torch.cat((states[..., 0::2], states[..., 1::2]), dim=-1)
