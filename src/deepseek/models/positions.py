"""Positions: the angles of rotary embedding under every scaling rule, and the slopes of ALiBi."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from deepseek.models.angles import cosine_factor, rope_angles, yarn_scale
from deepseek.models.config import RopeConfig


def rope_tables(
    rope: RopeConfig, dim: int, max_positions: int, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine for `deepseek.ops.rope.rotate`, each [B or 1, 1, T, dim].

    Args:
        rope: base and scaling rule.
        dim: rotated channels of a head.
        max_positions: context of the model in tokens (the dynamic rule stretches beyond it).
        positions: int64 [B or 1, T].
        dtype: of the result; angles are computed in float32.
    """
    stretched = 0
    if rope.scaling == "dynamic":
        stretched = max(int(positions.max()) + 1, max_positions)
    frequencies = inverse_frequencies(rope, dim, max_positions, stretched).to(positions.device)
    angles = positions[:, None, :, None].float() * frequencies
    factor = cosine_factor(rope)
    cos, sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


@functools.lru_cache(maxsize=64)
def inverse_frequencies(
    rope: RopeConfig, dim: int, max_positions: int, stretched: int = 0
) -> Tensor:
    """Return the angle per position of each channel pair, float32 [dim / 2].

    `stretched` is the length the dynamic rule adapts to; keys cached under a shorter length keep
    their angles.
    """
    # Made outside inference mode: the cached tensor may later be part of a training graph.
    with torch.inference_mode(False):
        return torch.tensor(rope_angles(rope, dim, max_positions, stretched), device="cpu")


def latent_score_factor(rope: RopeConfig) -> float:
    """Return the factor on the scores of latent attention (DeepSeek-V3's `mscale_all_dim`)."""
    if rope.scaling == "default" or not rope.mscale_all_dim:
        return 1.0
    return yarn_scale(rope.factor, rope.mscale_all_dim) ** 2


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slope of each head.

    Source: Press, Smith, Lewis 2022, section 3: a geometric series from 2^(-8/n); for a number of
    heads that is no power of two, the rest are every second slope of the next power.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8.0 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-4.0 * (head + 1) / power) for head in range(0, 2 * (num_heads - power), 2)]
    return slopes + between
