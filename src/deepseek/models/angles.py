"""The angles of rotary embedding under every scaling rule, in numpy: no torch is loaded."""

from __future__ import annotations

import math

import numpy as np

from deepseek.models.config import RopeConfig


def rope_angles(
    rope: RopeConfig, dim: int, max_positions: int, stretched: int = 0
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return the angle per position of each channel pair, float32 [dim / 2].

    Args:
        rope: base and scaling rule.
        dim: rotated channels of a head.
        max_positions: context of the model in tokens.
        stretched: the length the dynamic rule adapts to.
    """
    places = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    theta = rope.theta
    if rope.scaling == "dynamic":
        stretch = rope.factor * stretched / max_positions - (rope.factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    # the power rounded once, as torch and transformers have it
    wavelengths = (np.float64(theta) ** places.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / wavelengths
    if rope.scaling == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.scaling == "llama3":
        return _llama3(frequencies, rope, max_positions)
    if rope.scaling == "yarn":
        return _yarn(wavelengths, rope, dim, max_positions)
    return frequencies


def cosine_factor(rope: RopeConfig) -> float:
    """Return the factor on cosines and sines (yarn's attention temperature, 1 for the other
    rules)."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    return yarn_scale(rope.factor, 1.0)


def yarn_scale(factor: float, weight: float) -> float:
    """Return yarn's scale of a stretched context. Source: YaRN (2309.00071), equation 22."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(frequencies: np.ndarray, rope: RopeConfig, max_positions: int) -> np.ndarray:
    original = rope.original_max_positions or max_positions
    turns = original * frequencies / np.float32(2 * math.pi)
    span = np.float32(rope.high_freq_factor - rope.low_freq_factor)
    smooth = ((turns - np.float32(rope.low_freq_factor)) / span).clip(0.0, 1.0)
    return (1 - smooth) * frequencies / np.float32(rope.factor) + smooth * frequencies


def _yarn(wavelengths: np.ndarray, rope: RopeConfig, dim: int, max_positions: int) -> np.ndarray:
    original = rope.original_max_positions or max_positions

    def channel(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    places = np.arange(dim // 2, dtype=np.float32)
    ramp = ((places - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    return ramp / (np.float32(rope.factor) * wavelengths) + (1 - ramp) / wavelengths
