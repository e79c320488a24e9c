"""Positions: the angles of rotary embedding under every scaling rule, and the slopes of ALiBi."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

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
    factor = cosine_factor(rope, max_positions)
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
    with torch.inference_mode(False), torch.device("cpu"):
        powers = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        if rope.scaling == "linear":
            return 1.0 / (rope.theta**powers) / rope.factor
        if rope.scaling == "dynamic":
            stretch = rope.factor * stretched / max_positions - (rope.factor - 1)
            return 1.0 / ((rope.theta * stretch ** (dim / (dim - 2))) ** powers)
        if rope.scaling == "llama3":
            return _llama3(1.0 / (rope.theta**powers), rope, max_positions)
        if rope.scaling == "yarn":
            return _yarn(rope.theta**powers, rope, dim, max_positions)
        return 1.0 / (rope.theta**powers)


def cosine_factor(rope: RopeConfig, max_positions: int) -> float:
    """Return the factor on cosines and sines (yarn's attention temperature, 1 for the other
    rules)."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = rope.factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(factor, rope.mscale) / _mscale(factor, rope.mscale_all_dim)
    return _mscale(factor, 1.0)


def latent_score_factor(rope: RopeConfig) -> float:
    """Return the factor on the scores of latent attention (DeepSeek-V3's `mscale_all_dim`)."""
    if rope.scaling == "default" or not rope.mscale_all_dim:
        return 1.0
    return _mscale(rope.factor, rope.mscale_all_dim) ** 2


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slope of each head.

    Source: Press, Smith, Lewis 2022, section 3: a geometric series from 2^(-8/n); for a number of
    heads that is no power of two, the rest are every second slope of the next power.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8.0 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-4.0 * (head + 1) / power) for head in range(0, 2 * (num_heads - power), 2)]
    return slopes + between


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(frequencies: Tensor, rope: RopeConfig, max_positions: int) -> Tensor:
    original = rope.original_max_positions or max_positions
    turns = original * frequencies / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def _yarn(wavelengths: Tensor, rope: RopeConfig, dim: int, max_positions: int) -> Tensor:
    original = rope.original_max_positions or max_positions

    def channel(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return ramp / (rope.factor * wavelengths) + (1 - ramp) / wavelengths
